// A backward pass is one of four cases. It hands over the gradient that the forward pass has left (ready_gradients.h);
// or it calls the kernel; or, where its tensors are not plain (a dispatch mode, compiled autograd), it calls the
// registered backward op; or, where it is to be differentiated itself (create_graph), or is given a batch of gradients
// (is_grads_batched, vmap), it calls the op that composes the gradient of torch's operations. fusedloss/ops.py
// registers the ops.
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

// Called before torch's functions are given a tensor that the forward pass has saved: not all of them notice that its
// memory was freed since.
inline void check_saved(const char* op, const char* name, const at::Tensor& tensor) {
  if (is_plain(tensor)) check_memory(op, name, tensor);
}

// The profiler shows each pass under the name of what it computes.
using ProfiledInputs = c10::ArrayRef<const c10::IValue>;

}  // namespace fusedloss
