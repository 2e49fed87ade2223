// The Python module. fusedloss/_C.pyi describes it.

#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "autograd/losses.h"
#include "kernels/cpu/instruction_set.h"
#include "ops/class_indices.h"
#include "ops/cross_entropy_op.h"
#include "ops/cuda_tuning.h"
#include "ops/nll_loss_op.h"
#include "ops/pointwise_op.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include "kernels/cuda/cross_entropy_cuda.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace fusedloss {
namespace {

using Parameters = std::vector<double>;
using Sizes = std::vector<int64_t>;
using Tensors = std::vector<at::Tensor>;

const auto no_gil = py::call_guard<py::gil_scoped_release>();

// Names the grad_fn types. Without it torch prints the end of the C++ template's name: grad_fn=<CrossEntropy>>.
void name_nodes() {
  static std::array<PyTypeObject, 3> types = {};
  PyTypeObject* type = types.data();
  for (const auto& [node, name] : {cross_entropy_node(), nll_loss_node(), pointwise_node()})
    torch::autograd::registerCppFunction(*node,
                                         torch::autograd::_initFunctionPyTypeObject(*type++, name, nullptr, nullptr));
}

void define_cross_entropy(py::module_& m) {
  m.def(
      "cross_entropy",
      [](const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
         int64_t ignore_index, double label_smoothing, bool inplace_backward) {
        return cross_entropy({input, target, weight, reduction, ignore_index, label_smoothing}, inplace_backward);
      },
      "input"_a, "target"_a, "weight"_a, "reduction"_a, "ignore_index"_a, "label_smoothing"_a, "inplace_backward"_a,
      no_gil,
      "Returns the loss, with autograd, or None if the tensors are not plain or this build has no kernels for their "
      "device. reduction: 0 (none), 1 (mean) or 2 (sum).");
  m.def(
      "cross_entropy_forward",
      [](const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
         int64_t ignore_index, double label_smoothing, bool autocast) {
        const auto result =
            cross_entropy_forward({input, target, weight, reduction, ignore_index, label_smoothing}, autocast);
        return std::make_tuple(result.loss, result.statistics);
      },
      "input"_a, "target"_a, "weight"_a, "reduction"_a, "ignore_index"_a, "label_smoothing"_a, "autocast"_a, no_gil,
      "Returns the loss and the statistics, which cross_entropy_backward needs. autocast: return a float32 "
      "loss for 16-bit logits.");
  m.def(
      "cross_entropy_backward",
      [](const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
         const at::Tensor& statistics, int64_t reduction, int64_t ignore_index, double label_smoothing) {
        return cross_entropy_backward(grad_output, {input, target, weight, reduction, ignore_index, label_smoothing},
                                      statistics);
      },
      "grad_output"_a, "input"_a, "target"_a, "weight"_a, "statistics"_a, "reduction"_a, "ignore_index"_a,
      "label_smoothing"_a, no_gil,
      "Returns the gradient with respect to input, times grad_output. statistics: the second result of "
      "cross_entropy_forward for the same arguments.");
  m.def(
      "cross_entropy_statistics_numel",
      [](const c10::SymInt& rows, bool is_mean, bool has_weight, double label_smoothing, bool class_indices) {
        return cross_entropy_statistics_numel(rows, is_mean,
                                              sums_class_weights(has_weight, label_smoothing, class_indices));
      },
      "rows"_a, "is_mean"_a, "has_weight"_a, "label_smoothing"_a, "class_indices"_a,
      "Returns the number of elements of the statistics that cross_entropy_forward returns.");
}

void define_nll_loss(py::module_& m) {
  m.def(
      "nll_loss",
      [](const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
         int64_t ignore_index) { return nll_loss(input, {target, weight, reduction, ignore_index}); },
      "input"_a, "target"_a, "weight"_a, "reduction"_a, "ignore_index"_a, no_gil,
      "Returns the loss, with autograd, or None if the tensors are not plain or this build has no kernels for their "
      "device. reduction: 0 (none), 1 (mean) or 2 (sum).");
  m.def(
      "nll_loss_forward",
      [](const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
         int64_t ignore_index, bool autocast) {
        const auto result = nll_loss_forward(input, {target, weight, reduction, ignore_index}, autocast);
        return std::make_tuple(result.loss, result.total_weight);
      },
      "input"_a, "target"_a, "weight"_a, "reduction"_a, "ignore_index"_a, "autocast"_a, no_gil,
      "Returns the loss and total_weight, which the mean divides by and nll_loss_backward needs. autocast: return a "
      "float32 loss for a 16-bit input.");
  m.def(
      "nll_loss_backward",
      [](const at::Tensor& grad_output, const at::Tensor& target, const OptionalTensor& weight,
         const at::Tensor& total_weight, const Sizes& sizes, const Sizes& strides, at::ScalarType dtype,
         int64_t reduction, int64_t ignore_index) {
        return nll_loss_backward(grad_output, {target, weight, reduction, ignore_index}, total_weight,
                                 {sizes, strides, dtype});
      },
      "grad_output"_a, "target"_a, "weight"_a, "total_weight"_a, "sizes"_a, "strides"_a, "dtype"_a, "reduction"_a,
      "ignore_index"_a, no_gil,
      "Returns the gradient with respect to an input of these sizes and this dtype, times grad_output. It has "
      "these strides. total_weight: the second result of nll_loss_forward for the same arguments.");
}

void define_pointwise(py::module_& m) {
  m.def(
      "add_pointwise_loss", &add_pointwise_loss, "name"_a, "operands"_a, "cpu_formula"_a, "cuda_formula"_a,
      "Registers a pointwise loss and returns its number, which the other functions take as loss. operands: the names "
      "of its tensors. cpu_formula and cuda_formula: the addresses of the compiled formulas of a user's loss, 0 if it "
      "is not compiled for that device; both are 0 for a loss of this library, which is found by its name.");
  m.def(
      "pointwise",
      [](int64_t loss, const Tensors& operands, const Parameters& parameters, int64_t reduction,
         std::optional<int64_t> divisor) { return pointwise(loss, operands, parameters, reduction, divisor); },
      "loss"_a, "operands"_a, "parameters"_a, "reduction"_a, "divisor"_a, no_gil,
      "Returns the loss, with autograd, or None if the kernels do not cover the call. divisor: what the mean divides "
      "by; by default the number of elements.");
  m.def(
      "pointwise_forward",
      [](int64_t loss, const Tensors& operands, const Parameters& parameters, int64_t reduction,
         std::optional<int64_t> divisor, bool autocast) {
        return pointwise_forward({pointwise_loss(loss), operands, parameters, reduction, divisor}, autocast).loss;
      },
      "loss"_a, "operands"_a, "parameters"_a, "reduction"_a, "divisor"_a, "autocast"_a, no_gil,
      "Returns the loss. autocast: return a float32 loss for 16-bit operands.");
  m.def(
      "pointwise_backward",
      [](const at::Tensor& grad_output, int64_t loss, const Tensors& operands, const Parameters& parameters,
         int64_t reduction, std::optional<int64_t> divisor, unsigned wanted) {
        return pointwise_backward(grad_output, {pointwise_loss(loss), operands, parameters, reduction, divisor},
                                  wanted);
      },
      "grad_output"_a, "loss"_a, "operands"_a, "parameters"_a, "reduction"_a, "divisor"_a, "wanted"_a, no_gil,
      "Returns a list with the gradient for each operand whose bit is set in wanted, times grad_output, and None for "
      "the other operands. The lowest bit is the first operand.");
}

void define_settings(py::module_& m) {
  m.def("set_debug", &set_debug, "enabled"_a,
        "If enabled, checks for class indices out of range before a CUDA kernel is launched.");
  m.def("set_cuda_tuning", &set_cuda_tuning, "name"_a, "value"_a,
        "Sets a field of CudaTuning (csrc/kernels/options.h) for all later calls. The name \"defaults\" restores all "
        "fields.");
  m.def(
      "cpu_capability", [] { return cpu::name_of(cpu::instruction_set()); },
      "Returns the instruction set that the CPU kernels use: \"portable\", \"avx2\" or \"avx512\".");
  m.def(
      "choose_cpu_capability",
      [](const std::string& wanted, bool has_avx2, bool has_avx512) {
        using cpu::InstructionSet;
        const auto best = has_avx512 ? InstructionSet::kAvx512
                          : has_avx2 ? InstructionSet::kAvx2
                                     : InstructionSet::kPortable;
        return cpu::name_of(cpu::choose_instruction_set(wanted, best));
      },
      "wanted"_a, "has_avx2"_a, "has_avx512"_a,
      "Returns the instruction set that FUSEDLOSS_CPU=wanted selects on a processor with these features. For tests, so "
      "that one machine can test every combination.");
  m.attr("max_operands") = kMaxOperands;
  m.attr("max_parameters") = kMaxParameters;
#ifdef FUSEDLOSS_WITH_CUDA
  m.attr("with_cuda") = true;
  m.attr("max_cuda_classes") = cuda::kMaxClasses;
#else
  m.attr("with_cuda") = false;
#endif
}

}  // namespace
}  // namespace fusedloss

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  fusedloss::name_nodes();
  fusedloss::define_cross_entropy(m);
  fusedloss::define_nll_loss(m);
  fusedloss::define_pointwise(m);
  fusedloss::define_settings(m);
}
