// The four cases of a backward pass:
// - It returns the gradient that the forward pass computed (ready_gradients.h).
// - It calls the kernel.
// - It calls the registered backward op, if its tensors are not plain (a dispatch mode, compiled autograd).
// - It calls the op that composes the gradient from torch's operations, if the backward pass must be differentiated
//   itself (create_graph) or gets a batch of gradients (is_grads_batched, vmap).
// fusedloss/ops.py registers the ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>

#include <utility>

#include "ops/plain.h"

namespace fusedloss {

inline bool must_compose(const at::Tensor& grad_output) {
  constexpr c10::DispatchKeySet kTransforms(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchGradWrapper});
  return at::GradMode::is_enabled() || grad_output.key_set().has_any(kTransforms);
}

template <typename Signature, typename... Arguments>
auto call_registered_op(const char* name, Arguments&&... arguments) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return op.call(std::forward<Arguments>(arguments)...);
}

// Must be called before a tensor that the forward pass saved is passed to torch's functions: not all of them detect
// that its memory has been freed since.
inline void check_saved(const char* op, const char* name, const at::Tensor& tensor) {
  if (is_plain(tensor)) check_memory(op, name, tensor);
}

// RECORD_FUNCTION gives each pass its own name in the profiler. Its list of inputs stays empty.
using ProfiledInputs = c10::ArrayRef<const c10::IValue>;

}  // namespace fusedloss
