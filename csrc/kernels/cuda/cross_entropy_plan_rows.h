// The plans for rows whose classes are contiguous: rows taken by a thread, by some lanes of a warp, by a block or a
// cluster of blocks, and split rows.
#pragma once

#include "kernels/cuda/cross_entropy_launch_bounds.h"
#include "kernels/cuda/cross_entropy_plan.h"

namespace fusedloss::cuda {

// ---- Rows of a few classes

constexpr int kFewClasses = 16;  // maximum number of classes that a thread keeps in registers

// True for rows of a few classes that follow one another without gaps, starting at a 16-byte boundary. A block's rows
// are then one piece of memory that 16-byte accesses can read and write.
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

inline RowPlan plan_few_classes(const CrossEntropyOptions& o, Pass pass) {
  const int64_t bytes = bytes_of(o.dtype), row = o.classes * bytes;
  RowPlan plan;
  plan.kernel = pass == Pass::kForward ? RowKernel::kFewClasses : RowKernel::kBackwardFewClasses;
  plan.rows = o.rows();
  plan.block = dim3(kFewClassesThreads);
  plan.grid = grid_size(o, kFewClassesThreads);
  plan.step = int64_t(plan.grid) * kFewClassesThreads;
  // Rows that are whole 16-byte vectors get a gap of one word. Without it, the threads of a warp, which take a row
  // each, would use only every fourth bank or fewer. Other rows use every second bank at worst, and gaps between them
  // would rule out copies of 16 bytes.
  plan.row_pitch = int(row % kVectorBytes == 0 ? row + row_gap_bytes(bytes) : row);
  plan.shared_bytes = int64_t(plan.row_pitch) * kFewClassesThreads;
  return plan;
}

// ---- Longer rows

constexpr int64_t kManyRows = 16;           // per multiprocessor: with as many rows, few threads may take each
constexpr int64_t kFewRowsLaneDivisor = 4;  // with fewer rows, lanes take rows of up to tuning.warp_bytes / this
constexpr int64_t kNoGradientFactor = 2;    // without a gradient, lanes take rows this many times as long
constexpr int64_t kFewLanes = 8;            // rows that this many lanes can take do not get that factor per lane
constexpr int kMinBlockThreads = 128;       // minimum threads of a block that takes a row
constexpr int64_t kTilesForTwice = 6;       // minimum tiles of a thread before the number of threads doubles

// The properties of a row that its plan depends on.
struct RowShape {
  int64_t bytes, vectors;  // per row
  int64_t tile_vectors;    // that a thread takes at a time
  bool are_many;  // then few threads take each row, because each of them pays the cost of a row besides its classes
  bool keeps;     // the row is kept for the gradient, which this pass writes

  RowShape(const CrossEntropyOptions& o, Pass pass)
      : bytes(o.classes * bytes_of(o.dtype)),
        vectors(divide_up(bytes, kVectorBytes)),
        tile_vectors(cuda::tile_vectors(target_kind(o))),
        are_many(o.rows() >= kManyRows * o.tuning.multiprocessors),
        keeps(pass == Pass::kForward && o.grad_logits != nullptr) {}

  RowKernel kernel(Pass pass) const {
    return pass == Pass::kBackward ? RowKernel::kBackwardRows
           : keeps                 ? RowKernel::kRowsInSharedMemory
                                   : RowKernel::kRowsLossOnly;
  }
};

// True if the rows of the logits and of their gradient have the same offset from 16-byte boundaries.
inline bool are_aligned_alike(const CrossEntropyOptions& o) {
  const auto differ = [&](int64_t elements) { return elements * bytes_of(o.dtype) % kVectorBytes != 0; };
  const auto apart = reinterpret_cast<uintptr_t>(o.logits) - reinterpret_cast<uintptr_t>(o.grad_logits);
  return apart % kVectorBytes == 0 && !(o.outer > 1 && differ(o.logits_strides.outer - o.grad_strides.outer)) &&
         !(o.inner > 1 && differ(o.logits_strides.inner - o.grad_strides.inner));
}

inline bool fit_lanes(const CrossEntropyOptions& o, const RowShape& row) {
  const int64_t most = o.tuning.warp_bytes;
  return row.bytes <= (!row.are_many ? most / kFewRowsLaneDivisor : row.keeps ? most : kNoGradientFactor * most);
}

inline RowPlan plan_lane_rows(const CrossEntropyOptions& o, Pass pass, const RowShape& row) {
  const CudaTuning& t = o.tuning;
  // With a gradient the row's vectors are used twice, so they should stay in registers.
  const bool in_registers = row.keeps || row.vectors <= kFewLanes * t.lane_vectors;
  const int64_t of_lane = !row.are_many  ? row.tile_vectors
                          : in_registers ? t.lane_vectors
                                         : kNoGradientFactor * t.lane_vectors;
  unsigned lanes = 1;
  while (lanes < kWarp && (lanes * of_lane < row.vectors || (lanes < t.min_lanes && 2 * lanes <= row.vectors)))
    lanes *= 2;
  RowPlan plan;
  plan.block = dim3(lanes, kLaneBlockThreads / lanes);
  plan.kernel = row.keeps && row.vectors <= lanes * kRegisterVectors ? RowKernel::kRowsInRegisters : row.kernel(pass);
  return plan;
}

// The threads of each of the `blocks` that share a row.
inline dim3 threads_of_row(const CrossEntropyOptions& o, const RowShape& row, int blocks) {
  // Without a gradient, take many threads only where there are too few rows to fill the device with fewer threads.
  const bool many =
      row.keeps ? o.target_probability == nullptr : o.rows() < kFullDeviceBlocks * o.tuning.multiprocessors;
  const int64_t most = many ? o.tuning.block_threads : o.tuning.other_threads;
  unsigned threads = kMinBlockThreads;
  while (threads < most && row.vectors >= kTilesForTwice * threads * row.tile_vectors * blocks) threads *= 2;
  return dim3(threads);
}

// The number of blocks that share a row: more than 1 only where rows are few and long.
inline int64_t split_blocks(const CrossEntropyOptions& o) {
  const CudaTuning& t = o.tuning;
  if (o.rows() >= t.multiprocessors) return 1;
  const int64_t most = smaller(divide_up(kFullDeviceBlocks * t.multiprocessors, o.rows()), o.classes / t.split_classes);
  int64_t blocks = 1;
  while (2 * blocks <= most) blocks *= 2;
  return blocks;
}

inline RowPlan plan_split_rows(const CrossEntropyOptions& o, Pass pass, const RowShape& row) {
  RowPlan plan;
  plan.kernel = pass == Pass::kForward ? RowKernel::kSplitRows : RowKernel::kBackwardRows;
  plan.blocks = int(split_blocks(o));
  plan.block = threads_of_row(o, row, plan.blocks);
  return plan;
}

// One block takes a row, or a cluster of as many blocks as it takes to keep the row in shared memory.
inline RowPlan plan_block_rows(const CrossEntropyOptions& o, Pass pass, const RowShape& row) {
  const CudaTuning& t = o.tuning;
  const int64_t kept_bytes = row.vectors * kept_bytes_of_vector(o);
  RowPlan plan;
  plan.kernel = row.kernel(pass);
  if (row.keeps)
    while (2 * plan.blocks <= t.cluster_blocks && kept_bytes > plan.blocks * t.kept_bytes) plan.blocks *= 2;
  plan.cluster = plan.blocks > 1;
  plan.block = threads_of_row(o, row, plan.blocks);
  return plan;
}

// Gives slots in shared memory to all tiles of a row, or to as many whole tiles as fit.
inline void plan_slots(const CrossEntropyOptions& o, const RowShape& row, RowPlan& plan) {
  const int64_t of_thread = divide_up(row.vectors, int64_t(plan.block.x) * plan.blocks);
  const int64_t slot_bytes = kept_bytes_of_vector(o) * plan.block.x * plan.block.y;
  const int64_t room = o.tuning.kept_bytes / slot_bytes;
  plan.tiles = int(divide_up(of_thread, row.tile_vectors));
  plan.depth = of_thread <= room ? plan.tiles : int(smaller(plan.tiles, room / row.tile_vectors));
  plan.slots = int(smaller(of_thread, plan.depth * row.tile_vectors));
  plan.shared_bytes = plan.slots * slot_bytes;
}

inline RowPlan plan_rows(const CrossEntropyOptions& o, Pass pass) {
  const RowShape row(o, pass);
  RowPlan plan = fit_lanes(o, row)     ? plan_lane_rows(o, pass, row)
                 : split_blocks(o) > 1 ? plan_split_rows(o, pass, row)
                                       : plan_block_rows(o, pass, row);
  plan.rows = o.rows();
  plan.shifted = o.grad_logits != nullptr && !are_aligned_alike(o);
  plan.blocks_shift = log2_of(plan.blocks);
  plan.threads_shift = log2_of(int64_t(plan.block.x) * plan.blocks);
  plan.grid = grid_size(o, plan.block.y, plan.blocks);
  plan.step = int64_t(plan.grid / plan.blocks) * plan.block.y;
  if (plan.kernel == RowKernel::kRowsInSharedMemory) plan_slots(o, row, plan);
  return plan;
}

}  // namespace fusedloss::cuda
