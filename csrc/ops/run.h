// Runs the kernels: on the CPU in torch's thread pool, on CUDA on the tensor's device and the current stream.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <memory>

#include "kernels/cpu/chunks.h"

// FUSEDLOSS_EMULATED_CUDA: a build for the tests. It executes the CUDA kernels on the CPU, for tensors on the CPU.
#if defined(FUSEDLOSS_EMULATED_CUDA)
#include <driver_types.h>

#include <mutex>
#elif defined(FUSEDLOSS_WITH_CUDA)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fusedloss {

// Memory for one call on the CPU. It is not a tensor, because allocating a tensor costs ten times as much, which
// matters for small losses.
class HostScratch {
 public:
  explicit HostScratch(int64_t bytes) : memory_(new std::max_align_t[size_t(bytes) / sizeof(std::max_align_t) + 1]) {}
  void* data() const { return memory_.get(); }

 private:
  std::unique_ptr<std::max_align_t[]> memory_;
};

// Calls kernel(arguments…, begin_chunk, end_chunk) so that each chunk is in exactly one call.
template <typename Kernel, typename... Arguments>
void run_on_cpu(const cpu::Work& work, Kernel kernel, const Arguments&... arguments) {
  if (work.chunks == 0) return;
  if (work.chunks <= work.grain) {
    kernel(arguments..., 0, work.chunks);  // too little work for a second thread, or for the cost of at::parallel_for
  } else {
    at::parallel_for(0, work.chunks, work.grain, [&](int64_t begin, int64_t end) { kernel(arguments..., begin, end); });
  }
}

// True if the CUDA kernels are used for this tensor.
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

// Calls launch(arguments…, stream) while the tensor's device is current.
template <typename Launch, typename... Arguments>
void run_on_cuda(const char* op, const at::Tensor& tensor, Launch launch, const Arguments&... arguments) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  const cudaError_t error = launch(arguments..., c10::cuda::getCurrentCUDAStream().stream());
  if (error != cudaSuccess) cudaGetLastError();  // clears it, or the next launch would report it
  TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

// Allocates host memory that every device can write to; returns null if that fails. The tensor's device is current for
// the call, because it is already in use.
inline int32_t* allocate_host_flags(const at::Tensor& tensor, int count) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  const c10::cuda::CUDAStreamCaptureModeGuard allow(cudaStreamCaptureModeRelaxed);  // during graph capture too
  void* flags = nullptr;
  const size_t bytes = size_t(count) * sizeof(int32_t);
  const cudaError_t error = cudaHostAlloc(&flags, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? static_cast<int32_t*>(flags) : nullptr;
}

#endif

}  // namespace fusedloss
