// A plan selects the kernel for the rows, and the threads that share a row. The host makes it from the sizes, the
// layout and the properties of the device (cross_entropy_plan_rows.h, cross_entropy_plan_columns.h). The kernels only
// follow it.
#pragma once

#include "kernels/cuda/cross_entropy_target.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/integers.h"
#include "kernels/options.h"

namespace fusedloss::cuda {

// The forward pass also writes the gradient if options.grad_logits is not null.
enum class Pass { kForward, kBackward };

enum class RowKernel : int32_t {
  // Forward pass.
  kFewClasses,          // forward_few_classes: a thread takes a row
  kRowsInRegisters,     // forward_rows_in_registers: some lanes of a warp take a row, and keep it for its gradient
  kRowsInSharedMemory,  // forward_rows: lanes, a block or a cluster takes a row, and keeps it for its gradient
  kRowsLossOnly,        // forward_rows_loss_only: lanes or a block takes a row; no gradient is written
  kSplitRows,           // the same kernel, where several blocks share a row; finish_split_rows follows
  kColumnsOfThread,     // forward_columns_of_thread: a thread takes all classes of its rows
  kColumnsOfBlock,      // forward_columns: a block takes all classes of its rows
  kSplitColumns,        // forward_columns_split: several blocks share the rows; finish_split_rows follows
  // Backward pass, and the gradient of split rows.
  kBackwardFewClasses,
  kBackwardRows,
  kBackwardColumns,
};

// Columns are rows that are neighbours in memory. See cross_entropy_columns.cuh.
struct ColumnPlan {
  int width = 1;               // neighbouring rows that a thread takes together: one unit
  int64_t units = 0;           // units of all rows; RowPlan::step counts units
  int kept_vectors = 0;        // 16-byte vectors that the block keeps in shared memory, before its exchange area
  int64_t exchange_bytes = 0;  // shared memory through which the block's threads exchange statistics and factors
  int classes_of_block = 0;    // if blocks share rows: classes of each block; the last block may have fewer
  unsigned groups = 1;         // groups of blocks that share rows
  // Sets of statistics in shared memory, see ColumnSharedMemory.
  int sets_shift = 0;  // log2 of the number of sets that the block's threads store, starting with set 0
  int last_set = 0;    // the set that holds what the gradient needs
  int sets = 1;
};

// A block has (threads of a row, rows) threads. For columns it has (threads side by side, threads of a row) instead,
// because the neighbours of an element in memory belong to other rows.
struct RowPlan {
  dim3 block = 1;
  unsigned grid = 1;
  RowKernel kernel = RowKernel::kRowsLossOnly;
  int64_t rows = 0, step = 0;  // step: from a row of a block to the row that it takes next
  int blocks = 1;              // blocks that share a row, as a cluster or split
  int blocks_shift = 0;        // log2 of `blocks`, if that is a power of two
  int threads_shift = 0;       // log2 of the threads that share a row, over all its blocks
  bool cluster = false;        // the blocks that share a row are a cluster
  bool shifted = false;        // the gradient's rows are aligned differently from the logits' rows
  int row_pitch = 0;           // few classes: bytes from one row to the next in shared memory
  // For kRowsInSharedMemory, see cross_entropy_row_pipeline.cuh. Columns use `slots`, too.
  int tiles = 0;  // tiles that a thread has of a row
  int depth = 0;  // how many of these tiles have slots in shared memory
  int slots = 0;  // slots of a thread, one vector each; fewer than `depth` whole tiles need if the row ends earlier
  ColumnPlan columns;
  int64_t shared_bytes = 0;  // per block

  bool is_split() const { return kernel == RowKernel::kSplitRows || kernel == RowKernel::kSplitColumns; }

  LaunchShape shape(const CrossEntropyOptions& o, bool overlaps) const {
    return {grid, block, cluster ? blocks : 1, shared_bytes, overlaps && o.tuning.overlap};
  }

  // True if the grid depends on how many blocks the device holds at once. See limit_grid.
  bool has_limited_grid() const {
    return kernel == RowKernel::kRowsInSharedMemory || kernel == RowKernel::kRowsLossOnly;
  }

  // Limits the grid so that each block takes several rows in turn. Loss-only rows, and 16-bit rows of class
  // probabilities, get a few times as many blocks as the device holds at once (tuning.waves). Where a gradient of class
  // indices or of float32 is written, such a limit was up to 8 % slower on an H200, as if blocks that never end stayed
  // in step with one another, and read and wrote at the same times. There is one exception: where rows of 16-bit
  // elements are so long that a multiprocessor holds no more than two blocks, a block takes two rows. It copies the
  // second while it still works on the first, which is 2 to 3 % faster.
  void limit_grid(const CrossEntropyOptions& o, int64_t resident_blocks) {
    const bool is_16_bit = bytes_of(o.dtype) == 2;
    if (kernel == RowKernel::kRowsLossOnly || (o.target_probability != nullptr && is_16_bit)) {
      limit_grid_to(o.tuning.waves * resident_blocks);
    } else if (!cluster && is_16_bit && resident_blocks <= 2 * o.tuning.multiprocessors) {
      limit_grid_to(divide_up(grid, 2));
    }
  }

 private:
  void limit_grid_to(int64_t most) {
    const int64_t groups = larger(1, smaller(grid, most) / blocks);
    grid = unsigned(groups * blocks);
    step = groups * block.y;
  }
};

inline int log2_of(int64_t power) {
  int shift = 0;
  while (int64_t(1) << shift < power) ++shift;
  return shift;
}

inline unsigned grid_size(const CrossEntropyOptions& o, int64_t rows_of_block, int64_t blocks_together = 1) {
  const int64_t groups = divide_up(o.rows(), rows_of_block), most = larger(1, o.tuning.max_blocks / blocks_together);
  return unsigned(smaller(groups, most) * blocks_together);
}

// ---- Constants that plans and kernels share

// Blocks per multiprocessor that fill the device. With fewer rows than such blocks, more threads share a row.
constexpr int kFullDeviceBlocks = 8;

// Vectors of logits that a thread holds at a time, and as many vectors of probabilities. More vectors mean more bytes
// in flight, but also more registers. The loop that writes the gradient takes half as many, because half of its traffic
// is stores.
FUSEDLOSS_ANYWHERE constexpr int tile_vectors(TargetKind kind) { return kind == TargetKind::kProbabilities ? 2 : 4; }
template <TargetKind kTarget>
constexpr int kTileVectors = tile_vectors(kTarget);
// The same for columns, where a vector is one class of several rows.
template <bool kSpread>
constexpr int kColumnTileVectors = kSpread ? 4 : 8;
constexpr int kRegisterVectors = 8;  // vectors of a row that a lane keeps in registers, in forward_rows_in_registers

// Shared memory for each vector of logits that is kept. Probabilities are kept beside the logits.
inline int64_t kept_bytes_of_vector(const CrossEntropyOptions& o) {
  return o.target_probability ? 2 * kVectorBytes : kVectorBytes;
}

}  // namespace fusedloss::cuda
