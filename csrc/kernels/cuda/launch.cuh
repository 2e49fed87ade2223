// How kernels are launched and selected, and what the device has. tests/cuda_emulator executes the kernels on a CPU. It
// defines FUSEDLOSS_LAUNCH and FUSEDLOSS_PREPARE for itself; only this file and cluster.cuh check for these macros.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A target out of range stops release builds too, as in torch, so assert must stay active.
#undef NDEBUG
#include <cassert>
#include <map>
#include <mutex>
#include <tuple>

#include "kernels/integers.h"
#include "kernels/options.h"

// The architecture that this compiler pass generates code for: 900 is sm_90, 0 is a CPU.
#ifdef __CUDA_ARCH__
#define FUSEDLOSS_CUDA_ARCH __CUDA_ARCH__
#else
#define FUSEDLOSS_CUDA_ARCH 0
#endif

namespace fusedloss::cuda {

constexpr int kWarp = 32;  // threads
constexpr int kWarpShift = 5;
constexpr int kVectorBytes = 16;  // the most that one instruction loads or stores

// The shared memory that a launch requests.
extern __shared__ uint4 dynamic_shared_memory[];

struct LaunchShape {
  dim3 grid = 1, block = 1;
  int cluster = 1;           // blocks
  int64_t shared_bytes = 0;  // of dynamic_shared_memory
  bool overlaps = false;     // may start before the previous launch has ended: see wait_for_launch_before
};

// Programmatic dependent launch. If a kernel is launched with `overlaps`, its blocks may start as soon as all blocks of
// the previous launch have called let_next_launch_start or have ended. In wait_for_launch_before the kernel waits until
// the previous launch has ended and its writes are visible. Every block of every such kernel calls it: then the end of
// a launch implies that all launches before it have ended, too.
// Before this call, a kernel may only read what the previous launch does not write, and only write what the previous
// launch does not access. It may read what still earlier launches wrote if the previous launch had no `overlaps`. This
// lets the rows' kernels read logits and targets while sum_target_weights runs.
__device__ __forceinline__ void let_next_launch_start() {
#if FUSEDLOSS_CUDA_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_launch_before() {
#if FUSEDLOSS_CUDA_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifndef FUSEDLOSS_LAUNCH
// A launch's configuration for the CUDA runtime.
struct LaunchConfig {
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(const LaunchShape& shape, cudaStream_t stream) {
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = size_t(shape.shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (shape.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {unsigned(shape.cluster), 1, 1};
    }
    if (shape.overlaps) {
      cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
      overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      overlap.val.programmaticStreamSerializationAllowed = 1;
    }
#if CUDART_VERSION >= 13000
    // Request the largest shared memory carveout: by default, the driver may leave shared memory for fewer blocks than
    // the registers allow. Kernels that need little shared memory are better off with a large L1 cache.
    if (shape.shared_bytes > 8 * 1024) {
      cudaLaunchAttribute& carveout = attributes[config.numAttrs++];
      carveout.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
      carveout.val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
    }
#endif
  }
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  const LaunchConfig launch(shape, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, Parameters(arguments)...);
}

// How many blocks of such a launch the current device can hold at once. The runtime is queried once for each kind of
// launch. That query also raises the kernel's limit of dynamic shared memory, which must happen before the kernel is
// launched with more than 48 KB.
template <typename... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), const LaunchShape& shape, int64_t& answer) {
  static std::mutex one_at_a_time;
  static std::map<std::tuple<int, const void*, unsigned, int64_t, int>, int64_t> answers;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto kind = std::make_tuple(device, reinterpret_cast<const void*>(kernel),
                                    shape.block.x * shape.block.y * shape.block.z, shape.shared_bytes, shape.cluster);
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (const auto known = answers.find(kind); known != answers.end()) {
    answer = known->second;
    return error;
  }
  int count = 0, multiprocessors = 0;
  cudaFuncAttributes now = {};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&now, kernel);
  if (error == cudaSuccess && shape.shared_bytes > now.maxDynamicSharedSizeBytes)  // never lower it
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
  if (error == cudaSuccess && shape.cluster > 1) {
    const LaunchConfig launch(shape, nullptr);
    error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
    answer = int64_t(count) * shape.cluster;
  } else if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, int(std::get<2>(kind)),
                                                          size_t(shape.shared_bytes));
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    answer = int64_t(count) * multiprocessors;
  }
  if (error == cudaSuccess) answers[kind] = answer;
  return error;
}
#else
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t,
                   const Arguments&... arguments) {
  return FUSEDLOSS_LAUNCH(kernel, shape, arguments...);
}

template <typename... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), const LaunchShape& shape, int64_t& answer) {
  answer = FUSEDLOSS_PREPARE(kernel, shape);
  return cudaSuccess;
}
#endif

constexpr int64_t kReservedSharedBytes = 7 * 1024;  // per block, for the system and the kernel

// kernel: any kernel of this build.
inline cudaError_t query_device(int device, const void* kernel, CudaTuning& answer) {
  cudaError_t error = cudaSuccess;
  const auto query = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
    return int64_t(value);
  };
  answer.multiprocessors = query(cudaDevAttrMultiProcessorCount);
  // Half of it, so that two blocks fit and one loads while the other stores. Each loses the reserved bytes.
  const int64_t half = query(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2;
  const int64_t most = query(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  answer.kept_bytes = (half < most ? half : most) - kReservedSharedBytes;
  // The driver may have compiled the kernels from PTX for an older GPU, without the code for clusters and overlap.
  cudaFuncAttributes compiled = {};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, kernel);
  const bool is_hopper = query(cudaDevAttrComputeCapabilityMajor) >= 9 && compiled.ptxVersion >= 90;
  answer.cluster_blocks = is_hopper ? 8 : 1;
  answer.overlap = is_hopper;
  return error;
}

// Replaces zeros in the tuning by the current device's values, and turns overlap off where the device lacks it.
inline cudaError_t complete(CudaTuning& tuning, const void* kernel) {
  static std::mutex one_at_a_time;
  static std::map<int, CudaTuning> answers;  // by device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const auto [answer, is_new] = answers.try_emplace(device);
  if (is_new) error = query_device(device, kernel, answer->second);
  if (error != cudaSuccess) {
    answers.erase(answer);
    return error;
  }
  if (tuning.multiprocessors == 0) tuning.multiprocessors = answer->second.multiprocessors;
  if (tuning.kept_bytes == 0) tuning.kept_bytes = answer->second.kept_bytes;
  if (tuning.cluster_blocks == 0) tuning.cluster_blocks = answer->second.cluster_blocks;
  tuning.overlap = tuning.overlap != 0 && answer->second.overlap != 0;
  return cudaSuccess;
}

// The shape of a launch that waits for the previous launch of this library.
template <typename Options>
LaunchShape after_launch(const Options& o, unsigned grid, dim3 block) {
  LaunchShape shape = {grid, block};
  shape.overlaps = o.tuning.overlap != 0;
  return shape;
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// The most blocks for a backward pass whose gradient may be ready: usually there is nothing left to do, and many blocks
// would take long to find that out.
constexpr int64_t kReadyGradientBlocks = 264;

// Calls f with a value of the type that dtype names: on_dtype(dtype, [&](auto zero) { using T = decltype(zero); … }).
template <typename F>
auto on_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64: return f(double());
    case DType::kBFloat16: return f(__nv_bfloat16());
    case DType::kFloat16: return f(__half());
    default: return f(float());
  }
}

}  // namespace fusedloss::cuda
