// Which threads share a row. Decided on the host, from sizes and what the device has; the kernels only follow.
#pragma once

#include "kernels/cuda/launch.cuh"

namespace fusedloss::cuda {

constexpr int kRowThreads = 256;  // of a block that takes rows, at most
constexpr int kFewestRowThreads = 128;
constexpr int kLaneBlockThreads = 128;  // at most
constexpr int kVectorBytes = 16;

// What the target distribution of a row is made of. The kernels are compiled for each: probabilities take registers that
// other targets can do without.
enum class TargetKind { kIndex, kSmoothedIndex, kProbabilities };

// The target distribution is not 0 outside of the target class.
FUSEDLOSS_ANYWHERE constexpr bool is_spread(TargetKind kind) { return kind != TargetKind::kIndex; }

inline TargetKind target_kind(const CrossEntropyOptions& o) {
  return o.target_probability ? TargetKind::kProbabilities
         : o.is_spread()      ? TargetKind::kSmoothedIndex
                              : TargetKind::kIndex;
}

// Calls f(integral_constant of the TargetKind).
template <typename F>
auto on_target(const CrossEntropyOptions& o, F f) {
  switch (target_kind(o)) {
    case TargetKind::kProbabilities:
      return f(std::integral_constant<TargetKind, TargetKind::kProbabilities>());
    case TargetKind::kSmoothedIndex:
      return f(std::integral_constant<TargetKind, TargetKind::kSmoothedIndex>());
    default:
      return f(std::integral_constant<TargetKind, TargetKind::kIndex>());
  }
}

// How many vectors of logits a thread holds at a time, and as many of probabilities: bytes in flight against registers. In
// columns, where a vector is one class. The sweep that writes takes half of them: half of its traffic is its stores.
FUSEDLOSS_ANYWHERE constexpr int tile_vectors(TargetKind kind) { return kind == TargetKind::kProbabilities ? 2 : 4; }
template <TargetKind kTarget>
constexpr int kTileVectors = tile_vectors(kTarget);
// Of a row that some lanes of a warp share, in registers.
constexpr int kRegisterVectors = 8;
template <bool kSpread>
constexpr int kColumnTileVectors = kSpread ? 4 : 8;

// What more there is to say of columns: see cross_entropy_columns_plan.h.
struct ColumnPlan {
  int width = 1;              // rows that a thread takes side by side
  int64_t units = 0;          // of so many rows, in all; a step counts these
  int kept_vectors = 0;       // of 16 bytes, of the block, before what its threads exchange
  int64_t exchange_bytes = 0;
  int classes_of_block = 0;   // of blocks that share rows, each has so many classes, one behind another; the last may have fewer
  unsigned groups = 1;        // of blocks that share rows
  // Sets of statistics in shared memory, see ColumnSharedMemory:
  int sets_shift = 0;         // log2 of what a block's threads leave, from set 0 on
  int last_set = 0;           // what the gradient needs
  int sets = 1;
};

// A block has (threads of a row, rows) threads; in columns, (threads side by side, threads of a row), since there the
// neighbours of an element in memory are of other rows; and of rows of a few classes, a thread for each.
struct RowPlan {
  dim3 block = 1;
  unsigned grid = 1;
  bool columns = false;
  int row_pitch = 0;           // rows of a few classes: bytes from one to the next in shared memory; else 0
  int64_t rows = 0, step = 0;  // a block's rows of one turn and of the next are a step apart
  int blocks = 1;              // that share a row, if they are more: a power of two
  int blocks_shift = 0;        // log2 of them
  int threads_shift = 0;       // log2 of the threads that share a row, in all its blocks
  bool cluster = false;        // either in a cluster
  bool in_lanes = false;       // a row lies in the registers of some lanes of a warp: see cross_entropy_lanes.cuh
  bool shifted = false;        // a gradient's rows are aligned otherwise than the logits'
  bool split = false;          // or apart, to meet in scratch
  bool keeps = false;          // the threads keep what they have read in shared memory, for the gradient
  int tiles = 0;               // of a thread, in a row
  int depth = 0;               // so many tiles of a thread have slots in shared memory: see cross_entropy_stream.cuh
  int slots = 0;               // of a thread, each for a vector; fewer than `depth` tiles of them where a row ends sooner
  ColumnPlan of_columns;       // if they are

  LaunchShape shape(const CrossEntropyOptions& o, bool overlaps) const {
    const int64_t shared_bytes = row_pitch > 0 ? int64_t(row_pitch) * block.x
                                 : columns     ? of_columns.kept_vectors * kVectorBytes + of_columns.exchange_bytes
                                               : slots * kept_bytes_of_vector(o) * block.x * block.y;
    return {grid, block, cluster ? blocks : 1, shared_bytes, overlaps && o.tuning.overlap};
  }

  // As many blocks as the device holds at once, if there are fewer than rows: each then takes several rows in turn.
  void limit_grid(int64_t most) {
    const int64_t groups = larger(1, smaller(grid, most) / blocks);
    grid = unsigned(groups * blocks);
    step = groups * block.y;
  }

  static int64_t kept_bytes_of_vector(const CrossEntropyOptions& o) {
    return o.target_probability ? 2 * kVectorBytes : kVectorBytes;
  }
};

inline int log2_of(int64_t power) {
  int shift = 0;
  while (int64_t(1) << shift < power) ++shift;
  return shift;
}

inline unsigned grid_size(const CrossEntropyOptions& o, int64_t work_of_a_block, int64_t blocks_together = 1) {
  const int64_t groups = divide_up(o.rows(), work_of_a_block), most = o.tuning.max_blocks / blocks_together;
  return unsigned((groups < most ? groups : most > 0 ? most : 1) * blocks_together);
}

inline RowPlan plan_columns(const CrossEntropyOptions& o, bool with_exchange);  // cross_entropy_columns_plan.h

// Rows of so few classes that a thread keeps a row in registers, if they lie one behind another from a 16-byte boundary: then
// a block's rows are one piece of memory, which 16-byte accesses can take.
constexpr int kFewClasses = 16;
constexpr int kFewThreads = 128;

inline bool have_few_classes(const CrossEntropyOptions& o) {
  const auto fits = [&](const void* p, const Strides& strides) {
    return p == nullptr || (reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0 && strides.classes == 1 &&
                            (strides.outer == o.classes || o.outer == 1));
  };
  return o.inner == 1 && o.classes <= smaller(o.tuning.thread_classes, kFewClasses) &&
         fits(o.logits, o.logits_strides) && fits(o.grad_logits, o.grad_strides);
}

// The alignment in bytes of rows in shared memory that have a gap between them.
FUSEDLOSS_ANYWHERE constexpr int row_gap_bytes(int64_t bytes_of_element) { return bytes_of_element == 8 ? 8 : 4; }

inline RowPlan plan_few_classes(const CrossEntropyOptions& o) {
  const int64_t bytes = bytes_of(o.dtype), row = o.classes * bytes;
  RowPlan plan;
  plan.rows = o.rows();
  plan.block = dim3(kFewThreads);
  plan.grid = grid_size(o, kFewThreads);
  plan.step = int64_t(plan.grid) * kFewThreads;
  // Rows of whole vectors lie a word further apart: a warp would else read its rows from every fourth bank or fewer. Other
  // rows meet in every second one at worst, and could not be copied by 16 bytes if they lay apart.
  plan.row_pitch = int(row % kVectorBytes == 0 ? row + row_gap_bytes(bytes) : row);
  return plan;
}

// Do the rows of the logits and of their gradient begin equally far behind 16-byte boundaries?
inline bool are_aligned_alike(const CrossEntropyOptions& o) {
  const auto differ = [&](int64_t elements) { return elements * bytes_of(o.dtype) % kVectorBytes != 0; };
  const auto apart = reinterpret_cast<uintptr_t>(o.logits) - reinterpret_cast<uintptr_t>(o.grad_logits);
  return apart % kVectorBytes == 0 && !(o.outer > 1 && differ(o.logits_strides.outer - o.grad_strides.outer)) &&
         !(o.inner > 1 && differ(o.logits_strides.inner - o.grad_strides.inner));
}

// `o` has at least one row.
// with_exchange: the threads of a row have to merge what they know; without, its statistics are known, as in the backward
// pass.
inline RowPlan plan_rows(const CrossEntropyOptions& o, bool with_exchange) {
  if (have_few_classes(o)) return plan_few_classes(o);
  const CudaTuning& t = o.tuning;
  const bool keeps = with_exchange && o.grad_logits != nullptr;
  const bool neighbours = o.logits_strides.classes == 1 &&
                          (o.grad_logits == nullptr || o.grad_strides.classes == 1) &&
                          (o.target_probability == nullptr || o.target_strides.classes == 1);
  if (!neighbours || o.classes <= t.thread_classes) return plan_columns(o, with_exchange);

  const int64_t vectors = divide_up(o.classes * bytes_of(o.dtype), kVectorBytes);
  const int64_t tile_vectors = cuda::tile_vectors(target_kind(o));
  const int64_t vector_bytes = RowPlan::kept_bytes_of_vector(o);
  RowPlan plan;
  plan.rows = o.rows();
  plan.shifted = o.grad_logits != nullptr && !are_aligned_alike(o);
  // Where there are rows enough, few threads take each: what a row costs besides its classes, it costs each thread.
  const bool many_rows = o.rows() >= 16 * t.multiprocessors;
  const int64_t warp_bytes = !many_rows ? t.warp_bytes / 4 : keeps ? t.warp_bytes : 2 * t.warp_bytes;
  if (o.classes * bytes_of(o.dtype) <= warp_bytes) {
    // A gradient takes the row's vectors once more, so that they should lie in registers.
    const int64_t most_of_lane = keeps || vectors <= 8 * t.lane_vectors ? t.lane_vectors : 2 * t.lane_vectors;
    const int64_t of_lane = many_rows ? most_of_lane : tile_vectors;
    unsigned lanes = 1;
    while (lanes < 32 && (lanes * of_lane < vectors || (lanes < t.min_lanes && 2 * lanes <= vectors))) lanes *= 2;
    plan.block = dim3(lanes, kLaneBlockThreads / lanes);
    plan.in_lanes = keeps && vectors <= lanes * kRegisterVectors;
  } else {
    const int64_t parts = divide_up(8 * t.multiprocessors, o.rows());
    const int64_t most_parts = smaller(parts, o.classes / t.split_classes);
    if (o.rows() < t.multiprocessors && most_parts >= 2) {
      while (2 * plan.blocks <= most_parts) plan.blocks *= 2;
      plan.split = true;
    } else if (keeps) {
      while (2 * plan.blocks <= t.cluster_blocks && vectors * vector_bytes > plan.blocks * t.kept_bytes) plan.blocks *= 2;
      plan.cluster = plan.blocks > 1;
    }
    // Without a gradient, many threads only where there are too few rows to fill the device otherwise.
    const bool many_threads = keeps ? o.target_probability == nullptr : o.rows() < 8 * t.multiprocessors;
    const int64_t most_threads = many_threads ? t.block_threads : t.other_threads;
    unsigned threads = kFewestRowThreads;
    while (threads < most_threads && vectors >= 6 * threads * tile_vectors * plan.blocks) threads *= 2;
    plan.block = dim3(threads);
  }
  plan.blocks_shift = log2_of(plan.blocks);
  plan.threads_shift = log2_of(int64_t(plan.block.x) * plan.blocks);
  plan.grid = grid_size(o, plan.block.y, plan.blocks);
  plan.step = int64_t(plan.grid / plan.blocks) * plan.block.y;
  if (!with_exchange || plan.in_lanes) return plan;

  // All tiles have slots, if there is room.
  plan.keeps = keeps && !plan.split;
  if (!plan.keeps) return plan;
  const int64_t of_thread = divide_up(vectors, int64_t(plan.block.x) * plan.blocks);
  const int64_t room = t.kept_bytes / (int64_t(plan.block.x) * plan.block.y * vector_bytes);
  plan.tiles = int(divide_up(of_thread, tile_vectors));
  plan.depth = of_thread <= room ? plan.tiles : int(smaller(plan.tiles, room / tile_vectors));
  plan.slots = int(smaller(of_thread, plan.depth * tile_vectors));
  return plan;
}

}  // namespace fusedloss::cuda

#include "kernels/cuda/cross_entropy_columns_plan.h"
