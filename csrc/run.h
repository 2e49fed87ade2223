// Where the two devices part: CPU work goes to torch's thread pool, CUDA work to the tensor's device and the current
// stream.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <memory>

#ifdef FUSEDLOSS_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fusedloss {

// Memory for one call on the CPU. Not a tensor: that costs ten times as much, which small losses would notice.
class HostScratch {
 public:
  explicit HostScratch(int64_t bytes) : memory_(new std::max_align_t[size_t(bytes) / sizeof(std::max_align_t) + 1]) {}
  void* data() const { return memory_.get(); }

 private:
  std::unique_ptr<std::max_align_t[]> memory_;
};

// kernel(begin_chunk, end_chunk), over all chunks.
template <typename Kernel>
void run_on_cpu(int64_t chunks, int64_t grain, Kernel kernel) {
  if (chunks == 0) return;
  if (chunks <= grain) {
    kernel(0, chunks);  // not worth a second thread, nor the cost of asking for one
  } else {
    at::parallel_for(0, chunks, grain, kernel);
  }
}

#ifdef FUSEDLOSS_WITH_CUDA
// launch(stream), with the tensor's device current.
template <typename Launch>
void run_on_cuda(const char* op, const at::Tensor& tensor, Launch launch) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  const cudaError_t error = launch(c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}
#endif

}  // namespace fusedloss
