// A row of logits as the threads that share it see it: its target, the tiles it is swept in, what a sweep adds to the
// row's statistics, and its gradient.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "kernels/cuda/cross_entropy_plan.h"
#include "kernels/cuda/cross_entropy_shifted.cuh"
#include "kernels/cuda/elementary.cuh"
#include "kernels/cuda/grad_output.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

// What a kernel is given.
template <typename T>
struct TypedOptions : CrossEntropyOptions {
  using A = AccumulateType<T>;

  explicit TypedOptions(const CrossEntropyOptions& o, const RowPlan& p)
      : CrossEntropyOptions(o), plan(p), smoothing(make_smoothing<A>(o.label_smoothing, o.classes)) {}

  RowPlan plan;
  Smoothing<A> smoothing;

  // -1 where there is none: the target is ignored or, behind an assert, out of range.
  __device__ __forceinline__ int class_of(int64_t index) const {
    return index == ignore_index || uint64_t(index) >= uint64_t(classes) ? -1 : int(index);
  }
  // What stands in the target for a row; something that is no class for probabilities, and behind the last row.
  __device__ __forceinline__ int64_t target_at(int64_t row) const {
    return target_index && row < plan.rows ? target_index[row] : -1;
  }
  // Slots that a thread has for each vector of logits: one more for the vector of probabilities.
  template <TargetKind kTarget>
  static constexpr int kSlotsOfVector = kTarget == TargetKind::kProbabilities ? 2 : 1;
  __device__ __forceinline__ A weight_of(int c) const { return weight ? static_cast<const A*>(weight)[c] : A(1); }
  __device__ __forceinline__ A weight_sum() const {
    const void* const sum = CrossEntropyOptions::weight_sum;
    return sum ? *static_cast<const A*>(sum) : A(classes);
  }
};

// What the target distribution has outside of the target class. A sweep is compiled for each: to ask at each class would
// cost as much as all else.
enum class SpreadKind { kNone, kUniform, kWeights, kProbabilities, kWeightedProbabilities };
FUSEDLOSS_ANYWHERE constexpr bool is_weighted(SpreadKind kind) {
  return kind == SpreadKind::kWeights || kind == SpreadKind::kWeightedProbabilities;
}
FUSEDLOSS_ANYWHERE constexpr bool is_of_probabilities(SpreadKind kind) {
  return kind == SpreadKind::kProbabilities || kind == SpreadKind::kWeightedProbabilities;
}

// Calls f(integral_constant of the SpreadKind).
template <TargetKind kTarget, typename T, typename F>
__device__ __forceinline__ void on_spread(const TypedOptions<T>& o, F f) {
  if constexpr (!is_spread(kTarget)) {
    f(std::integral_constant<SpreadKind, SpreadKind::kNone>());
  } else if constexpr (kTarget == TargetKind::kProbabilities) {
    if (o.weight != nullptr) f(std::integral_constant<SpreadKind, SpreadKind::kWeightedProbabilities>());
    else f(std::integral_constant<SpreadKind, SpreadKind::kProbabilities>());
  } else {
    if (o.weight != nullptr) f(std::integral_constant<SpreadKind, SpreadKind::kWeights>());
    else f(std::integral_constant<SpreadKind, SpreadKind::kUniform>());
  }
}

// What is asked of a row, wherever its logits lie.
template <typename T, TargetKind kTarget>
struct RowTarget {
  using A = AccumulateType<T>;

  const TypedOptions<T>& o;
  const int64_t number;
  const int y;  // the target class; -1 for probabilities, and where there is none
  const A w_y;  // its weight

  __device__ __forceinline__ RowTarget(const TypedOptions<T>& options, int64_t row, int target)
      : o(options), number(row), y(target), w_y(y < 0 ? A(0) : o.weight_of(y)) {}

  __device__ __forceinline__ bool has_probabilities() const { return kTarget == TargetKind::kProbabilities; }
  // If not, the row adds nothing. A row of some length is then not even read.
  __device__ __forceinline__ bool contributes() const { return has_probabilities() || y >= 0; }
  // q of the target class.
  __device__ __forceinline__ A coefficient() const {
    const A q = math::product(o.smoothing.kept, w_y);
    return is_spread(kTarget) ? q + math::product(o.smoothing.uniform, w_y) : q;
  }
};

template <typename T, TargetKind kTarget>
struct Row : RowTarget<T, kTarget> {
  using RowTarget<T, kTarget>::o;

  const int64_t outer;         // its position, if there are inner sizes
  const T* const logits;       // [classes]
  const T* const probability;  // [classes]; null for a class index
  T* const grad;               // [classes]; null if it is not wanted

  __device__ __forceinline__ Row(const TypedOptions<T>& options, int64_t row)
      : Row(options, row, options.class_of(options.target_at(row))) {}
  __device__ __forceinline__ Row(const TypedOptions<T>& options, int64_t row, int target)
      : RowTarget<T, kTarget>(options, row, target),
        outer(o.inner == 1 ? row : row / o.inner),
        logits(at(o.logits, o.logits_strides)),
        probability(kTarget == TargetKind::kProbabilities ? at(o.target_probability, o.target_strides) : nullptr),
        grad(o.grad_logits ? const_cast<T*>(at(o.grad_logits, o.grad_strides)) : nullptr) {}

  // The row's first element in a tensor like the logits.
  __device__ __forceinline__ const T* at(const void* tensor, const Strides& strides) const {
    const int64_t offset = outer * strides.outer;
    return static_cast<const T*>(tensor) +
           (o.inner == 1 ? offset : offset + (this->number - outer * o.inner) * strides.inner);
  }
};

// The logit of the target class, asked for before a sweep, so that nobody waits for it afterwards; and not widened, so
// that nobody waits for it beforehand.
template <typename T, TargetKind kTarget>
__device__ __forceinline__ T prefetch_target_logit(const Row<T, kTarget>& row) {
  return row.y < 0 ? T() : row.logits[row.y * row.o.logits_strides.classes];
}

// A thread's part of the classes of a row that several threads share; thread: its number among them. The vectors are those
// of the logits; where the gradient is aligned otherwise, as that of a slice of a padded vocabulary, only its stores are
// others: see cross_entropy_shifted.cuh.
template <typename T, TargetKind kTarget>
__device__ __forceinline__ ThreadRange<T> range_of_thread(const Row<T, kTarget>& row, int thread) {
  const auto elements = vectorized_range(int(row.o.classes), row.logits, row.probability);
  return {elements, thread, row.o.plan.threads_shift};
}

// Which of the blocks of its rows this one is, and how many groups of such blocks come before it.
__device__ __forceinline__ int rank_of_block(const RowPlan& plan) {
  return int(blockIdx.x & ((1u << plan.blocks_shift) - 1));
}
__device__ __forceinline__ int64_t group_of_block(const RowPlan& plan) { return blockIdx.x >> plan.blocks_shift; }

// A thread's own slots in shared memory, each for a vector. Nobody else reads or writes them, so no barrier is needed. Those
// of a warp lie together, and a thread's next slot a warp further on: a constant that instructions can contain.
struct Slots {
  uint4* own;

  // count: of each thread. The block has whole warps.
  explicit __device__ __forceinline__ Slots(int count) : Slots(count, int(threadIdx.y * blockDim.x + threadIdx.x)) {}
  __device__ __forceinline__ Slots(int count, int thread)
      : own(dynamic_shared_memory + thread / kWarp * (count * kWarp) + thread % kWarp) {}
  __device__ __forceinline__ uint4& operator[](int i) const { return own[i * kWarp]; }
};

// Waits for this thread's copies, but for the last `groups` groups of them. The toolkit's function alone does not keep the
// compiler from moving reads to before it.
__device__ __forceinline__ void wait_for_copies(int groups) {
  __pipeline_wait_prior(size_t(groups));
#if FUSEDLOSS_CUDA_ARCH
  asm volatile("" ::: "memory");
#endif
}

// What a thread holds of a row at a time: kVectors vectors of kWidth neighbouring classes. kWhole: all of them lie in the
// row, so that nothing stands between one vector's instructions and the next one's.
template <typename T, TargetKind kTarget, int kWidth, int kVectors, bool kWhole>
struct RowTile {
  Vector<T, kWidth> x[kVectors];
  Vector<T, kWidth> t[kTarget == TargetKind::kProbabilities ? kVectors : 1] = {};
  int begin;                       // unit of the first vector
  int count;                       // of vectors that lie in the row; kVectors or more if all of them do
  const ThreadRange<T>& range;

  // A share's tile, from memory; with kWidth = 1 the classes may lie apart.
  __device__ __forceinline__ RowTile(const Row<T, kTarget>& row, const ThreadRange<T>& range, int number)
      : range(range) {
    find(number);
    // What is not there is 0: a register that is left as it was would have to be kept from the round before.
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      x[k] = is_there(k) ? load<kWidth>(row.logits + offset(first(k), row.o.logits_strides)) : Vector<T, kWidth>();
    if (!row.has_probabilities()) return;
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      t[k] = is_there(k) ? load<kWidth>(row.probability + offset(first(k), row.o.target_strides)) : Vector<T, kWidth>();
  }

  // The same from a thread's slots, where a Stream has copied it; `place` is the first vector's.
  __device__ __forceinline__ RowTile(const Row<T, kTarget>& row, const ThreadRange<T>& range, int number, const Slots& slots,
                                  int place)
      : range(range) {
    find(number);
    constexpr int step = TypedOptions<T>::template kSlotsOfVector<kTarget>;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      x[k] = Vector<T, kWidth>();
      if (!is_there(k)) continue;
      x[k].from_uint4(slots[step * (place + k)]);
      if (row.has_probabilities()) t[k].from_uint4(slots[step * (place + k) + 1]);
    }
  }

  __device__ __forceinline__ void find(int number) {
    begin = range.thread + (number * kVectors << range.step_shift);
    count = (range.template units<kWidth>() - begin + (1 << range.step_shift) - 1) >> range.step_shift;
  }
  // The class of a vector's first element.
  __device__ __forceinline__ int first(int k) const {
    return range.template first<kWidth>(begin + (k << range.step_shift));
  }

  static __device__ __forceinline__ int64_t offset(int c, const Strides& strides) {
    return kWidth == 1 ? c * strides.classes : c;
  }
  __device__ __forceinline__ bool is_there(int k) const { return kWhole || k < count; }

  template <typename F>
  __device__ __forceinline__ void for_each_vector(F f) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if (is_there(k)) f(k);
  }

  // q of class (k, j), element j of vector k; for a class index, without what the target class has above the others:
  // kept * w_y.
  template <SpreadKind kKind>
  __device__ __forceinline__ AccumulateType<T> coefficient(const Row<T, kTarget>& row, int k, int j) const {
    const AccumulateType<T> w = is_weighted(kKind) ? row.o.weight_of(first(k) + j) : 1;
    return is_of_probabilities(kKind) ? probability_coefficient(t[k][j], w, row.o.smoothing)
                                      : math::product(row.o.smoothing.uniform, w);
  }
};

// A thread's tiles: `whole` ones, as many for every thread of the row, then one more that ends behind the row if there
// are more in all: of one thread of a warp, or of several; the others come along, for its stores may take shuffles. As many
// threads share a row as a power of two.
struct RowTileCount {
  int whole, all;

  template <int kWidth, int kVectors, typename T>
  static __device__ __forceinline__ RowTileCount of(const ThreadRange<T>& range) {
    const int units = range.template units<kWidth>(), whole = (units >> range.step_shift) / kVectors;
    return {whole, whole + ((range.thread & -kWarp) < units - (whole * kVectors << range.step_shift))};
  }
};

// ---- The first sweep: statistics

// Fewer roundings in a row, and fewer additions that wait for one another, than one after the other.
template <typename A, int kCount>
__device__ __forceinline__ A sum_of(A (&values)[kCount]) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
}

template <SpreadKind kKind, typename T, TargetKind kTarget, int kWidth, int kVectors, bool kWhole, typename A>
__device__ __forceinline__ void accumulate_tile(RowState<A>& state, const Row<T, kTarget>& row,
                                            const RowTile<T, kTarget, kWidth, kVectors, kWhole>& tile) {
  A max = state.max;
  tile.for_each_vector([&](int k) { max = math::max(max, tile.x[k].max()); });
  state = rescale(state, max);
  const A reference = shift(max);
  tile.for_each_vector([&](int k) {
    A e[kWidth], dot[kWidth], mass[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const A distance = tile.x[k][j] - reference;
      e[j] = math::exp(distance);
      if constexpr (is_spread(kTarget)) {
        mass[j] = tile.template coefficient<kKind>(row, k, j);
        dot[j] = mass[j] * distance;
      }
    }
    state.sum += sum_of(e);
    if constexpr (is_spread(kTarget)) {
      state.dot += sum_of(dot);
      state.mass += kKind == SpreadKind::kUniform ? row.o.smoothing.uniform * kWidth : sum_of(mass);
    }
  });
}

// Adds the tiles of a thread's range to its statistics, from number `first` on, as they come from memory.
template <int kWidth, int kVectors, typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void accumulate_tiles(RowState<A>& state, const Row<T, kTarget>& row, const ThreadRange<T>& range,
                                       int first = 0) {
  const auto tiles = RowTileCount::of<kWidth, kVectors>(range);
  on_spread<kTarget>(row.o, [&](auto spread) {
    constexpr SpreadKind kKind = decltype(spread)::value;
    int number = first;
#pragma unroll 1
    for (; number < tiles.whole; ++number)
      accumulate_tile<kKind>(state, row, RowTile<T, kTarget, kWidth, kVectors, true>(row, range, number));
#pragma unroll 1
    for (; number < tiles.all; ++number)
      accumulate_tile<kKind>(state, row, RowTile<T, kTarget, kWidth, kVectors, false>(row, range, number));
  });
}

// ---- The second sweep: the gradient
//
//   d loss/dx_c = scale * exp(x_c - max) - q_c      scale = sum(q) / sum(exp(x - max))
//
// times grad_output, which the mean divides by total_weight.

template <typename A>
struct GradientFactors {
  A max, scale, grad_output;
  A scale_times_grad_output, uniform_times_grad_output;
};

template <typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ A scale_of(const RowTarget<T, kTarget>& row, const RowState<A>& state) {
  const A mass = row.has_probabilities() ? state.mass
                 : is_spread(kTarget)               ? index_mass(row.w_y, row.o.weight_sum(), row.o.smoothing)
                                         : row.w_y;
  return elementary::divide_closely_by_moderate(mass, state.sum);
}

// What a row's loss is multiplied by: grad_output, which the mean divides. With probabilities each row weighs 1.
template <typename T, typename A = AccumulateType<T>>
__device__ __forceinline__ A scaled_grad_output(const TypedOptions<T>& o, A grad_output) {
  if (o.reduction != Reduction::kMean) return grad_output;
  return divide_by_total_weight(grad_output,
                                o.target_probability ? A(o.plan.rows) : *static_cast<const A*>(o.total_weight));
}

// grad_output: with the mean's division.
template <typename T, typename A>
__device__ __forceinline__ GradientFactors<A> gradient_factors(const TypedOptions<T>& o, A max, A scale, A grad_output) {
  return {max, scale, grad_output, scale * grad_output, math::product(o.smoothing.uniform, grad_output)};
}

// Grad_output times d loss/dx_c for a class of logit x.
template <typename A>
__device__ __forceinline__ A gradient_of(const GradientFactors<A>& factors, A x, A q) {
  return logit_gradient(math::exp(x - factors.max), factors.scale, q, factors.grad_output);
}

// One after another, where they are not aligned as a vector must be.
template <typename T, int kWidth>
__device__ __forceinline__ void store_elements(T* p, const Vector<T, kWidth>& vector) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) p[j] = narrow<T>(vector[j]);
}

// As if none were the target class. A tile has one branch between both kinds of stores: of a branch for a few stores the
// compiler would make predicates, and issue both.
template <SpreadKind kKind, bool kShifted, typename T, TargetKind kTarget, int kWidth, int kVectors, bool kWhole, typename A>
__device__ __forceinline__ void write_tile(const Row<T, kTarget>& row, const GradientFactors<A>& factors,
                                           const RowTile<T, kTarget, kWidth, kVectors, kWhole>& tile,
                                           const ThreadRange<T>& range, int number) {
  const auto vector_of = [&](int k) {
    A values[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if constexpr (kKind == SpreadKind::kNone || kKind == SpreadKind::kUniform) {
        values[j] = math::exp(tile.x[k][j] - factors.max) * factors.scale_times_grad_output;
        if (kKind == SpreadKind::kUniform) values[j] -= factors.uniform_times_grad_output;
      } else {
        values[j] = gradient_of(factors, A(tile.x[k][j]), tile.template coefficient<kKind>(row, k, j));
      }
    }
    return narrow_vector<T, kWidth>(values);
  };
  const auto place_of = [&](int k) { return row.grad + tile.offset(tile.first(k), row.o.grad_strides); };
  if constexpr (kWidth == 1 || !kShifted) {
    tile.for_each_vector([&](int k) { store(place_of(k), vector_of(k)); });
  } else {
    if (range.step_shift < kWarpShift) {  // a row of a few lanes: those of the warp's other rows need not be here
      tile.for_each_vector([&](int k) { store_elements(place_of(k), vector_of(k)); });
      return;
    }
    const int thread = opaque(int(threadIdx.y * blockDim.x + threadIdx.x));  // within the block
    const int lane = thread % kWarp, unit = range.thread - lane + (number * kVectors << range.step_shift);
    const auto start = reinterpret_cast<char*>(row.grad + range.template first<kWidth>(unit));
    const int bytes = int(reinterpret_cast<uintptr_t>(start) % kVectorBytes);
    const ShiftedVectors<T> vectors = {start - bytes, bytes, lane, thread / kWarp, kVectorBytes << range.step_shift,
                                   range.template units<kWidth>() - unit};
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      vectors.template store<kWhole>(k, tile.is_there(k) ? vector_of(k) : Vector<T, kWidth>());
    vectors.template store_edges<kWhole, kVectors>();
  }
}

// The tiles of a thread's range, from the last to number `first`, as they come from memory: the cache may still hold the
// last ones.
template <bool kShifted, int kWidth, int kVectors, typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void write_tiles(const Row<T, kTarget>& row, const GradientFactors<A>& factors,
                                            const ThreadRange<T>& range, int first = 0) {
  const auto tiles = RowTileCount::of<kWidth, kVectors>(range);
  on_spread<kTarget>(row.o, [&](auto spread) {
    constexpr SpreadKind kKind = decltype(spread)::value;
    int number = tiles.all - 1;
#pragma unroll 1
    for (; number >= tiles.whole && number >= first; --number)
      write_tile<kKind, kShifted>(row, factors, RowTile<T, kTarget, kWidth, kVectors, false>(row, range, number), range, number);
#pragma unroll 1
    for (; number >= first; --number)
      write_tile<kKind, kShifted>(row, factors, RowTile<T, kTarget, kWidth, kVectors, true>(row, range, number), range, number);
  });
}

// Is the row's target class in this thread's share?
template <typename T, TargetKind kTarget>
__device__ __forceinline__ bool has_target(const Row<T, kTarget>& row, const ThreadRange<T>& range) {
  if (row.y < 0) return false;
  const int in_vectors = range.vectors * kVectorSize<T>, behind_head = row.y - range.head;
  const int unit = behind_head < 0             ? row.y
                   : behind_head >= in_vectors ? row.y - in_vectors
                                               : behind_head / kVectorSize<T>;
  return (unit & ((1 << range.step_shift) - 1)) == range.thread;
}

// Writes a thread's range of the gradient, of which write_vectors writes the vectors. The target class is put right
// afterwards: looking out for it in every vector costs more. Its value is computed before, so that the sweep holds one number
// for it. x_y is its logit, read before, as the gradient may be written over it.
template <typename T, TargetKind kTarget, typename A, typename F>
__device__ __forceinline__ void write_gradient(const Row<T, kTarget>& row, const GradientFactors<A>& factors,
                                               const ThreadRange<T>& range, T x_y, F write_vectors) {
  const bool mine = has_target(row, range);
  const T of_target = narrow<T>(gradient_of(factors, A(widen(x_y)), row.coefficient()));
  if (range.template units<1>() > 0) write_tiles<false, 1, kTileVectors<kTarget> / 2>(row, factors, range);
  write_vectors(factors);
  if (mine) row.grad[row.y * row.o.grad_strides.classes] = of_target;
}

template <int kWidth, typename T, TargetKind kTarget>
__device__ __forceinline__ void write_zeros(const Row<T, kTarget>& row, const ThreadRange<T>& range) {
  const Vector<T, kWidth> zeros = {};
#pragma unroll 1
  for (int unit = range.thread; unit < range.template units<kWidth>(); unit += 1 << range.step_shift) {
    store(row.grad + range.template first<kWidth>(unit) * row.o.grad_strides.classes, zeros);
  }
}

// For a row that does not count: zeros, even where its logits are NaN. Nothing is read, so the vectors are the gradient's.
template <typename T, TargetKind kTarget>
__device__ __forceinline__ void write_row_of_zeros(const Row<T, kTarget>& row, const ThreadRange<T>& range) {
  const ThreadRange<T> of_gradient = {vectorized_range(int(row.o.classes), row.grad), range.thread, range.step_shift};
  write_zeros<kVectorSize<T>>(row, of_gradient);
  write_zeros<1>(row, of_gradient);
}

// A thread's range of the gradient of any row, from its statistics and the logits in memory.
template <bool kShifted, typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void write_row(const Row<T, kTarget>& row, A max, A scale, const ThreadRange<T>& range) {
  if (!row.contributes()) return write_row_of_zeros(row, range);
  const A g = scaled_grad_output(row.o, grad_output_at<T>(row.o, row.number));
  // Nobody but the thread that writes it reads it: the gradient may be written over the logits.
  const T x_y = has_target(row, range) ? row.logits[row.y * row.o.logits_strides.classes] : T();
  write_gradient(row, gradient_factors(row.o, max, scale, g), range, x_y, [&](const GradientFactors<A>& factors) {
    write_tiles<kShifted, kVectorSize<T>, kTileVectors<kTarget> / 2>(row, factors, range);
  });
}

}  // namespace fusedloss::cuda
