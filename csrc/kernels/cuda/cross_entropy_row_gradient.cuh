// The gradient of a row, from its statistics and its logits. A thread writes the classes that it has read:
//
//   d loss/dx_c = scale * exp(x_c - max) - q_c      scale = sum(q) / sum(exp(x - max))
//
// times grad_output, which the mean divides by total_weight.
#pragma once

#include <cstdint>

#include "kernels/cuda/cross_entropy_row.cuh"
#include "kernels/cuda/cross_entropy_shifted_stores.cuh"
#include "kernels/cuda/loss_values.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

// The values that the gradient of every class of a row depends on.
template <typename A>
struct GradientFactors {
  A max, scale, grad_output;
  A scale_times_grad_output, uniform_times_grad_output;
};

// grad_output must be scaled, see TypedOptions::scale_grad_output.
template <typename T, typename A>
__device__ __forceinline__ GradientFactors<A> gradient_factors(const TypedOptions<T>& o, A max, A scale,
                                                               A grad_output) {
  return {max, scale, grad_output, scale * grad_output, math::rounded_product(o.smoothing.uniform, grad_output)};
}

// grad_output times d loss/dx_c for a class of logit x.
template <typename A>
__device__ __forceinline__ A gradient_of(const GradientFactors<A>& factors, A x, A q) {
  return logit_gradient(math::exp_nonpositive(x - factors.max), factors.scale, q, factors.grad_output);
}

// Stores a vector's elements one by one, where their address is not aligned for a vector.
template <typename T, int kWidth>
__device__ __forceinline__ void store_elements(T* p, const Vector<T, kWidth>& vector) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) p[j] = narrow<T>(vector[j]);
}

// Writes the gradient of a tile as if none of its classes were the target class. One branch selects the kind of stores
// for the whole tile. From a branch around a few stores, the compiler would make predicates, and issue both kinds.
template <SpreadKind kKind, bool kShifted, typename T, TargetKind kTarget, int kWidth, int kVectors, bool kWhole,
          typename A>
__device__ __forceinline__ void write_tile(const Row<T, kTarget>& row, const GradientFactors<A>& factors,
                                           const RowTile<T, kTarget, kWidth, kVectors, kWhole>& tile, int number) {
  const ThreadRange<T>& range = tile.range;
  const auto vector_of = [&](int k) {
    A values[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if constexpr (kKind == SpreadKind::kNone || kKind == SpreadKind::kUniform) {
        values[j] = math::exp_nonpositive(tile.x[k][j] - factors.max) * factors.scale_times_grad_output;
        if (kKind == SpreadKind::kUniform) values[j] -= factors.uniform_times_grad_output;
      } else {
        values[j] = gradient_of(factors, A(tile.x[k][j]), tile.template coefficient<kKind>(row.o, k, j));
      }
    }
    return narrow_vector<T, kWidth>(values);
  };
  const auto place_of = [&](int k) { return row.grad + tile.offset(tile.first(k), row.o.grad_strides); };
  if constexpr (kWidth == 1 || !kShifted) {
    tile.for_each_vector([&](int k) { store(place_of(k), vector_of(k)); });
  } else {
    if (range.step_shift < kWarpShift) {  // a row of a few lanes: the warp's other rows may not reach this point
      tile.for_each_vector([&](int k) { store_elements(place_of(k), vector_of(k)); });
      return;
    }
    const int thread = opaque(int(threadIdx.y * blockDim.x + threadIdx.x));  // within the block
    const int lane = thread % kWarp, unit = range.thread - lane + (number * kVectors << range.step_shift);
    const auto start = reinterpret_cast<char*>(row.grad + range.template first<kWidth>(unit));
    const int bytes = int(reinterpret_cast<uintptr_t>(start) % kVectorBytes);
    const ShiftedVectors<T> vectors = {start - bytes,
                                       bytes,
                                       lane,
                                       thread / kWarp,
                                       kVectorBytes << range.step_shift,
                                       range.template units<kWidth>() - unit};
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      vectors.template store<kWhole>(k, tile.is_there(k) ? vector_of(k) : Vector<T, kWidth>());
    vectors.template store_edges<kWhole, kVectors>();
  }
}

// Writes the gradient of the tiles of a thread's range, in reverse order from the last one to number `first`. They are
// loaded from memory again, and the cache may still hold the last ones.
template <bool kShifted, int kWidth, int kVectors, typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void write_tiles(const Row<T, kTarget>& row, const GradientFactors<A>& factors,
                                            const ThreadRange<T>& range, int first = 0) {
  const auto tiles = RowTileCount::of<kWidth, kVectors>(range);
  on_spread<kTarget>(row.o, [&](auto spread) {
    constexpr SpreadKind kKind = decltype(spread)::value;
    int number = tiles.all - 1;
#pragma unroll 1
    for (; number >= tiles.whole && number >= first; --number)
      write_tile<kKind, kShifted>(row, factors, RowTile<T, kTarget, kWidth, kVectors, false>(row, range, number),
                                  number);
#pragma unroll 1
    for (; number >= first; --number)
      write_tile<kKind, kShifted>(row, factors, RowTile<T, kTarget, kWidth, kVectors, true>(row, range, number),
                                  number);
  });
}

// True if the row's target class is in this thread's range.
template <typename T, TargetKind kTarget>
__device__ __forceinline__ bool has_target(const Row<T, kTarget>& row, const ThreadRange<T>& range) {
  if (row.y < 0) return false;
  const int in_vectors = range.vectors * kVectorSize<T>, behind_head = row.y - range.head;
  const int unit = behind_head < 0             ? row.y
                   : behind_head >= in_vectors ? row.y - in_vectors
                                               : behind_head / kVectorSize<T>;
  return (unit & ((1 << range.step_shift) - 1)) == range.thread;
}

// Writes a thread's range of the gradient; write_vectors writes the vectors of the range. The target class is written
// after the others, because looking for it in every vector costs more. Its value is computed before them, so that the
// thread holds only one number for it. x_y is the logit of the target class. It must have been read before, because the
// gradient may overwrite the logits.
template <typename T, TargetKind kTarget, typename A, typename F>
__device__ __forceinline__ void write_gradient(const Row<T, kTarget>& row, const GradientFactors<A>& factors,
                                               const ThreadRange<T>& range, T x_y, F write_vectors) {
  const bool is_own_target = has_target(row, range);
  const T of_target = narrow<T>(gradient_of(factors, A(widen(x_y)), row.coefficient()));
  if (range.template units<1>() > 0) write_tiles<false, 1, kTileVectors<kTarget> / 2>(row, factors, range);
  write_vectors(factors);
  if (is_own_target) row.grad[row.y * row.o.grad_strides.classes] = of_target;
}

template <int kWidth, typename T, TargetKind kTarget>
__device__ __forceinline__ void write_zeros(const Row<T, kTarget>& row, const ThreadRange<T>& range) {
  const Vector<T, kWidth> zeros = {};
#pragma unroll 1
  for (int unit = range.thread; unit < range.template units<kWidth>(); unit += 1 << range.step_shift) {
    store(row.grad + range.template first<kWidth>(unit) * row.o.grad_strides.classes, zeros);
  }
}

// Writes zeros for a row that does not contribute, even if its logits are NaN. The logits are not read, so the vectors
// are aligned in the gradient instead.
template <typename T, TargetKind kTarget>
__device__ __forceinline__ void write_row_of_zeros(const Row<T, kTarget>& row, const ThreadRange<T>& range) {
  const ThreadRange<T> of_gradient = {vectorized_range(int(row.o.classes), row.grad), range.thread, range.step_shift};
  write_zeros<kVectorSize<T>>(row, of_gradient);
  write_zeros<1>(row, of_gradient);
}

// Writes a thread's range of any row's gradient, from the row's statistics and the logits in memory.
template <bool kShifted, typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void write_row(const Row<T, kTarget>& row, A max, A scale, const ThreadRange<T>& range) {
  if (!row.contributes()) return write_row_of_zeros(row, range);
  const A g = row.o.scale_grad_output(grad_output_at<T>(row.o, row.number));
  // Only the thread that writes the target class may read its logit, because the gradient may overwrite the logits.
  const T x_y = has_target(row, range) ? row.logits[row.y * row.o.logits_strides.classes] : T();
  write_gradient(row, gradient_factors(row.o, max, scale, g), range, x_y, [&](const GradientFactors<A>& factors) {
    write_tiles<kShifted, kVectorSize<T>, kTileVectors<kTarget> / 2>(row, factors, range);
  });
}

}  // namespace fusedloss::cuda
