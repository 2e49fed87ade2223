// A tensor is plain if the kernels may be called on its memory directly. Calls with any other tensor (a subclass, a
// wrapper of functorch, a fake or meta tensor, a tensor on another device), or under a dispatch mode or tracing, go to
// the registered ops or to torch's own functions, as fusedloss/_dispatch.py decides.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "ops/checks.h"

namespace fusedloss {

inline c10::DispatchKeySet active_keys(const at::Tensor& tensor) {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (tensor.key_set() | local.included_) - local.excluded_;
}

inline bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kPlain(
      {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
       DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect, DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  if (!tensor.defined() || !kPlain.has_all(active_keys(tensor))) return false;
  return !tensor._fw_grad(/*level=*/0).defined();  // forward-mode AD
}

// True if autocast makes torch compute the loss of this tensor in float32.
inline bool autocast_to_float32(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kDouble) return false;
  const auto key = tensor.is_cuda() ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  return active_keys(tensor).has(key);
}

// True if a call with this input is handled here: the kernels compute it, or it is rejected because of its dtype.
inline bool is_ours(const at::Tensor& input) {
  if (!is_plain(input)) return false;
#ifndef FUSEDLOSS_WITH_CUDA
  if (input.is_cuda()) return false;
#endif
  return kernel_dtype(input.scalar_type()).has_value() || !autocast_to_float32(input);  // autocast converts float8
}

// The same for a loss with a target and class weights.
inline bool are_ours(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight) {
  return is_ours(input) && is_plain(target) && (!weight.has_value() || is_plain(*weight));
}

}  // namespace fusedloss
