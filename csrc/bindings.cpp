#include <pybind11/functional.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/utils/pybind.h>

#include "kernels/cpu/instruction_set.h"
#include "ops/cuda_tuning.h"
#include "ops/ops.h"

namespace py = pybind11;

namespace {

// Otherwise torch prints grad_fn=<CrossEntropy>>: what is left of the name of a C++ template.
void name_nodes() {
  static std::array<PyTypeObject, std::tuple_size_v<decltype(fusedloss::node_types())>> types = {};
  PyTypeObject* type = types.data();
  for (const auto& [node, name] : fusedloss::node_types())
    torch::autograd::registerCppFunction(
        *node, torch::autograd::_initFunctionPyTypeObject(*type++, name, nullptr, nullptr));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fusedloss;
  name_nodes();
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("cross_entropy", &cross_entropy, no_gil);
  m.def(
      "cross_entropy_forward",
      [](const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
         int64_t ignore_index, double label_smoothing, bool autocast) {
        const auto result =
            cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing, autocast);
        return std::make_tuple(result.loss, result.statistics);
      },
      no_gil);
  m.def(
      "cross_entropy_backward",
      [](const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
         const at::Tensor& statistics, int64_t reduction, int64_t ignore_index, double label_smoothing) {
        return cross_entropy_backward(grad_output, input, target, weight, statistics, reduction, ignore_index,
                                      label_smoothing);
      },
      no_gil);
  m.def("add_pointwise_loss", &add_pointwise_loss);
  m.def(
      "pointwise",
      [](int64_t loss, const std::vector<at::Tensor>& operands, const std::vector<double>& parameters,
         int64_t reduction, std::optional<int64_t> divisor) {
        return pointwise(loss, operands, parameters, reduction, divisor);
      },
      no_gil);
  m.def(
      "pointwise_forward",
      [](int64_t loss, const std::vector<at::Tensor>& operands, const std::vector<double>& parameters,
         int64_t reduction, std::optional<int64_t> divisor, bool autocast) {
        return pointwise_forward({pointwise_loss(loss), operands, parameters, reduction, divisor}, autocast).loss;
      },
      no_gil);
  m.def(
      "pointwise_backward",
      [](const at::Tensor& grad_output, int64_t loss, const std::vector<at::Tensor>& operands,
         const std::vector<double>& parameters, int64_t reduction, std::optional<int64_t> divisor,
         unsigned wanted) {
        return pointwise_backward(grad_output, {pointwise_loss(loss), operands, parameters, reduction, divisor}, wanted);
      },
      no_gil);
  m.def("nll_loss", &nll_loss, no_gil);
  m.def(
      "nll_loss_forward",
      [](const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
         int64_t ignore_index, bool autocast) {
        const auto result = nll_loss_forward(input, target, weight, reduction, ignore_index, autocast);
        return std::make_tuple(result.loss, result.total_weight);
      },
      no_gil);
  m.def(
      "nll_loss_backward",
      [](const at::Tensor& grad_output, const at::Tensor& target, const OptionalTensor& weight,
         const at::Tensor& total_weight, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
         at::ScalarType dtype, int64_t reduction, int64_t ignore_index) {
        return nll_loss_backward(grad_output, target, weight, total_weight, sizes, strides, dtype, reduction,
                                 ignore_index);
      },
      no_gil);
  m.def("set_debug", &set_debug);
  m.def("set_cuda_tuning", &set_cuda_tuning);
  m.def("cpu_capability", [] { return cpu::name_of(cpu::instruction_set()); });
  // For the tests, which have no machine that lacks AVX2.
  m.def("choose_cpu_capability", [](const std::string& wanted, bool has_avx2, bool has_avx512) {
    using cpu::InstructionSet;
    const auto best = has_avx512 ? InstructionSet::kAvx512 : has_avx2 ? InstructionSet::kAvx2 : InstructionSet::kPortable;
    return cpu::name_of(cpu::choose_instruction_set(wanted, best));
  });
#ifdef FUSEDLOSS_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
