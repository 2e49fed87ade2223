// Allocates the loss and checks grad_output, in the same way for every op.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "kernels/options.h"
#include "ops/checks.h"

namespace fusedloss {

// Allocates the loss and points the options to it. If there is no reduction, for_each(type) allocates an uninitialised
// tensor of that type for the losses of all rows or elements.
template <typename Options, typename ForEach>
at::Tensor allocate_loss(Options& o, const at::Tensor& input, bool autocast, ForEach for_each) {
  const at::ScalarType type = loss_type(input, autocast);
  const at::Tensor loss = o.reduction == Reduction::kNone ? for_each(type) : input.new_empty({}, type);
  o.loss_dtype = *kernel_dtype(type);
  o.loss = loss.data_ptr();
  return loss;
}

// Checks grad_output and points the options to the tensor that it returns: grad_output itself, or a copy in the order
// that the kernels read. like: input or its gradient. sizes: the shape of the loss if there is no reduction.
// dense(grad_output): returns the same values in the order of the rows or elements.
template <typename Options, typename Dense>
at::Tensor take_grad_output(const char* op, Options& o, const at::Tensor& grad_output, const at::Tensor& like,
                            at::IntArrayRef sizes, Dense dense) {
  check_same_device(op, "grad_output", grad_output, like);
  const bool is_reduced = o.reduction != Reduction::kNone;
  TORCH_CHECK(is_reduced ? grad_output.numel() == 1 : grad_output.sizes() == sizes, op,
              ": grad_output must have the shape of the loss, ", is_reduced ? at::IntArrayRef() : sizes, ", got ",
              grad_output.sizes());
  o.loss_dtype = check_loss_dtype(op, "grad_output", grad_output, like);
  check_memory(op, "grad_output", grad_output);
  const bool one_value = is_reduced || is_one_value(grad_output);
  const at::Tensor taken = one_value ? grad_output : dense(grad_output);
  o.grad_output = taken.const_data_ptr();
  o.grad_output_stride = one_value ? 0 : 1;
  return taken;
}

}  // namespace fusedloss
