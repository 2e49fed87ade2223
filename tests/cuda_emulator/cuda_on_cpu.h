// Lets g++ compile a .cu file for the CPU: defines CUDA's keywords, built-in variables and device functions in terms of
// the emulator's runtime. It is included before the first line of the .cu file, which is otherwise compiled unchanged.
//
// The types and the conversions of bfloat16 and float16 are the toolkit's own. Only functions that the project's
// kernels can reasonably use are defined here. A kernel that uses another one does not compile until it is added.
#pragma once

#define FUSEDLOSS_CUDA_ON_CPU  // formulas then use the GPU's functions: see kernels/device_math-inl.h

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

// The launchers, which the extension links to. Their first declaration decides that they are visible.
#pragma GCC visibility push(default)
#include "kernels/cuda/cross_entropy_cuda.h"
#include "kernels/cuda/nll_loss_cuda.h"
#include "kernels/cuda/pointwise_cuda.h"
#pragma GCC visibility pop

// Marks code that belongs to the emulator, not to the kernel: its own loads and stores are not checked.
#define EMULATOR_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))

// ---- Keywords

#undef __shared__
#undef __launch_bounds__
#undef __device__
#undef __host__
#undef __global__
#undef __forceinline__
// One copy for each OS thread, of which there is only one. All shared memory of a library then lies in one known place,
// its thread-local segment. Within a function, thread_local implies static, as __shared__ does.
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline

// ---- What the emulator implements: see runtime.h

enum WarpOp { kSyncWarp, kShuffle, kBallot };

struct SourceLine {
  const char* file;
  int line;
};
// As a default argument, it holds the line of the call.
// clang-format off
#define EMULATOR_CALLER SourceLine{__builtin_FILE(), __builtin_LINE()}
// clang-format on

extern "C" {
// Constant during the life of a CUDA thread and therefore declared const, so that the compiler may keep them in
// registers. The scheduler writes them under their other names whenever it switches threads.
extern const uint3 threadIdx __asm__("emulator_thread_idx"), blockIdx __asm__("emulator_block_idx");
extern const dim3 blockDim __asm__("emulator_block_dim"), gridDim __asm__("emulator_grid_dim");

// Which bug of planted_bugs.py is active; 0 is none.
extern const int planted_bug __asm__("emulator_planted_bug");

int emulator_block_barrier(int predicate, SourceLine caller);  // -> how many threads came with a predicate != 0
void emulator_cluster_barrier(SourceLine caller);
void emulator_start_arrivals(const void* barrier, SourceLine caller);
void emulator_expect_arrivals(const void* barrier, unsigned bytes, SourceLine caller);
void emulator_send(unsigned rank, const void* place, uint4 piece, const void* barrier, SourceLine caller);
void emulator_wait_for_arrivals(const void* barrier, unsigned parity, SourceLine caller);
uint64_t emulator_warp_op(WarpOp op, unsigned mask, uint64_t value, int source_lane, SourceLine caller);
void emulator_fence();
void emulator_copy_later(void* to, const void* from, size_t size);
void emulator_commit_copies();
// Removes the oldest copy that has not been done, unless it belongs to the last `groups` groups; -> its bytes, or 0.
size_t emulator_next_copy(size_t groups, void** to, const void** from);
void emulator_before_atomic(void* p, int size);
// Permits launches of the kernel with this much shared memory; -> how many blocks the device can hold at once.
int64_t emulator_prepare(const void* kernel, size_t shared_bytes, unsigned cluster);
cudaError_t emulator_launch(const void* kernel, dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                            void (*thread)(void*), void* arguments, size_t size);
}

// ---- Launch

// Takes the place of cudaLaunchKernelEx. A cluster has that many blocks along x.
template <typename... Parameters, typename... Arguments>
EMULATOR_UNCHECKED cudaError_t launch_on_cpu(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                                             size_t shared_bytes, const Arguments&... values) {
  struct KernelCall {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call = {kernel, std::tuple<Parameters...>(values...)};
  const auto thread = [](void* p) EMULATOR_UNCHECKED {
    const KernelCall* call = static_cast<KernelCall*>(p);
    std::apply(call->kernel, call->arguments);
  };
  return emulator_launch(reinterpret_cast<const void*>(kernel), grid, block, cluster, shared_bytes, thread, &call,
                         sizeof call);
}
#define FUSEDLOSS_PREPARE(kernel, shape) \
  emulator_prepare(reinterpret_cast<const void*>(kernel), size_t((shape).shared_bytes), unsigned((shape).cluster))
#define FUSEDLOSS_LAUNCH(kernel, shape, ...)                                                                  \
  launch_on_cpu(kernel, (shape).grid, (shape).block, unsigned((shape).cluster), size_t((shape).shared_bytes), \
                __VA_ARGS__)

// ---- Barriers and warps

constexpr int warpSize = 32;

inline void __syncthreads(SourceLine caller = EMULATOR_CALLER) { emulator_block_barrier(0, caller); }
inline int __syncthreads_count(int p, SourceLine caller = EMULATOR_CALLER) {
  return emulator_block_barrier(p != 0, caller);
}
inline int __syncthreads_or(int p, SourceLine caller = EMULATOR_CALLER) {
  return emulator_block_barrier(p != 0, caller) != 0;
}
inline int __syncthreads_and(int p, SourceLine caller = EMULATOR_CALLER) {
  return emulator_block_barrier(p == 0, caller) == 0;
}
inline void __threadfence() { emulator_fence(); }

// Waiting does both here: the kernels do nothing between arriving and waiting.
inline void __cluster_barrier_arrive() {}
inline void __cluster_barrier_wait(SourceLine caller = EMULATOR_CALLER) { emulator_cluster_barrier(caller); }

// In place of the functions in cluster.cuh, which are inline PTX.
template <int kCount>
void start_arrivals(uint64_t (&barriers)[kCount], SourceLine caller = EMULATOR_CALLER) {
  for (uint64_t& barrier : barriers) emulator_start_arrivals(&barrier, caller);
}
inline const uint64_t* shared_address(const uint64_t* barrier) { return barrier; }
inline void expect_arrivals(const uint64_t* barrier, unsigned bytes, SourceLine caller = EMULATOR_CALLER) {
  emulator_expect_arrivals(barrier, bytes, caller);
}
inline void send_to_block(int rank, const uint4* place, uint4 piece, const uint64_t* barrier,
                          SourceLine caller = EMULATOR_CALLER) {
  emulator_send(unsigned(rank), place, piece, barrier, caller);
}
inline void wait_for_arrivals(const uint64_t* barrier, unsigned parity, SourceLine caller = EMULATOR_CALLER) {
  emulator_wait_for_arrivals(barrier, parity, caller);
}

inline int emulator_lane() {
  return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

template <typename T>
EMULATOR_UNCHECKED T emulator_shuffle(unsigned mask, T value, int source_lane, SourceLine caller) {
  static_assert(sizeof(T) <= 8, "the GPU shuffles at most 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = emulator_warp_op(kShuffle, mask, bits, source_lane, caller);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// A lane whose source would lie outside its group of `width` lanes keeps its own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SourceLine caller = EMULATOR_CALLER) {
  return emulator_shuffle(mask, value, (emulator_lane() & ~(width - 1)) | (lane & (width - 1)), caller);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SourceLine caller = EMULATOR_CALLER) {
  const int lane = emulator_lane(), source = lane ^ bits;
  return emulator_shuffle(mask, value, source / width > lane / width ? lane : source, caller);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SourceLine caller = EMULATOR_CALLER) {
  const int lane = emulator_lane(), source = lane + int(delta);
  return emulator_shuffle(mask, value, source / width != lane / width ? lane : source, caller);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SourceLine caller = EMULATOR_CALLER) {
  const int lane = emulator_lane(), source = lane - int(delta);
  return emulator_shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, caller);
}
inline void __syncwarp(unsigned mask = ~0u, SourceLine caller = EMULATOR_CALLER) {
  emulator_warp_op(kSyncWarp, mask, 0, 0, caller);
}
inline unsigned __ballot_sync(unsigned mask, int p, SourceLine caller = EMULATOR_CALLER) {
  return unsigned(emulator_warp_op(kBallot, mask, p != 0, 0, caller));
}
inline int __any_sync(unsigned mask, int p, SourceLine caller = EMULATOR_CALLER) {
  return emulator_warp_op(kBallot, mask, p != 0, 0, caller) != 0;
}
inline int __all_sync(unsigned mask, int p, SourceLine caller = EMULATOR_CALLER) {
  return emulator_warp_op(kBallot, mask, p == 0, 0, caller) == 0;
}

// ---- Integers

// The upper word of both, after a shift to the left by the last five bits of `shift`.
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }

// ---- Asynchronous copies from global to shared memory
//
// A thread's copies are done when it waits for them, and no sooner. If a wait is missing, the old contents are read.

#define _CUDA_PIPELINE_PRIMITIVES_H_  // in place of the toolkit's header

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) { emulator_copy_later(to, from, size); }
inline void __pipeline_commit() { emulator_commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) {
  void* to;
  const void* from;
  while (const size_t size = emulator_next_copy(groups, &to, &from)) {
    if (size == 16) *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
    else if (size == 8) *static_cast<uint64_t*>(to) = *static_cast<const uint64_t*>(from);
    else *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
  }
}

// ---- Atomics: plain code suffices once the runtime has been told, since no other thread runs in between

template <typename T, typename F>
EMULATOR_UNCHECKED T emulator_atomic(T* p, F f) {
  emulator_before_atomic(p, sizeof(T));
  const T old = *p;
  *p = f(old);
  return old;
}
template <typename T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  return emulator_atomic(p, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicExch(T* p, std::common_type_t<T> value) {
  return emulator_atomic(p, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return emulator_atomic(p, [=](T old) { return old == expected ? value : old; });
}
