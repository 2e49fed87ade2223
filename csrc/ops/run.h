// Where the two devices part: CPU work goes to torch's thread pool, CUDA work to the tensor's device and the current
// stream.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <memory>

#include "kernels/cpu/chunks.h"

// FUSEDLOSS_EMULATED_CUDA: a build for the tests, in which the CUDA kernels are executed on the CPU, for its tensors.
#if defined(FUSEDLOSS_EMULATED_CUDA)
#include <driver_types.h>

#include <mutex>
#elif defined(FUSEDLOSS_WITH_CUDA)
#include <c10/cuda/CUDAGraphsC10Utils.h>
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

// Calls kernel(arguments…, begin_chunk, end_chunk), over all chunks.
template <typename Kernel, typename... Arguments>
void run_on_cpu(const cpu::Work& work, Kernel kernel, const Arguments&... arguments) {
  if (work.chunks == 0) return;
  if (work.chunks <= work.grain) {
    kernel(arguments..., 0, work.chunks);  // not worth a second thread, nor the cost of asking for one
  } else {
    at::parallel_for(0, work.chunks, work.grain, [&](int64_t begin, int64_t end) { kernel(arguments..., begin, end); });
  }
}

// Are the CUDA kernels this tensor's?
inline bool on_cuda(const at::Tensor& tensor) {
#if defined(FUSEDLOSS_EMULATED_CUDA)
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

#if defined(FUSEDLOSS_EMULATED_CUDA)

template <typename Launch, typename... Arguments>
void run_on_cuda(const char* op, const at::Tensor&, Launch launch, const Arguments&... arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const cudaError_t error = launch(arguments..., nullptr);
  TORCH_CHECK(error == cudaSuccess, op, ": error ", int(error), " of the emulated CUDA");
}

inline int32_t* allocate_host_flags(const at::Tensor&, int count) { return new int32_t[size_t(count)]; }

#elif defined(FUSEDLOSS_WITH_CUDA)

// Calls launch(arguments…, stream), with the tensor's device current.
template <typename Launch, typename... Arguments>
void run_on_cuda(const char* op, const at::Tensor& tensor, Launch launch, const Arguments&... arguments) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  const cudaError_t error = launch(arguments..., c10::cuda::getCurrentCUDAStream().stream());
  if (error != cudaSuccess) cudaGetLastError();  // which would else be taken for the next launch's
  TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

// In memory that every device can write to; null if there is none. Asked of the tensor's device: it is in use already.
inline int32_t* allocate_host_flags(const at::Tensor& tensor, int count) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  const c10::cuda::CUDAStreamCaptureModeGuard allow(cudaStreamCaptureModeRelaxed);  // a graph may be captured just now
  void* flags = nullptr;
  const size_t bytes = size_t(count) * sizeof(int32_t);
  const cudaError_t error = cudaHostAlloc(&flags, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? static_cast<int32_t*>(flags) : nullptr;
}

#endif

}  // namespace fusedloss
