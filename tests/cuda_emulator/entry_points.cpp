// The launchers, as functions that ctypes can call.
#include <cstddef>

#include "kernels/cuda/cross_entropy_cuda.h"
#include "kernels/cuda/nll_loss_cuda.h"
#include "kernels/cuda/pointwise_cuda.h"
#include "runtime.h"

using namespace fusedloss;

EMULATOR_EXPORT int64_t cross_entropy_scratch(CrossEntropyOptions* o) {
  const cuda::CrossEntropyLaunchers& launchers = cuda::cross_entropy_launchers(*o);
  return launchers.prepare_forward(*o) == cudaSuccess ? launchers.scratch_bytes(*o) : -1;
}
EMULATOR_EXPORT int cross_entropy_forward(const CrossEntropyOptions* o) {
  return cuda::cross_entropy_launchers(*o).forward(*o, nullptr);
}
EMULATOR_EXPORT int cross_entropy_backward(const CrossEntropyOptions* o) {
  return cuda::cross_entropy_launchers(*o).backward(*o, nullptr);
}
EMULATOR_EXPORT int64_t pointwise_scratch(const PointwiseOptions* o) { return cuda::pointwise_scratch_bytes(*o); }
EMULATOR_EXPORT int pointwise_forward(const PointwiseOptions* o, const char* loss) {
  return cuda::find_pointwise_loss(loss)->forward(*o, nullptr);
}
EMULATOR_EXPORT int pointwise_backward(const PointwiseOptions* o, const char* loss) {
  return cuda::find_pointwise_loss(loss)->backward(*o, nullptr);
}

EMULATOR_EXPORT int64_t nll_loss_scratch(const NLLLossOptions* o) { return cuda::nll_loss_scratch_bytes(*o); }
EMULATOR_EXPORT int nll_loss_forward(const NLLLossOptions* o) { return cuda::nll_loss_forward(*o, nullptr); }
EMULATOR_EXPORT int nll_loss_backward(const NLLLossOptions* o) { return cuda::nll_loss_backward(*o, nullptr); }

// Python declares these structs again. It compares these sizes and offsets with its own to find out if they have
// changed.
EMULATOR_EXPORT int64_t size_of_cross_entropy_options() { return sizeof(CrossEntropyOptions); }
EMULATOR_EXPORT int64_t size_of_pointwise_options() { return sizeof(PointwiseOptions); }
EMULATOR_EXPORT int64_t size_of_nll_loss_options() { return sizeof(NLLLossOptions); }
EMULATOR_EXPORT int64_t offset_of_parameter() { return offsetof(PointwiseOptions, parameter); }
EMULATOR_EXPORT int64_t offset_of_weight_sum() { return offsetof(CrossEntropyOptions, weight_sum); }

// Kernels read it under the name planted_bug.
extern "C" int emulator_planted_bug;
int emulator_planted_bug = 0;
EMULATOR_EXPORT void emulator_plant(int bug) { emulator_planted_bug = bug; }
