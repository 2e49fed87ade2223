// The gradient of columns: what it needs of each row, which is in shared memory or in the registers of the row's only
// thread, and how a thread writes it.
#pragma once

#include "kernels/cuda/cross_entropy_column_exchange.cuh"
#include "kernels/cuda/cross_entropy_column_tiles.cuh"
#include "kernels/cuda/cross_entropy_row_loss.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

// Values in place of the target class. kNoContribution: the row does not contribute, and its gradient is 0.
// kNoTargetHere: the block or thread does not have the target class.
constexpr int kNoContribution = -2, kNoTargetHere = -1;

// The thread, among those of a row in its block, that has class c. A block's first class is a multiple of their number.
template <typename T>
__device__ __forceinline__ int thread_of_class(const TypedOptions<T>& o, int c) {
  return c & ((1 << o.plan.threads_shift) - 1);
}

// The logit of the target class, where the block has this class. If there are slots, it is read from those of the
// thread that has the class.
template <int kWidth, bool kMayBeStaged, typename T, TargetKind kTarget>
__device__ __forceinline__ T logit_of_target(const RowTarget<T, kTarget>& row, unsigned row_of_block) {
  const TypedOptions<T>& o = row.o;
  if constexpr (kMayBeStaged) {
    if (o.plan.slots > 0) {
      const int vector = row.y >> o.plan.threads_shift;
      const int thread = thread_of_class(o, row.y) * int(blockDim.x) + row_of_block / kWidth;
      const Slots<T, kTarget> slots(o, thread);
      return reinterpret_cast<const T*>(&slots.logits(vector))[row_of_block % kWidth];
    }
  }
  const ColumnPosition<T> position(o, row.number);
  return static_cast<const T*>(o.logits)[position.in(o.logits_strides) + row.y * o.logits_strides.classes];
}

// Prefetches the cache line of p into the second-level cache. No thread waits for it.
__device__ __forceinline__ void prefetch_to_l2(const int64_t* p) {
#if FUSEDLOSS_CUDA_ARCH
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Stores in shared memory what the gradient needs of a row. is_here: this block has the target class.
template <typename T, TargetKind kTarget, int kWidth, typename A>
__device__ __forceinline__ void store_gradient_factors(const ColumnSharedMemory<T, kTarget, kWidth>& memory, int set,
                                                       int place, const RowTarget<T, kTarget>& row, A max, A scale,
                                                       A grad_output, bool is_here, T x_y) {
  memory.at(set, 0, place) = max;
  memory.at(set, 1, place) = is_spread(kTarget) ? scale : scale * grad_output;
  if constexpr (is_spread(kTarget)) memory.at(set, 2, place) = grad_output;
  memory.y[place] = !row.contributes() ? kNoContribution : is_here ? row.y : kNoTargetHere;
  if (row.y < 0 || !is_here) return;
  const A e = math::exp_nonpositive(A(widen(x_y)) - max);
  memory.of_target[place] = narrow<T>(logit_gradient(e, scale, row.coefficient(), grad_output));
}

// Stores kWidth neighbouring values, with 0 for rows that do not contribute, even if their logits are NaN.
template <typename T, int kWidth>
struct ContributingRows {
  uint32_t mask[kWidth == 1 ? 1 : 4] = {};

  __device__ __forceinline__ void add(int row) {
    if constexpr (sizeof(T) == 8 && kWidth > 1) mask[2 * row] = mask[2 * row + 1] = ~0u;
    else if constexpr (sizeof(T) == 2 && kWidth > 1) mask[row / 2] |= 0xffffu << row % 2 * 16;
    else mask[row] = ~0u;
  }
  __device__ __forceinline__ void store(T* p, const AccumulateType<T> (&values)[kWidth]) const {
    if constexpr (kWidth == 1) {
      *p = mask[0] ? narrow<T>(values[0]) : T();
    } else {
      const uint4 v = narrow_vector<T, kWidth>(values).as_uint4();
      store_vector(p, {v.x & mask[0], v.y & mask[1], v.z & mask[2], v.w & mask[3]});
    }
  }
};

// What the gradient needs of a thread's i-th row, as store_gradient_factors has stored it.
template <typename T, TargetKind kTarget, int kWidth>
struct FactorsInSharedMemory {
  using A = AccumulateType<T>;

  const ColumnSharedMemory<T, kTarget, kWidth>& memory;
  int set;

  __device__ __forceinline__ int place(int i) const { return memory.place(threadIdx.x, i); }
  __device__ __forceinline__ A max(int i) const { return memory.at(set, 0, place(i)); }
  __device__ __forceinline__ A factor(int i) const { return memory.at(set, 1, place(i)); }
  __device__ __forceinline__ A grad_output(int i) const { return memory.at(set, 2, place(i)); }
  __device__ __forceinline__ bool contributes(int i) const { return memory.y[place(i)] != kNoContribution; }
  // The target class, if it is one of the thread's own classes.
  __device__ __forceinline__ int target(const ThreadColumns<T, kTarget, kWidth>& rows, int i) const {
    const int y = memory.y[place(i)];
    return y >= 0 && thread_of_class(rows.o, y) == int(threadIdx.y) ? y : kNoTargetHere;
  }
  __device__ __forceinline__ T of_target(int i) const { return memory.of_target[place(i)]; }
};

// The same in the registers of a thread that does not share its rows.
template <typename T, TargetKind kTarget, int kWidth>
struct FactorsInRegisters {
  using A = AccumulateType<T>;

  A maxima[kWidth], factors[kWidth], common_grad_output;
  int targets[kWidth];
  T of_targets[kWidth];

  __device__ __forceinline__ A max(int i) const { return maxima[i]; }
  __device__ __forceinline__ A factor(int i) const { return factors[i]; }
  __device__ __forceinline__ A grad_output(int) const { return common_grad_output; }
  __device__ __forceinline__ bool contributes(int i) const { return targets[i] != kNoContribution; }
  __device__ __forceinline__ int target(const ThreadColumns<T, kTarget, kWidth>&, int i) const { return targets[i]; }
  __device__ __forceinline__ T of_target(int i) const { return of_targets[i]; }

  __device__ __forceinline__ void prepare(int i, const RowTarget<T, kTarget>& row, const RowResult<A>& finished,
                                          T x_y) {
    maxima[i] = finished.max;
    factors[i] = is_spread(kTarget) ? finished.scale : finished.scale * common_grad_output;
    targets[i] = row.contributes() ? row.y : kNoContribution;
    const A e = math::exp_nonpositive(A(widen(x_y)) - finished.max);
    of_targets[i] = narrow<T>(logit_gradient(e, finished.scale, row.coefficient(), common_grad_output));
  }
};

// Writes the gradient of a thread's classes. The target class is written after the others, by the thread that has it.
template <bool kFromSlots, typename T, TargetKind kTarget, int kWidth, typename Factors>
__device__ __forceinline__ void write_columns(const ThreadColumns<T, kTarget, kWidth>& rows, const Factors& factors) {
  using A = AccumulateType<T>;
  constexpr int kVectors = kColumnTileVectors<is_spread(kTarget)> / 2;
  A max[kWidth], factor[kWidth], grad_output[kWidth];
  ContributingRows<T, kWidth> contributing;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    max[i] = factors.max(i);
    factor[i] = factors.factor(i);
    if constexpr (is_spread(kTarget)) grad_output[i] = factors.grad_output(i);
    if (factors.contributes(i)) contributing.add(i);
  }
  const int64_t stride = rows.o.grad_strides.classes;
  on_spread<kTarget>(rows.o, [&](auto spread) {
    for_each_tile<kVectors, /*kReverse=*/true, kFromSlots>(
        rows, [](int) {},
        [&](const auto& tile) {
          T* p = rows.grad + tile.first * stride;
          const int64_t step = stride << rows.shift;
          tile.for_each_vector([&](int k) {
            const A w = is_weighted(decltype(spread)::value) ? rows.o.weight_of(tile.class_of(rows, k)) : A(1);
            A values[kWidth];
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              const A e = math::exp_nonpositive(tile.x[k][i] - max[i]);
              if constexpr (is_spread(kTarget)) {
                const A q = tile.template coefficient<decltype(spread)::value>(rows.o, k, i, w);
                values[i] = logit_gradient(e, factor[i], q, grad_output[i]);
              } else {
                values[i] = e * factor[i];
              }
            }
            contributing.store(p + k * step, values);
          });
        });
  });
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int y = factors.target(rows, i);
    if (y < 0) continue;
    const int64_t in_row = kWidth == 1 ? 0 : i;  // a thread's neighbouring rows are neighbouring elements
    rows.grad[in_row + y * stride] = factors.of_target(i);
  }
}

}  // namespace fusedloss::cuda
