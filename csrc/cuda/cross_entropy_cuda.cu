// How a row of logits becomes a loss, and a gradient, on the GPU.
//
// Forward: a row's threads sweep its classes once. Each keeps the statistics of what it has seen (online softmax, see
// formulas/cross_entropy.h), a tile of several 16-byte vectors at a time: all loads, then the tile's maximum, one exp a
// class, one rescaling. Shuffles and shared memory merge the threads' statistics, and one thread makes the row's loss
// of them. For a mean or a sum, each block leaves the sum of its rows' losses in scratch, and a second launch, of one
// block, adds those. Backward: one more sweep; with the statistics at hand it needs no exchange.
//
// So the forward pass reads the logits once, and the backward pass reads them once and writes the gradient once.
// Nothing else is of that size: it takes as long as memory takes, as long as enough bytes are in flight.
//
// Two layouts, each with its kernels:
//   rows     a row's classes are neighbours in memory: a warp or a block takes a row
//   columns  anything else, at its best where rows are neighbours in memory, as in (N, C, d1, …): a thread takes a
//            row, and the loads of a warp are neighbours
#include "cuda/cross_entropy_cuda.h"

#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace fusedloss::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kColumnThreads = 128;
constexpr int kWarpsWithRows = 4;         // of a block whose warps take a row each
constexpr int64_t kMaxClasses = 1 << 30;  // within a row, indices are int

// Threads that a multiprocessor must hold at once. Said outright since the compiler, left to choose, spills registers
// to make room for a few more.
template <typename T, bool kSpread>
constexpr int kResident = kSpread || sizeof(T) == 8 ? 512 : 1024;

// ---- A row, its target distribution q, and the tiles it is swept in

// What a kernel is given.
template <typename T>
struct Problem : CrossEntropyOptions {
  explicit Problem(const CrossEntropyOptions& o)
      : CrossEntropyOptions(o), smoothing(make_smoothing<Statistic<T>>(o.label_smoothing, o.classes)) {}

  Smoothing<Statistic<T>> smoothing;
};

// kSpread: q is not 0 outside the target class, for there are probabilities or there is label smoothing.
template <typename T, bool kSpread>
struct Row {
  using A = Statistic<T>;

  const Problem<T>& o;
  const int64_t number;
  const int64_t outer, inner;  // its position
  const T* const logits;       // [classes]
  const T* const probability;  // [classes]; null for a class index
  const int y;                 // the target class; -1 for probabilities, and where there is none
  const A w_y;                 // its weight

  __device__ __forceinline__ Row(const Problem<T>& problem, int64_t row)
      : o(problem),
        number(row),
        outer(o.inner == 1 ? row : row / o.inner),
        inner(row - outer * o.inner),
        logits(at(o.logits, o.logits_strides)),
        probability(kSpread && o.target_probability ? at(o.target_probability, o.target_strides) : nullptr),
        y(kSpread && o.target_probability ? -1 : target_class(o.target_index[row])),
        w_y(y < 0 ? A(0) : weight(y)) {}

  // The row's first element in a tensor like the logits.
  __device__ __forceinline__ const T* at(const void* tensor, const Strides& strides) const {
    return static_cast<const T*>(tensor) + (outer * strides.outer + inner * strides.inner);
  }
  __device__ __forceinline__ int target_class(int64_t index) const {
    return index == o.ignore_index || index < 0 || index >= o.classes ? -1 : int(index);
  }
  __device__ __forceinline__ A weight(int c) const { return o.weight ? static_cast<const A*>(o.weight)[c] : A(1); }
  __device__ __forceinline__ A weight_sum() const {
    return o.weight_sum ? *static_cast<const A*>(o.weight_sum) : A(o.classes);
  }
  __device__ __forceinline__ bool has_probabilities() const { return kSpread && probability != nullptr; }
  // If not, the row adds nothing and is not even read: its target is ignored or, behind an assert, out of range.
  __device__ __forceinline__ bool counts() const { return has_probabilities() || y >= 0; }
};

// What a thread holds of a row at a time. More packs are more bytes in flight, and more registers.
template <typename T, bool kSpread, int kWidth>
struct Tile {
  static constexpr int kPacks = (kWidth == 1 ? 8 : 4) / (kSpread ? 2 : 1);

  Pack<T, kWidth> x[kPacks];
  Pack<T, kWidth> t[kPacks];  // probabilities only
  int first[kPacks];          // class of a pack's first element; -1 behind the row's end

  // The share's units from `unit` on. With kWidth = 1 the classes may lie apart.
  __device__ __forceinline__ Tile(const Row<T, kSpread>& row, const Share<T>& share, int unit) {
    const int units = share.template units<kWidth>();
#pragma unroll
    for (int k = 0; k < kPacks; ++k, unit += share.step) {
      first[k] = unit < units ? share.template first<kWidth>(unit) : -1;
      if (unit < units) x[k] = load<kWidth>(row.logits + offset(first[k], row.o.logits_strides));
    }
    if (!row.has_probabilities()) return;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first[k] >= 0) t[k] = load<kWidth>(row.probability + offset(first[k], row.o.target_strides));
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
    const Statistic<T> t_c = row.has_probabilities() ? t[k][j] : 0;
    return probability_coefficient(t_c, row.weight(first[k] + j), row.o.smoothing);
  }
};

// Calls f(tile) for every tile of a share whose units are kWidth classes wide.
template <int kWidth, typename T, bool kSpread, typename F>
__device__ __forceinline__ void sweep(const Row<T, kSpread>& row, const Share<T>& share, F f) {
  using RowTile = Tile<T, kSpread, kWidth>;
  for (int unit = share.thread; unit < share.template units<kWidth>(); unit += RowTile::kPacks * share.step)
    f(RowTile(row, share, unit));
}

// ---- Forward

// Sums over rows; in scratch, one for each block.
struct Partial {
  double loss, weight;
  bool bad_target;
};

// Adds a thread's share of the row to its statistics.
template <int kWidth, typename T, bool kSpread, typename A>
__device__ __forceinline__ void absorb(RowState<A>& state, const Row<T, kSpread>& row, const Share<T>& share) {
  sweep<kWidth>(row, share, [&](const Tile<T, kSpread, kWidth>& tile) {
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
  });
}

// The logit of the target class, asked for before the sweep so that nobody waits for it afterwards.
template <typename T, bool kSpread>
__device__ __forceinline__ Statistic<T> target_logit(const Row<T, kSpread>& row) {
  return row.y < 0 ? 0 : widen(row.logits[row.y * row.o.logits_strides.classes]);
}

// One thread of the row: statistics in, loss out. x_y is the target_logit.
template <typename T, bool kSpread, typename A>
__device__ __forceinline__ void finish_row(const Row<T, kSpread>& row, RowState<A> state, A x_y, Partial& sum) {
  const Problem<T>& o = row.o;
  A max = 0, inverse_sum = 0, loss[1] = {0};
  if (row.counts()) {
    max = state.max;
    inverse_sum = 1 / state.sum;
    const A logsum = math::log(state.sum);
    if (kSpread && row.y >= 0) state.mass = index_mass(A(0), row.weight_sum(), o.smoothing);  // not rounded C times
    if (kSpread) loss[0] = expected_negative_log_likelihood(state, logsum);
    if (row.y >= 0) loss[0] += o.smoothing.kept * row.w_y * negative_log_likelihood(x_y, max, logsum);
    sum.loss += double(loss[0]);
    sum.weight += row.has_probabilities() ? 1.0 : double(row.w_y);
  } else if (o.target_index[row.number] != o.ignore_index) {
    sum.bad_target = true;
  }
  static_cast<A*>(o.row_max)[row.number] = max;
  static_cast<A*>(o.row_inverse_sum)[row.number] = inverse_sum;
  if (o.reduction == Reduction::kNone) store_loss<T>(o.loss, o.loss_dtype != o.dtype, row.number, loss);
}

// All threads of the block. The assert waits until here since a call that may return costs registers around it.
__device__ __forceinline__ void finish_block(const CrossEntropyOptions& o, const Partial& of_thread) {
  assert(!of_thread.bad_target && "cross_entropy: a target is neither a class index nor ignore_index");
  if (o.reduction == Reduction::kNone) return;
  const Partial sum = {block_sum(of_thread.loss), block_sum(of_thread.weight), false};
  if (threadIdx.x + threadIdx.y == 0) static_cast<Partial*>(o.scratch)[blockIdx.x] = sum;
}

// A block has (threads of a row, rows) threads.
template <typename T, bool kSpread>
__global__ void __launch_bounds__(kMaxThreads, (kResident<T, kSpread> / kMaxThreads))
    forward_rows(const Problem<T> o) {
  Partial sum = {0, 0, false};
  const int64_t rows = o.outer * o.inner;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; i < rows; i += int64_t(gridDim.x) * blockDim.y) {
    const Row<T, kSpread> row(o, i);
    const auto x_y = target_logit(row);
    auto state = empty_row_state<Statistic<T>>();
    if (row.counts()) {
      const Share<T> share = {split(int(o.classes), row.logits, row.probability), int(threadIdx.x), int(blockDim.x)};
      absorb<kVector<T>>(state, row, share);
      absorb<1>(state, row, share);
      state = row_merge<kSpread>(state);
    }
    if (threadIdx.x == 0) finish_row(row, state, x_y, sum);
  }
  finish_block(o, sum);
}

template <typename T, bool kSpread>
__global__ void __launch_bounds__(kColumnThreads, (kResident<T, kSpread> / kColumnThreads))
    forward_columns(const Problem<T> o) {
  Partial sum = {0, 0, false};
  const int64_t rows = o.outer * o.inner;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows; i += int64_t(gridDim.x) * blockDim.x) {
    const Row<T, kSpread> row(o, i);
    const auto x_y = target_logit(row);
    auto state = empty_row_state<Statistic<T>>();
    if (row.counts()) absorb<1>(state, row, Share<T>{only_single<T>(int(o.classes)), 0, 1});
    finish_row(row, state, x_y, sum);
  }
  finish_block(o, sum);
}

// One block: the blocks' sums in a fixed order, and the mean's division.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) finish(const CrossEntropyOptions o, int blocks) {
  double loss_sum = 0, weight_sum = 0;
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
    loss_sum += static_cast<const Partial*>(o.scratch)[i].loss;
    weight_sum += static_cast<const Partial*>(o.scratch)[i].weight;
  }
  loss_sum = block_sum(loss_sum);
  weight_sum = block_sum(weight_sum);
  if (threadIdx.x != 0) return;
  const bool mean = o.reduction == Reduction::kMean;
  const double loss[1] = {mean ? divide_by_total_weight(loss_sum, weight_sum) : loss_sum};
  store_loss<T>(o.loss, o.loss_dtype != o.dtype, 0, loss);
  if (mean) *static_cast<Statistic<T>*>(o.total_weight) = Statistic<T>(weight_sum);
}

// ---- Backward
//
//   d loss/dx_c = mass * p_c - q_c      p_c = exp(x_c - row_max) * row_inverse_sum, mass = sum(q)
//
// times grad_output, which the mean divides by total_weight.

template <typename A>
struct RowGradient {
  A max, grad_output;
  A scale;  // mass * row_inverse_sum
  A q_y;    // what q has at a target class above the others: kept * w_y
};

// A thread's share of sum(q), which takes a sweep for probabilities.
template <int kWidth, typename T, bool kSpread>
__device__ __forceinline__ Statistic<T> mass_of_share(const Row<T, kSpread>& row, const Share<T>& share) {
  Statistic<T> mass = 0;
  sweep<kWidth>(row, share, [&](const Tile<T, kSpread, kWidth>& tile) {
    Statistic<T> of_tile = 0;
    tile.for_each([&](int k, int j) { of_tile += tile.coefficient(row, k, j); });
    mass += of_tile;
  });
  return mass;
}

// For a row that counts; `mass` is given for probabilities.
template <typename T, bool kSpread, typename A>
__device__ __forceinline__ RowGradient<A> row_gradient(const Row<T, kSpread>& row, A mass) {
  const Problem<T>& o = row.o;
  A g[1];
  load_loss<T>(o.grad_output, o.loss_dtype != o.dtype, row.number * o.grad_output_stride, g);
  if (o.reduction == Reduction::kMean) g[0] = divide_by_total_weight(g[0], *static_cast<const A*>(o.total_weight));
  if (row.y >= 0) mass = kSpread ? index_mass(row.w_y, row.weight_sum(), o.smoothing) : row.w_y;
  const A inverse_sum = static_cast<const A*>(o.row_inverse_sum)[row.number];
  return {static_cast<const A*>(o.row_max)[row.number], g[0], mass * inverse_sum,
          o.smoothing.kept * row.w_y};
}

// Writes a thread's share of the gradient.
template <int kWidth, typename T, bool kSpread, typename A>
__device__ __forceinline__ void write_gradient(T* grad, const Row<T, kSpread>& row, const RowGradient<A>& of_row,
                                               const Share<T>& share) {
  using RowTile = Tile<T, kSpread, kWidth>;
  sweep<kWidth>(row, share, [&](const RowTile& tile) {
    tile.for_each_pack([&](int k) {
      A values[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const A q = tile.coefficient(row, k, j) + (j == row.y - tile.first[k] ? of_row.q_y : 0);
        values[j] = logit_gradient(math::exp(tile.x[k][j] - of_row.max), of_row.scale, q, of_row.grad_output);
      }
      store_values(grad + RowTile::offset(tile.first[k], row.o.grad_strides), values);
    });
  });
}

// For a row that does not count: zeros, even where its logits are NaN.
template <int kWidth, typename T>
__device__ __forceinline__ void write_zeros(T* grad, int64_t class_stride, const Share<T>& share) {
  const Statistic<T> zeros[kWidth] = {};
  for (int unit = share.thread; unit < share.template units<kWidth>(); unit += share.step)
    store_values(grad + share.template first<kWidth>(unit) * class_stride, zeros);
}

// A block has (threads of a row, rows) threads.
template <typename T, bool kSpread>
__global__ void __launch_bounds__(kMaxThreads, (kResident<T, kSpread> / kMaxThreads))
    backward_rows(const Problem<T> o) {
  const int64_t rows = o.outer * o.inner;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; i < rows; i += int64_t(gridDim.x) * blockDim.y) {
    const Row<T, kSpread> row(o, i);
    T* grad = const_cast<T*>(row.at(o.grad_logits, o.grad_strides));  // [classes]
    const Share<T> share = {split(int(o.classes), row.logits, row.probability, grad), int(threadIdx.x),
                            int(blockDim.x)};
    if (!row.counts()) {
      write_zeros<kVector<T>>(grad, 1, share);
      write_zeros<1>(grad, 1, share);
      continue;
    }
    Statistic<T> mass = 0;
    if (row.has_probabilities()) mass = row_sum(mass_of_share<kVector<T>>(row, share) + mass_of_share<1>(row, share));
    const auto of_row = row_gradient(row, mass);
    write_gradient<kVector<T>>(grad, row, of_row, share);
    write_gradient<1>(grad, row, of_row, share);
  }
}

template <typename T, bool kSpread>
__global__ void __launch_bounds__(kColumnThreads, (kResident<T, kSpread> / kColumnThreads))
    backward_columns(const Problem<T> o) {
  const Share<T> share = {only_single<T>(int(o.classes)), 0, 1};
  const int64_t rows = o.outer * o.inner;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows; i += int64_t(gridDim.x) * blockDim.x) {
    const Row<T, kSpread> row(o, i);
    T* grad = const_cast<T*>(row.at(o.grad_logits, o.grad_strides));  // [classes], grad_strides.classes apart
    if (!row.counts()) {
      write_zeros<1>(grad, o.grad_strides.classes, share);
      continue;
    }
    const Statistic<T> mass = row.has_probabilities() ? mass_of_share<1>(row, share) : 0;
    write_gradient<1>(grad, row, row_gradient(row, mass), share);
  }
}

// ---- Launch

struct LaunchShape {
  bool columns, spread;
  dim3 grid, block;
};

LaunchShape launch_shape(const CrossEntropyOptions& o, int64_t grad_class_stride = 1) {
  const bool spread = o.target_probability != nullptr || o.label_smoothing > 0;
  const bool neighbours = o.logits_strides.classes == 1 && grad_class_stride == 1 &&
                          (o.target_probability == nullptr || o.target_strides.classes == 1);
  // With fewer classes than half a warp has lanes, a thread takes a row in the rows layout too.
  if (!neighbours || o.classes <= kWarp / 2) return {true, spread, grid_size(o.rows(), kColumnThreads), kColumnThreads};
  if (o.classes <= 1024) return {false, spread, grid_size(o.rows(), kWarpsWithRows), dim3(kWarp, kWarpsWithRows)};
  unsigned threads = 128;
  while (threads < kMaxThreads && o.classes / (2 * threads) >= 32) threads *= 2;  // 32 classes are a tile, or two
  return {false, spread, grid_size(o.rows(), 1), threads};
}

}  // namespace

int64_t cross_entropy_scratch_bytes(const CrossEntropyOptions& o) {
  return o.reduction == Reduction::kNone ? 0 : int64_t(launch_shape(o).grid.x) * int64_t(sizeof(Partial));
}

cudaError_t cross_entropy_forward(const CrossEntropyOptions& o, cudaStream_t stream) {
  if (o.classes > kMaxClasses) return cudaErrorInvalidValue;
  const LaunchShape shape = launch_shape(o);
  return on_dtype(o.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (o.rows() > 0) {
      const auto kernel = shape.columns ? (shape.spread ? forward_columns<T, true> : forward_columns<T, false>)
                                        : (shape.spread ? forward_rows<T, true> : forward_rows<T, false>);
      const cudaError_t error = launch(kernel, shape.grid, shape.block, stream, Problem<T>(o));
      if (error != cudaSuccess) return error;
    }
    if (o.reduction == Reduction::kNone) return cudaSuccess;
    return launch(finish<T>, 1, kMaxThreads, stream, o, int(shape.grid.x));
  });
}

cudaError_t cross_entropy_backward(const CrossEntropyOptions& o, cudaStream_t stream) {
  if (o.classes > kMaxClasses) return cudaErrorInvalidValue;
  if (o.rows() == 0 || o.classes == 0) return cudaSuccess;
  const LaunchShape shape = launch_shape(o, o.grad_strides.classes);
  return on_dtype(o.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = shape.columns ? (shape.spread ? backward_columns<T, true> : backward_columns<T, false>)
                                      : (shape.spread ? backward_rows<T, true> : backward_rows<T, false>);
    return launch(kernel, shape.grid, shape.block, stream, Problem<T>(o));
  });
}

}  // namespace fusedloss::cuda
