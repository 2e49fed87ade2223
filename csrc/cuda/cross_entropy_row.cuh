// A row of logits as the threads that share it see it: its target, the tiles it is swept in, what a sweep adds to the
// row's statistics, and its gradient.
#pragma once

#include "cuda/cross_entropy_plan.h"
#include "cuda/grad_output.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace fusedloss::cuda {

// What a kernel is given.
template <typename T>
struct Problem : CrossEntropyOptions {
  using A = Statistic<T>;

  explicit Problem(const CrossEntropyOptions& o, const RowPlan& p)
      : CrossEntropyOptions(o), plan(p), smoothing(make_smoothing<A>(o.label_smoothing, o.classes)) {}

  RowPlan plan;
  Smoothing<A> smoothing;

  __device__ __forceinline__ int64_t rows() const { return outer * inner; }
  // -1 where there is none: the target is ignored or, behind an assert, out of range.
  __device__ __forceinline__ int target_class(int64_t row) const {
    const int64_t index = target_index[row];
    return index == ignore_index || index < 0 || index >= classes ? -1 : int(index);
  }
  __device__ __forceinline__ A weight_of(int c) const { return weight ? static_cast<const A*>(weight)[c] : A(1); }
  __device__ __forceinline__ A sum_of_weights() const {
    return weight_sum ? *static_cast<const A*>(weight_sum) : A(classes);
  }
};

// kSpread: the target distribution q is not 0 outside the target class, for there are probabilities or there is label
// smoothing.
template <typename T, bool kSpread>
struct Row {
  using A = Statistic<T>;

  const Problem<T>& o;
  const int64_t number;
  const int64_t outer, inner;  // its position
  const T* const logits;       // [classes]
  const T* const probability;  // [classes]; null for a class index
  T* const grad;               // [classes]; null if it is not wanted
  const int y;                 // the target class; -1 for probabilities, and where there is none
  const A w_y;                 // its weight

  __device__ __forceinline__ Row(const Problem<T>& problem, int64_t row)
      : o(problem),
        number(row),
        outer(o.inner == 1 ? row : row / o.inner),
        inner(row - outer * o.inner),
        logits(at(o.logits, o.logits_strides)),
        probability(kSpread && o.target_probability ? at(o.target_probability, o.target_strides) : nullptr),
        grad(o.grad_logits ? const_cast<T*>(at(o.grad_logits, o.grad_strides)) : nullptr),
        y(kSpread && o.target_probability ? -1 : o.target_class(row)),
        w_y(y < 0 ? A(0) : o.weight_of(y)) {}

  // The row's first element in a tensor like the logits.
  __device__ __forceinline__ const T* at(const void* tensor, const Strides& strides) const {
    return static_cast<const T*>(tensor) + (outer * strides.outer + inner * strides.inner);
  }
  __device__ __forceinline__ bool has_probabilities() const { return kSpread && probability != nullptr; }
  // If not, the row adds nothing and is not even read.
  __device__ __forceinline__ bool counts() const { return has_probabilities() || y >= 0; }
};

// A thread's part of the classes of a row that several threads share.
template <typename T, bool kSpread>
__device__ __forceinline__ Share<T> share_of(const Row<T, kSpread>& row, int thread, int threads) {
  return {split(int(row.o.classes), row.logits, row.probability, row.grad), thread, threads};
}

// What a thread keeps of its part in shared memory, from the first sweep to the second: its first packs. Nobody else
// reads them, so no barrier is needed.
struct Kept {
  int packs;

  static __device__ __forceinline__ uint4& pack(int i) {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    return dynamic_shared_memory[i * threads + thread];
  }
};

// What a thread holds of a row at a time: kPacks packs of kWidth neighbouring classes.
template <typename T, bool kSpread, int kWidth, int kPacks>
struct Tile {

  Pack<T, kWidth> x[kPacks];
  Pack<T, kWidth> t[kPacks];  // probabilities only
  int first[kPacks];          // class of a pack's first element; -1 behind the row's end

  static __device__ __forceinline__ int count(const Share<T>& share) {
    const int units = share.template units<kWidth>() - share.thread, step = kPacks * share.step;
    return (units + step - 1) / step;  // units may be negative, and more than -step
  }

  // A share's tile; with kWidth = 1 the classes may lie apart.
  __device__ __forceinline__ Tile(const Row<T, kSpread>& row, const Share<T>& share, int number, const Kept& kept) {
    const int units = share.template units<kWidth>();
    int unit = share.thread + number * kPacks * share.step;
#pragma unroll
    for (int k = 0; k < kPacks; ++k, unit += share.step)
      first[k] = unit < units ? share.template first<kWidth>(unit) : -1;
    if constexpr (kWidth > 1) {
      if (number * kPacks < kept.packs) take(row, number);
      else load_all(row);
    } else {
      load_all(row);
    }
  }

  __device__ __forceinline__ void load_all(const Row<T, kSpread>& row) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first[k] >= 0) x[k] = load<kWidth>(row.logits + offset(first[k], row.o.logits_strides));
    if (!row.has_probabilities()) return;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first[k] >= 0) t[k] = load<kWidth>(row.probability + offset(first[k], row.o.target_strides));
  }

  __device__ __forceinline__ void keep(const Row<T, kSpread>& row, int number) const {
    const int place = number * kPacks, step = row.has_probabilities() ? 2 : 1;
    for_each_pack([&](int k) {
      Kept::pack(step * (place + k)) = x[k].as_vector();
      if (row.has_probabilities()) Kept::pack(step * (place + k) + 1) = t[k].as_vector();
    });
  }
  __device__ __forceinline__ void take(const Row<T, kSpread>& row, int number) {
    const int place = number * kPacks, step = row.has_probabilities() ? 2 : 1;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (first[k] < 0) continue;
      x[k].from_vector(Kept::pack(step * (place + k)));
      if (row.has_probabilities()) t[k].from_vector(Kept::pack(step * (place + k) + 1));
    }
  }
  static __device__ __forceinline__ int64_t offset(int c, const Strides& strides) {
    return kWidth == 1 ? c * strides.classes : c;
  }

  template <typename F>
  __device__ __forceinline__ void for_each_pack(F f) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first[k] >= 0) f(k);
  }
  // Calls f(k, j) for every class held: element j of pack k.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    for_each_pack([&](int k) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) f(k, j);
    });
  }

  // q of class (k, j); for a class index, without what the target class has above the others: kept * w_y.
  __device__ __forceinline__ Statistic<T> coefficient(const Row<T, kSpread>& row, int k, int j) const {
    if constexpr (!kSpread) return 0;
    const auto w = row.o.weight_of(first[k] + j);
    return row.has_probabilities() ? probability_coefficient(t[k][j], w, row.o.smoothing)
                                   : math::product(row.o.smoothing.uniform, w);
  }
};

// ---- The first sweep: statistics

// Adds a thread's share of the row to its statistics, and keeps what there is room for.
template <int kWidth, int kPacks, typename T, bool kSpread, typename A>
__device__ __forceinline__ void absorb(RowState<A>& state, const Row<T, kSpread>& row, const Share<T>& share,
                                       const Kept& kept) {
  using RowTile = Tile<T, kSpread, kWidth, kPacks>;
  const int tiles = RowTile::count(share);
#pragma unroll 1
  for (int number = 0; number < tiles; ++number) {
    const RowTile tile(row, share, number, Kept{0});
    if constexpr (kWidth > 1)
      if (number * kPacks < kept.packs) tile.keep(row, number);
    A max = state.max;
    tile.for_each([&](int k, int j) { max = math::max(max, tile.x[k][j]); });
    A sum = 0, dot = 0, mass = 0;  // of the tile: short sums first round less
    tile.for_each([&](int k, int j) {
      const A x = tile.x[k][j] - shift(max), q = tile.coefficient(row, k, j);
      sum += math::exp(x);
      if (kSpread) dot += q * x;
      if (kSpread) mass += q;
    });
    state = rescale(state, max);
    state.sum += sum;
    if (kSpread) state.dot += dot;
    if (kSpread) state.mass += mass;
  }
}

// ---- The second sweep: the gradient
//
//   d loss/dx_c = scale * exp(x_c - max) - q_c      scale = sum(q) / sum(exp(x - max))
//
// times grad_output, which the mean divides by total_weight.

template <typename A>
struct RowGradient {
  A max, scale, grad_output;
  A q_y;  // what q has at a target class above the others: kept * w_y
};

template <typename T, bool kSpread, typename A>
__device__ __forceinline__ A scale_of(const Row<T, kSpread>& row, const RowState<A>& state) {
  const A mass = row.has_probabilities() ? state.mass
                 : kSpread               ? index_mass(row.w_y, row.o.sum_of_weights(), row.o.smoothing)
                                         : row.w_y;
  return mass / state.sum;
}

template <typename T, bool kSpread, typename A>
__device__ __forceinline__ RowGradient<A> row_gradient(const Row<T, kSpread>& row, A max, A scale) {
  const Problem<T>& o = row.o;
  A g = grad_output_at<T>(o, row.number);
  if (o.reduction == Reduction::kMean) g = divide_by_total_weight(g, *static_cast<const A*>(o.total_weight));
  return {max, scale, g, math::product(o.smoothing.kept, row.w_y)};
}

// Writes a thread's share of the gradient: what was kept last, while the cache may still hold what was not kept.
template <int kWidth, int kPacks, typename T, bool kSpread, typename A>
__device__ __forceinline__ void write_gradient(const Row<T, kSpread>& row, const RowGradient<A>& of_row,
                                               const Share<T>& share, const Kept& kept) {
  using RowTile = Tile<T, kSpread, kWidth, kPacks>;
#pragma unroll 1
  for (int number = RowTile::count(share) - 1; number >= 0; --number) {
    const RowTile tile(row, share, number, kept);
    tile.for_each_pack([&](int k) {
      A values[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const A q = tile.coefficient(row, k, j) + (j == row.y - tile.first[k] ? of_row.q_y : 0);
        values[j] = logit_gradient(math::exp(tile.x[k][j] - of_row.max), of_row.scale, q, of_row.grad_output);
      }
      store_values(row.grad + RowTile::offset(tile.first[k], row.o.grad_strides), values);
    });
  }
}

// For a row that does not count: zeros, even where its logits are NaN.
template <int kWidth, typename T, bool kSpread>
__device__ __forceinline__ void write_zeros(const Row<T, kSpread>& row, const Share<T>& share) {
  const Statistic<T> zeros[kWidth] = {};
#pragma unroll 1
  for (int unit = share.thread; unit < share.template units<kWidth>(); unit += share.step)
    store_values(row.grad + Tile<T, kSpread, kWidth, 1>::offset(share.template first<kWidth>(unit), row.o.grad_strides),
                 zeros);
}

}  // namespace fusedloss::cuda
