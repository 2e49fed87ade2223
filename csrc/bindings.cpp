#include <torch/csrc/utils/pybind.h>

#include "cpu/instruction_set.h"
#include "ops.h"
#include "plain.h"

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fusedloss;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("is_plain", &is_plain);
  m.def("cross_entropy_covers", &cross_entropy_covers);
  m.def("cross_entropy_forward", &cross_entropy_forward, no_gil);
  m.def("cross_entropy_backward", &cross_entropy_backward, no_gil);
  m.def("mse_loss_covers", &mse_loss_covers);
  m.def("mse_loss_forward", &mse_loss_forward, no_gil);
  m.def("mse_loss_backward", &mse_loss_backward, no_gil);
  m.def("cpu_capability", &cpu::instruction_set_name);
#ifdef FUSEDLOSS_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
