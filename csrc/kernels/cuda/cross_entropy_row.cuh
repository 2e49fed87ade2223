// A row of logits as the threads that share it see it: its target, the tiles it is swept in, what a sweep adds to the
// row's statistics, and its gradient.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "kernels/cuda/cross_entropy_plan.h"
#include "kernels/cuda/cross_entropy_shifted.cuh"
#include "kernels/cuda/grad_output.cuh"
#include "kernels/cuda/math.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vec.cuh"
#include "kernels/formulas/cross_entropy-inl.h"

namespace fusedloss::cuda {

// What a kernel is given.
template <typename T>
struct Problem : CrossEntropyOptions {
  using A = AccumulateType<T>;

  explicit Problem(const CrossEntropyOptions& o, const RowPlan& p)
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
  // Slots that a thread has for each pack of logits: one more for the pack of probabilities.
  template <TargetKind kTarget>
  static constexpr int kSlotsOfPack = kTarget == TargetKind::kProbabilities ? 2 : 1;
  __device__ __forceinline__ A weight_of(int c) const { return weight ? static_cast<const A*>(weight)[c] : A(1); }
  __device__ __forceinline__ A sum_of_weights() const {
    return weight_sum ? *static_cast<const A*>(weight_sum) : A(classes);
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
__device__ __forceinline__ void with_spread(const Problem<T>& o, F f) {
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

  const Problem<T>& o;
  const int64_t number;
  const int y;  // the target class; -1 for probabilities, and where there is none
  const A w_y;  // its weight

  __device__ __forceinline__ RowTarget(const Problem<T>& problem, int64_t row, int target)
      : o(problem), number(row), y(target), w_y(y < 0 ? A(0) : o.weight_of(y)) {}

  __device__ __forceinline__ bool has_probabilities() const { return kTarget == TargetKind::kProbabilities; }
  // If not, the row adds nothing. A row of some length is then not even read.
  __device__ __forceinline__ bool counts() const { return has_probabilities() || y >= 0; }
  // q of the target class.
  __device__ __forceinline__ A coefficient() const {
    const A q = math::rounded_product(o.smoothing.kept, w_y);
    return is_spread(kTarget) ? q + math::rounded_product(o.smoothing.uniform, w_y) : q;
  }
};

template <typename T, TargetKind kTarget>
struct Row : RowTarget<T, kTarget> {
  using RowTarget<T, kTarget>::o;

  const int64_t outer;         // its position, if there are inner sizes
  const T* const logits;       // [classes]
  const T* const probability;  // [classes]; null for a class index
  T* const grad;               // [classes]; null if it is not wanted

  __device__ __forceinline__ Row(const Problem<T>& problem, int64_t row)
      : Row(problem, row, problem.class_of(problem.target_at(row))) {}
  __device__ __forceinline__ Row(const Problem<T>& problem, int64_t row, int target)
      : RowTarget<T, kTarget>(problem, row, target),
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
__device__ __forceinline__ T ask_for_target_logit(const Row<T, kTarget>& row) {
  return row.y < 0 ? T() : row.logits[row.y * row.o.logits_strides.classes];
}

// A thread's part of the classes of a row that several threads share; thread: its number among them. The vectors are those
// of the logits; where the gradient is aligned otherwise, as that of a slice of a padded vocabulary, only its stores are
// others: see cross_entropy_shifted.cuh.
template <typename T, TargetKind kTarget>
__device__ __forceinline__ Share<T> share_of(const Row<T, kTarget>& row, int thread) {
  const auto elements = split(int(row.o.classes), row.logits, row.probability);
  return {elements, thread, row.o.plan.threads_shift};
}

// Which of the blocks of its rows this one is, and how many groups of such blocks come before it.
__device__ __forceinline__ int rank_of_block(const RowPlan& plan) {
  return int(blockIdx.x & ((1u << plan.blocks_shift) - 1));
}
__device__ __forceinline__ int64_t group_of_block(const RowPlan& plan) { return blockIdx.x >> plan.blocks_shift; }

// A thread's own slots in shared memory, each for a pack. Nobody else reads or writes them, so no barrier is needed. Those
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

// What a thread holds of a row at a time: kPacks packs of kWidth neighbouring classes. kWhole: all of them lie in the
// row, so that nothing stands between one pack's instructions and the next one's.
template <typename T, TargetKind kTarget, int kWidth, int kPacks, bool kWhole>
struct Tile {
  Pack<T, kWidth> x[kPacks];
  Pack<T, kWidth> t[kTarget == TargetKind::kProbabilities ? kPacks : 1] = {};
  int begin;                       // unit of the first pack
  int count;                       // of packs that lie in the row; kPacks or more if all of them do
  const Share<T>& share;

  // A share's tile, from memory; with kWidth = 1 the classes may lie apart.
  __device__ __forceinline__ Tile(const Row<T, kTarget>& row, const Share<T>& share, int number)
      : share(share) {
    find(number);
    // What is not there is 0: a register that is left as it was would have to be kept from the round before.
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      x[k] = is_there(k) ? load<kWidth>(row.logits + offset(first(k), row.o.logits_strides)) : Pack<T, kWidth>();
    if (!row.has_probabilities()) return;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      t[k] = is_there(k) ? load<kWidth>(row.probability + offset(first(k), row.o.target_strides)) : Pack<T, kWidth>();
  }

  // The same from a thread's slots, where a Stream has copied it; `place` is the first pack's.
  __device__ __forceinline__ Tile(const Row<T, kTarget>& row, const Share<T>& share, int number, const Slots& slots,
                                  int place)
      : share(share) {
    find(number);
    constexpr int step = Problem<T>::template kSlotsOfPack<kTarget>;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      x[k] = Pack<T, kWidth>();
      if (!is_there(k)) continue;
      x[k].from_vector(slots[step * (place + k)]);
      if (row.has_probabilities()) t[k].from_vector(slots[step * (place + k) + 1]);
    }
  }

  __device__ __forceinline__ void find(int number) {
    begin = share.thread + (number * kPacks << share.step_shift);
    count = (share.template units<kWidth>() - begin + (1 << share.step_shift) - 1) >> share.step_shift;
  }
  // The class of a pack's first element.
  __device__ __forceinline__ int first(int k) const {
    return share.template first<kWidth>(begin + (k << share.step_shift));
  }

  static __device__ __forceinline__ int64_t offset(int c, const Strides& strides) {
    return kWidth == 1 ? c * strides.classes : c;
  }
  __device__ __forceinline__ bool is_there(int k) const { return kWhole || k < count; }

  template <typename F>
  __device__ __forceinline__ void for_each_pack(F f) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (is_there(k)) f(k);
  }

  // q of class (k, j), element j of pack k; for a class index, without what the target class has above the others:
  // kept * w_y.
  template <SpreadKind kKind>
  __device__ __forceinline__ AccumulateType<T> coefficient(const Row<T, kTarget>& row, int k, int j) const {
    const AccumulateType<T> w = is_weighted(kKind) ? row.o.weight_of(first(k) + j) : 1;
    return is_of_probabilities(kKind) ? probability_coefficient(t[k][j], w, row.o.smoothing)
                                      : math::rounded_product(row.o.smoothing.uniform, w);
  }
};

// A thread's tiles: `whole` ones, as many for every thread of the row, then one more that ends behind the row if there
// are more in all: of one thread of a warp, or of several; the others come along, for its stores may take shuffles. As many
// threads share a row as a power of two.
struct TileCount {
  int whole, all;

  template <int kWidth, int kPacks, typename T>
  static __device__ __forceinline__ TileCount of(const Share<T>& share) {
    const int units = share.template units<kWidth>(), whole = (units >> share.step_shift) / kPacks;
    return {whole, whole + ((share.thread & -kWarp) < units - (whole * kPacks << share.step_shift))};
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

template <SpreadKind kKind, typename T, TargetKind kTarget, int kWidth, int kPacks, bool kWhole, typename A>
__device__ __forceinline__ void absorb_tile(RowState<A>& state, const Row<T, kTarget>& row,
                                            const Tile<T, kTarget, kWidth, kPacks, kWhole>& tile) {
  A max = state.max;
  tile.for_each_pack([&](int k) { max = math::max(max, tile.x[k].max()); });
  state = rescale(state, max);
  const A reference = shift(max);
  tile.for_each_pack([&](int k) {
    A e[kWidth], dot[kWidth], mass[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const A distance = tile.x[k][j] - reference;
      e[j] = math::exp_nonpositive(distance);
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

// Adds the tiles of a thread's share to its statistics, from number `first` on, as they come from memory.
template <int kWidth, int kPacks, typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void absorb(RowState<A>& state, const Row<T, kTarget>& row, const Share<T>& share,
                                       int first = 0) {
  const auto tiles = TileCount::of<kWidth, kPacks>(share);
  with_spread<kTarget>(row.o, [&](auto spread) {
    constexpr SpreadKind kKind = decltype(spread)::value;
    int number = first;
#pragma unroll 1
    for (; number < tiles.whole; ++number)
      absorb_tile<kKind>(state, row, Tile<T, kTarget, kWidth, kPacks, true>(row, share, number));
#pragma unroll 1
    for (; number < tiles.all; ++number)
      absorb_tile<kKind>(state, row, Tile<T, kTarget, kWidth, kPacks, false>(row, share, number));
  });
}

// ---- The second sweep: the gradient
//
//   d loss/dx_c = scale * exp(x_c - max) - q_c      scale = sum(q) / sum(exp(x - max))
//
// times grad_output, which the mean divides by total_weight.

template <typename A>
struct RowGradient {
  A max, scale, grad_output;
  A scale_times_grad_output, uniform_times_grad_output;
};

template <typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ A scale_of(const RowTarget<T, kTarget>& row, const RowState<A>& state) {
  const A mass = row.has_probabilities() ? state.mass
                 : is_spread(kTarget)               ? index_mass(row.w_y, row.o.sum_of_weights(), row.o.smoothing)
                                         : row.w_y;
  return math::divide_closely_by_moderate(mass, state.sum);
}

// What a row's loss is multiplied by: grad_output, which the mean divides. With probabilities each row weighs 1.
template <typename T, typename A = AccumulateType<T>>
__device__ __forceinline__ A with_mean(const Problem<T>& o, A grad_output) {
  if (o.reduction != Reduction::kMean) return grad_output;
  return divide_by_total_weight(grad_output,
                                o.target_probability ? A(o.plan.rows) : *static_cast<const A*>(o.total_weight));
}

// grad_output: with the mean's division.
template <typename T, typename A>
__device__ __forceinline__ RowGradient<A> row_gradient(const Problem<T>& o, A max, A scale, A grad_output) {
  return {max, scale, grad_output, scale * grad_output, math::rounded_product(o.smoothing.uniform, grad_output)};
}

// Grad_output times d loss/dx_c for a class of logit x.
template <typename A>
__device__ __forceinline__ A gradient_of(const RowGradient<A>& of_row, A x, A q) {
  return logit_gradient(math::exp_nonpositive(x - of_row.max), of_row.scale, q, of_row.grad_output);
}

// One after another, where they are not aligned as a vector must be.
template <typename T, int kWidth>
__device__ __forceinline__ void store_elements(T* p, const Pack<T, kWidth>& pack) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) p[j] = narrow<T>(pack[j]);
}

// As if none were the target class. A tile has one branch between both kinds of stores: of a branch for a few stores the
// compiler would make predicates, and issue both.
template <SpreadKind kKind, bool kShifted, typename T, TargetKind kTarget, int kWidth, int kPacks, bool kWhole, typename A>
__device__ __forceinline__ void write_tile(const Row<T, kTarget>& row, const RowGradient<A>& of_row,
                                           const Tile<T, kTarget, kWidth, kPacks, kWhole>& tile,
                                           const Share<T>& share, int number) {
  const auto pack_of = [&](int k) {
    A values[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if constexpr (kKind == SpreadKind::kNone || kKind == SpreadKind::kUniform) {
        values[j] = math::exp_nonpositive(tile.x[k][j] - of_row.max) * of_row.scale_times_grad_output;
        if (kKind == SpreadKind::kUniform) values[j] -= of_row.uniform_times_grad_output;
      } else {
        values[j] = gradient_of(of_row, A(tile.x[k][j]), tile.template coefficient<kKind>(row, k, j));
      }
    }
    return narrow_pack<T, kWidth>(values);
  };
  const auto place_of = [&](int k) { return row.grad + tile.offset(tile.first(k), row.o.grad_strides); };
  if constexpr (kWidth == 1 || !kShifted) {
    tile.for_each_pack([&](int k) { store(place_of(k), pack_of(k)); });
  } else {
    if (share.step_shift < kWarpShift) {  // a row of a few lanes: those of the warp's other rows need not be here
      tile.for_each_pack([&](int k) { store_elements(place_of(k), pack_of(k)); });
      return;
    }
    const int thread = only_here(int(threadIdx.y * blockDim.x + threadIdx.x));  // within the block
    const int lane = thread % kWarp, unit = share.thread - lane + (number * kPacks << share.step_shift);
    const auto start = reinterpret_cast<char*>(row.grad + share.template first<kWidth>(unit));
    const int bytes = int(reinterpret_cast<uintptr_t>(start) % kPackBytes);
    const ShiftedPacks<T> packs = {start - bytes, bytes, lane, thread / kWarp, kPackBytes << share.step_shift,
                                   share.template units<kWidth>() - unit};
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      packs.template store<kWhole>(k, tile.is_there(k) ? pack_of(k) : Pack<T, kWidth>());
    packs.template store_edges<kWhole, kPacks>();
  }
}

// The tiles of a thread's share, from the last to number `first`, as they come from memory: the cache may still hold the
// last ones.
template <bool kShifted, int kWidth, int kPacks, typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void write_tiles(const Row<T, kTarget>& row, const RowGradient<A>& of_row,
                                            const Share<T>& share, int first = 0) {
  const auto tiles = TileCount::of<kWidth, kPacks>(share);
  with_spread<kTarget>(row.o, [&](auto spread) {
    constexpr SpreadKind kKind = decltype(spread)::value;
    int number = tiles.all - 1;
#pragma unroll 1
    for (; number >= tiles.whole && number >= first; --number)
      write_tile<kKind, kShifted>(row, of_row, Tile<T, kTarget, kWidth, kPacks, false>(row, share, number), share, number);
#pragma unroll 1
    for (; number >= first; --number)
      write_tile<kKind, kShifted>(row, of_row, Tile<T, kTarget, kWidth, kPacks, true>(row, share, number), share, number);
  });
}

// Is the row's target class in this thread's share?
template <typename T, TargetKind kTarget>
__device__ __forceinline__ bool has_target(const Row<T, kTarget>& row, const Share<T>& share) {
  if (row.y < 0) return false;
  const int in_vectors = share.vectors * kVector<T>, behind_head = row.y - share.head;
  const int unit = behind_head < 0             ? row.y
                   : behind_head >= in_vectors ? row.y - in_vectors
                                               : behind_head / kVector<T>;
  return (unit & ((1 << share.step_shift) - 1)) == share.thread;
}

// Writes a thread's share of the gradient, of which write_vectors writes the vectors. The target class is put right
// afterwards: looking out for it in every pack costs more. Its value is computed before, so that the sweep holds one number
// for it. x_y is its logit, read before, as the gradient may be written over it.
template <typename T, TargetKind kTarget, typename A, typename F>
__device__ __forceinline__ void write_gradient(const Row<T, kTarget>& row, const RowGradient<A>& of_row,
                                               const Share<T>& share, T x_y, F write_vectors) {
  const bool mine = has_target(row, share);
  const T of_target = narrow<T>(gradient_of(of_row, A(widen(x_y)), row.coefficient()));
  if (share.template units<1>() > 0) write_tiles<false, 1, kTilePacks<kTarget> / 2>(row, of_row, share);
  write_vectors(of_row);
  if (mine) row.grad[row.y * row.o.grad_strides.classes] = of_target;
}

template <int kWidth, typename T, TargetKind kTarget>
__device__ __forceinline__ void write_zeros(const Row<T, kTarget>& row, const Share<T>& share) {
  const Pack<T, kWidth> zeros = {};
#pragma unroll 1
  for (int unit = share.thread; unit < share.template units<kWidth>(); unit += 1 << share.step_shift) {
    store(row.grad + share.template first<kWidth>(unit) * row.o.grad_strides.classes, zeros);
  }
}

// For a row that does not count: zeros, even where its logits are NaN. Nothing is read, so the vectors are the gradient's.
template <typename T, TargetKind kTarget>
__device__ __forceinline__ void write_row_of_zeros(const Row<T, kTarget>& row, const Share<T>& share) {
  const Share<T> of_gradient = {split(int(row.o.classes), row.grad), share.thread, share.step_shift};
  write_zeros<kVector<T>>(row, of_gradient);
  write_zeros<1>(row, of_gradient);
}

// A thread's share of the gradient of any row, from its statistics and the logits in memory.
template <bool kShifted, typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void write_row(const Row<T, kTarget>& row, A max, A scale, const Share<T>& share) {
  if (!row.counts()) return write_row_of_zeros(row, share);
  const A g = with_mean(row.o, grad_output_at<T>(row.o, row.number));
  // Nobody but the thread that writes it reads it: the gradient may be written over the logits.
  const T x_y = has_target(row, share) ? row.logits[row.y * row.o.logits_strides.classes] : T();
  write_gradient(row, row_gradient(row.o, max, scale, g), share, x_y, [&](const RowGradient<A>& of_row) {
    write_tiles<kShifted, kVector<T>, kTilePacks<kTarget> / 2>(row, of_row, share);
  });
}

}  // namespace fusedloss::cuda
