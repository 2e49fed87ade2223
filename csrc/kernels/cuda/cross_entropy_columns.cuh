// Columns: rows that are neighbours in memory, as in (N, C, d1, …), and rows of so few classes that a thread takes one, if
// cross_entropy_few.cuh cannot take them.
//
// A thread takes kWidth neighbouring rows side by side: one 16-byte load brings one class of all of them. Where
// alignment does not allow that, kWidth is 1. A block is (threads side by side, threads along the classes), and keeps all
// classes of its rows in shared memory. Where it cannot, several blocks share the same rows ("split"), and the logits are
// read twice (cross_entropy_columns_plan.h decides).
//
// A block goes from the threads' view to the rows' view and back, by way of shared memory:
//   1. each thread sweeps its classes, and has the statistics of kWidth rows;
//   2. they are merged: in a warp by shuffles, then in shared memory;
//   3. one thread for each row, or some lanes, makes the row's loss, and what the gradient needs to know of the row;
//   4. each thread reads that of its kWidth rows, and sweeps its classes again to write the gradient.
// Split rows go through 1 and 2, and what their blocks have found through finish_split; the backward pass begins with 3.
#pragma once

#include <cfloat>

#include "kernels/cuda/cross_entropy_finish.cuh"

namespace fusedloss::cuda {

// Threads of a block, at most, and blocks of so many that a multiprocessor must hold at once. Said outright since the
// compiler, left to choose, spills registers to make room for a few more.
template <typename T, TargetKind kTarget>
constexpr int kColumnThreads = max_column_threads(sizeof(T) == 8, is_spread(kTarget));
template <typename T, TargetKind kTarget>
constexpr int kForwardBlocks = sizeof(T) < 8 && is_spread(kTarget) ? 2 : 1;
template <typename T, TargetKind kTarget, bool kTrains>
constexpr int kAloneBlocks = sizeof(T) == 8                          ? 4
                             : kTarget == TargetKind::kProbabilities ? 6
                             : kTrains || is_spread(kTarget)         ? 8
                                                                     : 12;
template <typename T, TargetKind kTarget>
constexpr int kApartBlocks = apart_blocks(sizeof(T) == 8, is_spread(kTarget));

// In the place of the target class: the row does not count, and its gradient is 0; or the class is no concern of this
// block.
constexpr int kDoesNotCount = -2, kNotHere = -1;

// The least finite number.
template <typename A>
constexpr A kLowest = sizeof(A) == 8 ? A(-DBL_MAX) : A(-FLT_MAX);

// Where the classes of a row lie, from the start of a tensor with these strides.
template <typename T>
struct ColumnPosition {
  int64_t outer, inner;

  // In 32 bits, where they suffice, a division takes a third of the time.
  __device__ __forceinline__ ColumnPosition(const Problem<T>& o, int64_t row)
      : outer(o.inner == 1 ? row : (row | o.inner) >> 32 == 0 ? uint32_t(row) / uint32_t(o.inner) : row / o.inner),
        inner(row - outer * o.inner) {}
  __device__ __forceinline__ int64_t in(const Strides& strides) const {
    return outer * strides.outer + inner * strides.inner;
  }
};

// The larger element at each place, or the other one where one is NaN.
template <typename T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> larger_of(const Pack<T, kWidth>& a, const Pack<T, kWidth>& b) {
  Pack<T, kWidth> larger;
  if constexpr (kWidth == 1) {
    larger.element = narrow<T>(math::max(widen(a.element), widen(b.element)));
  } else if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Pair of_a, of_b;
      memcpy(static_cast<void*>(&of_a), &a.words[i], 4);
      memcpy(static_cast<void*>(&of_b), &b.words[i], 4);
      const Pair max = __hmax2(of_a, of_b);
      memcpy(&larger.words[i], static_cast<const void*>(&max), 4);
    }
  } else {
    alignas(16) T values[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = math::max(a[i], b[i]);
    larger.from_vector(*reinterpret_cast<const uint4*>(values));
  }
  return larger;
}

// ---- What a block has in shared memory, behind what its threads keep

// A place is one of the block's rows. Sets of one value for each place: each set has the arrays of a RowState, or, the
// last of step 3, what the gradient needs.
template <typename T, TargetKind kTarget, int kWidth>
struct ColumnMemory {
  using A = AccumulateType<T>;

  const int places;
  A* const values;  // [sets][kStateArrays<is_spread(kTarget)>][places]
  int* const y;     // [places]
  T* const of_target;  // [places]  the gradient of the target class

  explicit __device__ __forceinline__ ColumnMemory(const ColumnPlan& p)
      : places(column_places(int(blockDim.x), kWidth)),
        values(reinterpret_cast<A*>(dynamic_shared_memory + p.kept_vectors)),
        y(reinterpret_cast<int*>(values + p.sets * kStateArrays<is_spread(kTarget)> * places)),
        of_target(reinterpret_cast<T*>(y + places)) {}

  // Row `row` of the threads that are the thread-th side by side. Padded so that neither a warp of threads, each at
  // its first row, nor a warp of neighbouring rows meet in the same bank.
  __device__ __forceinline__ int place(int thread, int row) const {
    return row * column_stride(int(blockDim.x), kWidth) + thread;
  }
  __device__ __forceinline__ A& at(int set, int array, int place) const {
    return values[(set * kStateArrays<is_spread(kTarget)> + array) * places + place];
  }
  __device__ __forceinline__ void put(int set, int place, const RowState<A>& state) const {
    at(set, 0, place) = state.max;
    at(set, 1, place) = state.sum;
    if constexpr (is_spread(kTarget)) {
      at(set, 2, place) = state.dot;
      at(set, 3, place) = state.mass;
    }
  }
  __device__ __forceinline__ RowState<A> get(int set, int place) const {
    RowState<A> state = {at(set, 0, place), at(set, 1, place), A(0), A(0)};
    if constexpr (is_spread(kTarget)) {
      state.dot = at(set, 2, place);
      state.mass = at(set, 3, place);
    }
    return state;
  }
};

// ---- A thread's rows

// Which of the blocks that share rows this is, and its classes. Blocks that are neighbours have the same classes of
// neighbouring rows, so that together they read what lies side by side. The blocks of the backward pass go from the end
// to the beginning: the cache may still hold what was read last.
struct ColumnBlock {
  int rank;
  unsigned group;
  int begin, end;  // classes

  __device__ __forceinline__ ColumnBlock(const CrossEntropyOptions& o, const RowPlan& plan, bool reverse) {
    const unsigned index = reverse ? plan.grid - 1 - blockIdx.x : blockIdx.x, groups = plan.of_columns.groups;
    rank = int(index / groups);
    group = index - rank * groups;
    begin = rank * plan.of_columns.classes_of_block;
    end = int(smaller(begin + plan.of_columns.classes_of_block, o.classes));
  }
};

// The classes first, first + step, … of kWidth neighbouring rows, up to a block's last one.
template <typename T, TargetKind kTarget, int kWidth>
struct Columns {
  using A = AccumulateType<T>;

  const Problem<T>& o;
  const T* logits;       // of the first row, class 0
  const T* probability;  // null for class indices
  T* grad;               // null if it is not wanted
  int first, end;
  int classes;           // of the block
  int shift;             // of step, a power of two

  __device__ __forceinline__ Columns(const Problem<T>& problem, int64_t unit, int thread)
      : Columns(problem, unit, thread, 0, int(problem.classes)) {}
  __device__ __forceinline__ Columns(const Problem<T>& problem, int64_t unit, int thread, int begin, int end)
      : o(problem), first(begin + thread), end(end), classes(end - begin), shift(problem.plan.threads_shift) {
    const ColumnPosition<T> position(o, unit * kWidth);
    logits = static_cast<const T*>(o.logits) + position.in(o.logits_strides);
    probability = kTarget == TargetKind::kProbabilities
                      ? static_cast<const T*>(o.target_probability) + position.in(o.target_strides)
                      : nullptr;
    grad = o.grad_logits ? static_cast<T*>(o.grad_logits) + position.in(o.grad_strides) : nullptr;
  }
  __device__ __forceinline__ bool has_probabilities() const { return kTarget == TargetKind::kProbabilities; }
  // Of the thread's classes; 0 or less where it has none.
  __device__ __forceinline__ int count() const { return (end - first + (1 << shift) - 1) >> shift; }

  // Of class c in row i, if the thread has all classes; from what it has kept, if it has.
  template <bool kMayBeKept>
  __device__ __forceinline__ T logit(int c, int i) const {
    if constexpr (kMayBeKept) {
      const int of_pack = Problem<T>::template kSlotsOfPack<kTarget>;
      const Slots slots(o.plan.slots * of_pack);
      if (o.plan.slots > 0) return reinterpret_cast<const T*>(&slots[of_pack * c])[i];
    }
    return logits[c * o.logits_strides.classes + i];
  }
};

// kPacks classes of a thread, a pack of kWidth rows each, from memory or, if kKept, from what the thread has kept.
// kWhole: all of them exist.
template <typename T, TargetKind kTarget, int kWidth, int kPacks, bool kKept, bool kWhole>
struct ColumnTile {
  using Rows = Columns<T, kTarget, kWidth>;

  Pack<T, kWidth> x[kPacks];
  Pack<T, kWidth> t[kPacks] = {};  // probabilities only
  int first;                       // the first class
  int count;                       // of packs that exist

  __device__ __forceinline__ ColumnTile(const Rows& rows, int number) {
    first = rows.first + (number * kPacks << rows.shift);
    count = kWhole ? kPacks : (rows.end - first + (1 << rows.shift) - 1) >> rows.shift;
    if constexpr (kKept) {
      take(rows, number);
    } else {
      load_all(rows.logits, rows.o.logits_strides.classes, rows, x);
      if (rows.has_probabilities()) load_all(rows.probability, rows.o.target_strides.classes, rows, t);
    }
  }

  // What is not there is 0: a register that is left as it was would have to be kept from the round before.
  __device__ __forceinline__ void load_all(const T* p, int64_t stride, const Rows& rows, Pack<T, kWidth> (&packs)[kPacks]) {
    p += first * stride;
    const int64_t step = stride << rows.shift;
#pragma unroll
    for (int k = 0; k < kPacks; ++k, p += step) packs[k] = is_there(k) ? load<kWidth>(p) : Pack<T, kWidth>();
  }
  __device__ __forceinline__ void take(const Rows& rows, int number) {
    const int of_pack = Problem<T>::template kSlotsOfPack<kTarget>;
    const Slots slots(rows.o.plan.slots * of_pack);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      x[k] = Pack<T, kWidth>();
      if (!is_there(k)) continue;
      x[k].from_vector(slots[of_pack * (number * kPacks + k)]);
      if (rows.has_probabilities()) t[k].from_vector(slots[of_pack * (number * kPacks + k) + 1]);
    }
  }

  __device__ __forceinline__ bool is_there(int k) const { return kWhole || k < count; }
  __device__ __forceinline__ int class_of(const Rows& rows, int k) const { return first + (k << rows.shift); }

  template <typename F>
  __device__ __forceinline__ void for_each_pack(F f) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (is_there(k)) f(k);
  }

  // q of pack k in row i, w being the class's weight; for a class index, without kept * w_y.
  template <SpreadKind kKind>
  __device__ __forceinline__ AccumulateType<T> coefficient(const Rows& rows, int k, int i, AccumulateType<T> w) const {
    return is_of_probabilities(kKind) ? probability_coefficient(t[k][i], w, rows.o.smoothing)
                                      : math::rounded_product(rows.o.smoothing.uniform, w);
  }
};

// Calls wait(number), then f(tile, its number) for all tiles of a thread, from the last to the first if kReverse: what was
// not kept is then read again while the cache may still hold it. `whole` tiles are so for every thread of the rows.
template <int kPacks, bool kReverse, bool kKept, typename T, TargetKind kTarget, int kWidth, typename Wait, typename F>
__device__ __forceinline__ void for_each_tile(const Columns<T, kTarget, kWidth>& rows, Wait wait, F f) {
  const int whole = (rows.classes >> rows.shift) / kPacks;
  const int all = whole + (rows.first + (whole * kPacks << rows.shift) < rows.end);
  const auto last = [&] {
    if (whole >= all) return;
    wait(whole);
    f(ColumnTile<T, kTarget, kWidth, kPacks, kKept, false>(rows, whole), whole);
  };
  if (kReverse) last();
#pragma unroll 1
  for (int i = 0; i < whole; ++i) {
    const int number = kReverse ? whole - 1 - i : i;
    wait(number);
    f(ColumnTile<T, kTarget, kWidth, kPacks, kKept, true>(rows, number), number);
  }
  if (!kReverse) last();
}

// Starts to copy a thread's classes to its slots, so that all of them are on their way at once. Those of a tile are one group,
// which is waited for together.
template <int kGroup, typename T, TargetKind kTarget, int kWidth>
__device__ __forceinline__ void start_copies(const Columns<T, kTarget, kWidth>& rows) {
  constexpr int kOfPack = Problem<T>::template kSlotsOfPack<kTarget>;
  const Slots slots(rows.o.plan.slots * kOfPack);
  const int64_t step = rows.o.logits_strides.classes << rows.shift;
  const int64_t t_step = rows.o.target_strides.classes << rows.shift;
  const T* p = rows.logits + rows.first * rows.o.logits_strides.classes;
  const T* t = rows.has_probabilities() ? rows.probability + rows.first * rows.o.target_strides.classes : nullptr;
  const int count = rows.count();
#pragma unroll 1
  for (int first = 0; first < count; first += kGroup) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (first + k >= count) break;
      __pipeline_memcpy_async(&slots[kOfPack * (first + k)], p, kPackBytes);
      p += step;
      if (!rows.has_probabilities()) continue;
      __pipeline_memcpy_async(&slots[kOfPack * (first + k) + 1], t, kPackBytes);
      t += t_step;
    }
    __pipeline_commit();
  }
}

// ---- 1. The statistics

// As rescale; of a sum alone, which is 0 or NaN as long as the maximum is -inf, with fewer questions.
template <bool kSpread, typename A>
__device__ __forceinline__ void raise_maximum(RowState<A>& state, A max) {
  if constexpr (kSpread) {
    state = rescale(state, max);
  } else {
    state.sum *= state.max == max ? A(1) : math::exp_nonpositive(state.max - max);
    state.max = max;
  }
}

template <SpreadKind kKind, typename T, TargetKind kTarget, int kWidth, int kPacks, bool kKept, bool kWhole, typename A>
__device__ __forceinline__ void absorb_columns_tile(RowState<A> (&state)[kWidth],
                                                    const Columns<T, kTarget, kWidth>& rows,
                                                    const ColumnTile<T, kTarget, kWidth, kPacks, kKept, kWhole>& tile) {
  auto largest = splat<kWidth>(narrow<T>(A(-INFINITY)));
  tile.for_each_pack([&](int k) { largest = larger_of(largest, tile.x[k]); });
  // Not only where a maximum grows: a warp has so many rows that one of them mostly does, and others need not branch.
#pragma unroll
  for (int i = 0; i < kWidth; ++i) raise_maximum<is_spread(kTarget)>(state[i], math::max(state[i].max, largest[i]));
  tile.for_each_pack([&](int k) {
    const A w = is_weighted(kKind) ? rows.o.weight_of(tile.class_of(rows, k)) : A(1);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      // As shift; -inf is as far from any other number as from 0, and one instruction finds that.
      const A reference = is_spread(kTarget) ? shift(state[i].max) : math::max(state[i].max, kLowest<A>);
      state[i].sum += math::exp_nonpositive(tile.x[k][i] - reference);
      if constexpr (is_spread(kTarget)) {
        const A q = tile.template coefficient<kKind>(rows, k, i, w);
        state[i].dot += q * (tile.x[k][i] - reference);
        state[i].mass += q;
      }
    }
  });
}

// Whether a thread's classes go through its slots, which the gradient is then made of.
enum class Keeping { kNever, kIfThereAreSlots, kAlways };

template <Keeping kKeeping, typename T, TargetKind kTarget, int kWidth, typename A>
__device__ __forceinline__ void absorb_columns(RowState<A> (&state)[kWidth], const Columns<T, kTarget, kWidth>& rows) {
  constexpr int kPacks = kColumnPacks<is_spread(kTarget)>;
  if constexpr (kKeeping != Keeping::kNever) {
    if (kKeeping == Keeping::kAlways || rows.o.plan.slots > 0) {
      start_copies<kPacks>(rows);
      const int groups = (rows.count() + kPacks - 1) / kPacks;
      with_spread<kTarget>(rows.o, [&](auto spread) {
        for_each_tile<kPacks, /*kReverse=*/false, /*kKept=*/true>(
            rows, [&](int number) { wait_for_copies(groups - 1 - number); },
            [&](const auto& tile, int) { absorb_columns_tile<decltype(spread)::value>(state, rows, tile); });
      });
      return;
    }
  }
  if constexpr (kKeeping != Keeping::kAlways) {
    with_spread<kTarget>(rows.o, [&](auto spread) {
      for_each_tile<kPacks, /*kReverse=*/false, /*kKept=*/false>(
          rows, [](int) {},
          [&](const auto& tile, int) { absorb_columns_tile<decltype(spread)::value>(state, rows, tile); });
    });
  }
}

// ---- 2. Their merge

// Over the lanes of a warp that have the same rows: those whose numbers differ by a multiple of blockDim.x. Fewer threads
// than lanes are side by side then.
template <TargetKind kTarget, int kWidth, typename A>
__device__ __forceinline__ void merge_lanes_apart(RowState<A> (&state)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    A max = state[i].max;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      if (distance >= int(blockDim.x)) max = math::max(max, __shfl_xor_sync(kAllLanes, max, distance));
    state[i] = rescale(state[i], max);
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      if (distance < int(blockDim.x)) continue;
      state[i].sum += __shfl_xor_sync(kAllLanes, state[i].sum, distance);
      if constexpr (is_spread(kTarget)) {
        state[i].dot += __shfl_xor_sync(kAllLanes, state[i].dot, distance);
        state[i].mass += __shfl_xor_sync(kAllLanes, state[i].mass, distance);
      }
    }
  }
}

// Leaves in shared memory what the block's threads have of its rows, in 1 << sets_shift sets.
template <typename T, TargetKind kTarget, int kWidth>
__device__ __forceinline__ void leave_states(const ColumnMemory<T, kTarget, kWidth>& memory,
                                             RowState<AccumulateType<T>> (&state)[kWidth]) {
  // Threads of one warp that have the same rows leave one state; each of the others a set of its own.
  const int threads_of_set = blockDim.x < kWarp ? kWarp / blockDim.x : 1;
  if (blockDim.x < kWarp) merge_lanes_apart<kTarget>(state);
  __syncthreads();  // the rows before have been read
  if (threadIdx.y % threads_of_set == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      memory.put(threadIdx.y / threads_of_set, memory.place(threadIdx.x, i), state[i]);
  }
  __syncthreads();
}

// Calls f(row of the block, its place, its state, the lane's number among those that have it) for all rows of the block,
// with what the 1 << shift sets have of the row, merged by as many lanes. All threads take part.
template <typename T, TargetKind kTarget, int kWidth, typename F>
__device__ __forceinline__ void for_each_merged_row(const ColumnMemory<T, kTarget, kWidth>& memory, int shift, F f) {
  using A = AccumulateType<T>;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, part = thread & ((1 << shift) - 1);
  const unsigned rows = blockDim.x * kWidth, rows_at_once = blockDim.x * blockDim.y >> shift;
#pragma unroll 1
  for (unsigned first = 0; first < rows; first += rows_at_once) {
    const unsigned row = first + (thread >> shift);
    const int place = memory.place(row / kWidth, row % kWidth);
    auto state = row < rows ? memory.get(part, place) : empty_row_state<A>();
    if (shift > 0) state = lanes_merge<is_spread(kTarget)>(state, 1 << shift);
    if (row < rows) f(int(row), place, state, part);
  }
}

// ---- 3. The rows

// Of a class: which of the threads of its block has it. A block's first class is a multiple of their number.
template <typename T>
__device__ __forceinline__ int thread_of_class(const Problem<T>& o, int c) {
  return c & ((1 << o.plan.threads_shift) - 1);
}

// The target class's logit, where this block has that class: from what a thread has kept, if it has.
template <int kWidth, bool kMayBeKept, typename T, TargetKind kTarget>
__device__ __forceinline__ T logit_of_target(const RowTarget<T, kTarget>& row, unsigned row_of_block) {
  const Problem<T>& o = row.o;
  if constexpr (kMayBeKept) {
    if (o.plan.slots > 0) {
      const int pack = row.y >> o.plan.threads_shift;
      const int thread = thread_of_class(o, row.y) * int(blockDim.x) + row_of_block / kWidth;
      const int of_pack = Problem<T>::template kSlotsOfPack<kTarget>;
      const Slots slots(o.plan.slots * of_pack, thread);
      return reinterpret_cast<const T*>(&slots[of_pack * pack])[row_of_block % kWidth];
    }
  }
  const ColumnPosition<T> position(o, row.number);
  return static_cast<const T*>(o.logits)[position.in(o.logits_strides) + row.y * o.logits_strides.classes];
}

// Brings the cache line of p to the second-level cache, and waits for nothing.
__device__ __forceinline__ void fetch_to_cache(const int64_t* p) {
#if FUSEDLOSS_CUDA_ARCH
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Leaves in shared memory what the gradient needs of a row; here: has this block the target class?
template <typename T, TargetKind kTarget, int kWidth, typename A>
__device__ __forceinline__ void prepare_gradient(const ColumnMemory<T, kTarget, kWidth>& memory, int set, int place,
                                                 const RowTarget<T, kTarget>& row, A max, A scale, A grad_output,
                                                 bool here, T x_y) {
  const bool counts = row.counts();
  memory.at(set, 0, place) = counts ? max : A(0);
  memory.at(set, 1, place) = !counts ? A(0) : is_spread(kTarget) ? scale : scale * grad_output;
  if constexpr (is_spread(kTarget)) memory.at(set, 2, place) = grad_output;
  memory.y[place] = !counts ? kDoesNotCount : here ? row.y : kNotHere;
  if (row.y < 0 || !here) return;
  const A e = math::exp_nonpositive(A(widen(x_y)) - max);
  memory.of_target[place] = narrow<T>(logit_gradient(e, scale, row.coefficient(), grad_output));
}

// ---- 4. The gradient

// kWidth neighbouring values, zeros where a row does not count, even if its logits are NaN.
template <typename T, int kWidth>
struct RowsThatCount {
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
      const uint4 v = narrow_pack<T, kWidth>(values).as_vector();
      store_vector(p, {v.x & mask[0], v.y & mask[1], v.z & mask[2], v.w & mask[3]});
    }
  }
};

// What the gradient of a thread's i-th row needs, where the row's thread has left it.
template <typename T, TargetKind kTarget, int kWidth>
struct GradientInMemory {
  using A = AccumulateType<T>;

  const ColumnMemory<T, kTarget, kWidth>& memory;
  int set;

  __device__ __forceinline__ int place(int i) const { return memory.place(threadIdx.x, i); }
  __device__ __forceinline__ A max(int i) const { return memory.at(set, 0, place(i)); }
  __device__ __forceinline__ A factor(int i) const { return memory.at(set, 1, place(i)); }
  __device__ __forceinline__ A grad_output(int i) const { return memory.at(set, 2, place(i)); }
  __device__ __forceinline__ bool counts(int i) const { return memory.y[place(i)] != kDoesNotCount; }
  // The target class, if it is one of the thread's own; its gradient.
  __device__ __forceinline__ int target(const Columns<T, kTarget, kWidth>& rows, int i) const {
    const int y = memory.y[place(i)];
    return y >= 0 && thread_of_class(rows.o, y) == int(threadIdx.y) ? y : kNotHere;
  }
  __device__ __forceinline__ T of_target(int i) const { return memory.of_target[place(i)]; }
};

// The same in the thread that has the row for itself.
template <typename T, TargetKind kTarget, int kWidth>
struct GradientOfOwn {
  using A = AccumulateType<T>;

  A maxima[kWidth], factors[kWidth], common_grad_output;
  int targets[kWidth];
  T of_targets[kWidth];

  __device__ __forceinline__ A max(int i) const { return maxima[i]; }
  __device__ __forceinline__ A factor(int i) const { return factors[i]; }
  __device__ __forceinline__ A grad_output(int) const { return common_grad_output; }
  __device__ __forceinline__ bool counts(int i) const { return targets[i] != kDoesNotCount; }
  __device__ __forceinline__ int target(const Columns<T, kTarget, kWidth>&, int i) const { return targets[i]; }
  __device__ __forceinline__ T of_target(int i) const { return of_targets[i]; }

  __device__ __forceinline__ void prepare(int i, const RowTarget<T, kTarget>& row, const FinishedRow<A>& finished,
                                          T x_y) {
    maxima[i] = finished.max;
    factors[i] = !row.counts() ? A(0) : is_spread(kTarget) ? finished.scale : finished.scale * common_grad_output;
    targets[i] = row.counts() ? row.y : kDoesNotCount;
    const A e = math::exp_nonpositive(A(widen(x_y)) - finished.max);
    of_targets[i] = narrow<T>(logit_gradient(e, finished.scale, row.coefficient(), common_grad_output));
  }
};

// The target class comes after the others, from the thread that has it.
template <bool kKept, typename T, TargetKind kTarget, int kWidth, typename Gradient>
__device__ __forceinline__ void write_columns(const Columns<T, kTarget, kWidth>& rows, const Gradient& gradient) {
  using A = AccumulateType<T>;
  constexpr int kPacks = kColumnPacks<is_spread(kTarget)> / 2;
  A max[kWidth], factor[kWidth], grad_output[kWidth];
  RowsThatCount<T, kWidth> count;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    max[i] = gradient.max(i);
    factor[i] = gradient.factor(i);
    if constexpr (is_spread(kTarget)) grad_output[i] = gradient.grad_output(i);
    if (gradient.counts(i)) count.add(i);
  }
  const int64_t stride = rows.o.grad_strides.classes;
  with_spread<kTarget>(rows.o, [&](auto spread) {
    for_each_tile<kPacks, /*kReverse=*/true, kKept>(rows, [](int) {}, [&](const auto& tile, int) {
      T* p = rows.grad + tile.first * stride;
      const int64_t step = stride << rows.shift;
      tile.for_each_pack([&](int k) {
        const A w = is_weighted(decltype(spread)::value) ? rows.o.weight_of(tile.class_of(rows, k)) : A(1);
        A values[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const A e = math::exp_nonpositive(tile.x[k][i] - max[i]);
          if constexpr (is_spread(kTarget)) {
            const A q = tile.template coefficient<decltype(spread)::value>(rows, k, i, w);
            values[i] = logit_gradient(e, factor[i], q, grad_output[i]);
          } else {
            values[i] = e * factor[i];
          }
        }
        count.store(p + k * step, values);
      });
    });
  });
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int y = gradient.target(rows, i);
    if (y < 0) continue;
    const int64_t in_row = kWidth == 1 ? 0 : i;  // of more rows than one, the next one is the next element
    rows.grad[in_row + y * stride] = gradient.of_target(i);
  }
}

// ---- The kernels

// A block has all classes of its rows.
template <typename T, TargetKind kTarget, int kWidth>
__global__ void __launch_bounds__(kColumnThreads<T, kTarget>, (kForwardBlocks<T, kTarget>))
    forward_columns(const Problem<T> o) {
  using A = AccumulateType<T>;
  constexpr bool kKeeps = kWidth > 1;  // what the gradient is made of; others read it again
  const RowPlan& plan = o.plan;
  const ColumnPlan& columns = plan.of_columns;
  const ColumnMemory<T, kTarget, kWidth> memory(columns);
  const bool wants_gradient = o.grad_logits != nullptr;
  let_next_launch_start();
  Partial sum = {};
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x; first < columns.units; first += plan.step) {
    RowState<A> state[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) state[i] = empty_row_state<A>();
    const bool is_there = first + threadIdx.x < columns.units;
    if (threadIdx.y == 0 && is_there && o.target_index != nullptr)
      fetch_to_cache(o.target_index + (first + threadIdx.x) * kWidth);
    if (is_there)
      absorb_columns<kKeeps ? Keeping::kIfThereAreSlots : Keeping::kNever>(
          state, Columns<T, kTarget, kWidth>(o, first + threadIdx.x, int(threadIdx.y)));
    const int threads = int(blockDim.x * blockDim.y), in_block = threadIdx.y * blockDim.x + threadIdx.x;
    // The target of this thread's next row in step 3.
    int64_t next_target = o.target_at(first * kWidth + (in_block >> columns.sets_shift));
    leave_states(memory, state);
    wait_for_launch_before();  // for total_weight
    const A grad_output = wants_gradient ? with_mean(o, A(1)) : A(0);  // nobody has sent one yet
    for_each_merged_row(memory, columns.sets_shift, [&](int of_block, int place, const RowState<A>& merged, int part) {
      const int64_t number = first * kWidth + of_block, target = next_target;
      next_target = o.target_at(number + (threads >> columns.sets_shift));
      if (part != 0 || number >= plan.rows) return;
      const RowTarget<T, kTarget> row(o, number, o.class_of(target));
      const A scale = scale_of(row, merged);
      const T x_y = row.y >= 0 ? logit_of_target<kWidth, kKeeps>(row, of_block) : T();
      finish_row(row, merged, scale, x_y, sum);
      if (wants_gradient)
        prepare_gradient(memory, columns.last_set, place, row, merged.max, scale, grad_output, true, x_y);
    });
    if (!wants_gradient) continue;
    __syncthreads();
    if (is_there)
      write_columns<kKeeps>(Columns<T, kTarget, kWidth>(o, first + threadIdx.x, int(threadIdx.y)),
                            GradientInMemory<T, kTarget, kWidth>{memory, columns.last_set});
  }
  leave(o, sum);
}

// A thread has all classes of its rows: nothing is exchanged, and what a row costs besides its classes is done for the
// thread's rows side by side. kTrains: the gradient is wanted. Without it registers suffice for more threads, if the
// targets are fetched to the cache only, where eight of them take none.
template <typename T, TargetKind kTarget, int kWidth, bool kTrains>
__global__ void __launch_bounds__(kColumnThreadsAcross, (kAloneBlocks<T, kTarget, kTrains>))
    forward_columns_alone(const Problem<T> o) {
  using A = AccumulateType<T>;
  constexpr bool kKeeps = kTrains && kWidth > 1;
  const RowPlan& plan = o.plan;
  let_next_launch_start();
  Partial sum = {};
  for (int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; unit < plan.of_columns.units; unit += plan.step) {
    const Columns<T, kTarget, kWidth> rows(o, unit, 0);
    const int64_t first = unit * kWidth;
    int64_t target[kWidth];
    RowState<A> state[kWidth];
    const auto ask_for_targets = [&] {
      if constexpr (kWidth % 2 == 0) {
        if (o.target_index && reinterpret_cast<uintptr_t>(o.target_index) % sizeof(longlong2) == 0) {
#pragma unroll
          for (int i = 0; i < kWidth; i += 2) {
            const auto pair = *reinterpret_cast<const longlong2*>(o.target_index + first + i);
            target[i] = pair.x;
            target[i + 1] = pair.y;
          }
          return;
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) target[i] = o.target_index ? o.target_index[first + i] : -1;
    };
    if constexpr (kTrains) ask_for_targets();
    else if (o.target_index) fetch_to_cache(o.target_index + first);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) state[i] = empty_row_state<A>();
    absorb_columns<kKeeps ? Keeping::kAlways : Keeping::kNever>(state, rows);
    if constexpr (!kTrains) ask_for_targets();
    wait_for_launch_before();  // for total_weight
    GradientOfOwn<T, kTarget, kWidth> gradient;
    gradient.common_grad_output = kTrains ? with_mean(o, A(1)) : A(0);  // nobody has sent one yet
    A loss[kWidth], scale[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const RowTarget<T, kTarget> row(o, first + i, o.class_of(target[i]));
      const T x_y = row.y < 0 ? T() : rows.template logit<kKeeps>(row.y, i);
      const auto finished = loss_of_row(row, state[i], scale_of(row, state[i]), x_y, sum);
      loss[i] = finished.loss;
      scale[i] = finished.scale;
      gradient.prepare(i, row, finished, x_y);
    }
    store_values(static_cast<A*>(o.row_max) + first, gradient.maxima);
    store_values(static_cast<A*>(o.row_scale) + first, scale);
    if (o.reduction == Reduction::kNone) store_loss<T>(o.loss, o.loss_dtype != o.dtype, first, loss);
    if constexpr (kTrains) write_columns<kKeeps>(rows, gradient);
  }
  leave(o, sum);
}

// A block has a part of the classes of its rows, and leaves what it knows of each row to finish_split.
template <typename T, TargetKind kTarget, int kWidth>
__global__ void __launch_bounds__(kApartThreads, (kApartBlocks<T, kTarget>)) forward_split_columns(const Problem<T> o) {
  using A = AccumulateType<T>;
  const RowPlan& plan = o.plan;
  const ColumnPlan& columns = plan.of_columns;
  const ColumnMemory<T, kTarget, kWidth> memory(columns);
  const ColumnBlock block(o, plan, /*reverse=*/false);
  let_next_launch_start();
  for (int64_t first = int64_t(block.group) * blockDim.x; first < columns.units; first += plan.step) {
    RowState<A> state[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) state[i] = empty_row_state<A>();
    if (first + threadIdx.x < columns.units)
      absorb_columns<Keeping::kNever>(
          state, Columns<T, kTarget, kWidth>(o, first + threadIdx.x, int(threadIdx.y), block.begin, block.end));
    leave_states(memory, state);
    for_each_merged_row(memory, columns.sets_shift, [&](int of_block, int, const RowState<A>& merged, int part) {
      const int64_t number = first * kWidth + of_block;
      if (part == 0 && number < plan.rows)
        static_cast<RowState<A>*>(o.scratch)[number * plan.blocks + block.rank] = merged;
    });
  }
}

// No thread waits for another block: the rows' statistics are known.
template <typename T, TargetKind kTarget, int kWidth>
__global__ void __launch_bounds__(kApartThreads, (kApartBlocks<T, kTarget>))
    backward_columns(const Problem<T> o) {
  wait_for_launch_before();
  if (gradient_is_ready<T>(o)) return;
  using A = AccumulateType<T>;
  const RowPlan& plan = o.plan;
  const ColumnPlan& columns = plan.of_columns;
  const ColumnMemory<T, kTarget, kWidth> memory(columns);
  const ColumnBlock block(o, plan, /*reverse=*/true);
  const int threads = int(blockDim.x * blockDim.y);
  A grad_output = with_mean(o, grad_output_at<T>(o, 0));
  for (int64_t first = int64_t(block.group) * blockDim.x; first < columns.units; first += plan.step) {
    __syncthreads();  // the rows before have been read
#pragma unroll 2
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < int(blockDim.x) * kWidth; i += threads) {
      const int64_t number = first * kWidth + i;
      if (number >= plan.rows) continue;
      const RowTarget<T, kTarget> row(o, number, o.class_of(o.target_at(number)));
      if (o.grad_output_stride != 0) grad_output = with_mean(o, grad_output_at<T>(o, number));
      const bool here = row.y >= block.begin && row.y < block.end;
      const T x_y = here ? logit_of_target<kWidth, false>(row, i) : T();
      prepare_gradient(memory, columns.last_set, memory.place(i / kWidth, i % kWidth), row,
                       static_cast<const A*>(o.row_max)[number], static_cast<const A*>(o.row_scale)[number],
                       grad_output, here, x_y);
    }
    __syncthreads();
    if (first + threadIdx.x < columns.units)
      write_columns<false>(
          Columns<T, kTarget, kWidth>(o, first + threadIdx.x, int(threadIdx.y), block.begin, block.end),
          GradientInMemory<T, kTarget, kWidth>{memory, columns.last_set});
  }
}

}  // namespace fusedloss::cuda
