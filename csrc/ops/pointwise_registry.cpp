#include "ops/pointwise_registry.h"

#include <c10/util/Exception.h>

#include <deque>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "kernels/cpu/pointwise_cpu.h"
#include "kernels/options.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include "kernels/cuda/pointwise_cuda.h"
#endif

namespace fusedloss {
namespace {

std::shared_mutex mutex;
std::deque<PointwiseLoss> losses;  // a deque, so that references to its elements stay valid

}  // namespace

int64_t add_pointwise_loss(const std::string& name, const std::vector<std::string>& operands, int64_t cpu_formula,
                           int64_t cuda_formula) {
  TORCH_CHECK_VALUE(!operands.empty() && operands.size() <= size_t(kMaxOperands), name, ": operands must name 1 to ",
                    kMaxOperands, " tensors, got ", operands.size());
  PointwiseLoss loss = {};
  loss.name = name;
  loss.operands = operands;
  const bool is_own = cpu_formula == 0 && cuda_formula == 0;
  loss.on_cpu =
      is_own ? cpu::find_pointwise_loss(name.c_str()) : reinterpret_cast<const cpu::PointwiseFormula*>(cpu_formula);
  TORCH_CHECK_VALUE(!is_own || loss.on_cpu != nullptr, "add_pointwise_loss: name must be the name of a loss in ",
                    "formulas/pointwise-inl.h if no formula is given, got \"", name, "\"");
#ifdef FUSEDLOSS_WITH_CUDA
  loss.on_cuda =
      is_own ? cuda::find_pointwise_loss(name.c_str()) : reinterpret_cast<const cuda::PointwiseFormula*>(cuda_formula);
#endif
  const std::unique_lock<std::shared_mutex> lock(mutex);
  losses.push_back(std::move(loss));
  return int64_t(losses.size()) - 1;
}

const PointwiseLoss& pointwise_loss(int64_t number) {
  const std::shared_lock<std::shared_mutex> lock(mutex);
  TORCH_CHECK_INDEX(number >= 0 && number < int64_t(losses.size()),
                    "loss must be a number that add_pointwise_loss returned, in [0, ", losses.size(), "), got ",
                    number);
  return losses[size_t(number)];
}

}  // namespace fusedloss
