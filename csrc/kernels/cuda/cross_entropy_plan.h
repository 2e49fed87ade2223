// Which kernel takes the rows, and which threads share a row. The plan is made on the host, from sizes, layout and what
// the device has (cross_entropy_plan_rows.h, cross_entropy_plan_columns.h); the kernels only follow it.
#pragma once

#include "kernels/cuda/cross_entropy_target.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/integers.h"
#include "kernels/options.h"

namespace fusedloss::cuda {

// The forward pass writes the gradient, too, if options.grad_logits is not null.
enum class Pass { kForward, kBackward };

enum class RowKernel : int32_t {
  // Of the forward pass
  kFewClasses,          // forward_few_classes: a thread takes a row
  kRowsInRegisters,     // forward_rows_in_registers: some lanes of a warp take a row, and keep it for its gradient
  kRowsInSharedMemory,  // forward_rows: lanes, a block or a cluster takes a row, and keeps it for its gradient
  kRowsLossOnly,        // forward_rows_loss_only: lanes or a block; no gradient is wanted
  kSplitRows,           // the same kernel, where several blocks share a row; finish_split_rows follows
  kColumnsOfThread,     // forward_columns_of_thread: a thread takes all classes of its rows
  kColumnsOfBlock,      // forward_columns: a block does
  kSplitColumns,        // forward_columns_split: several blocks share the rows; finish_split_rows follows
  // Of the backward pass, and of the gradient of split rows
  kBackwardFewClasses,
  kBackwardRows,
  kBackwardColumns,
};

// Columns: rows that are neighbours in memory. See cross_entropy_columns.cuh.
struct ColumnPlan {
  int width = 1;         // rows that a thread takes side by side
  int64_t units = 0;     // of so many rows, in all; a step counts these
  int kept_vectors = 0;  // of 16 bytes, of the block, before what its threads exchange
  int64_t exchange_bytes = 0;
  int classes_of_block = 0;  // where blocks share rows, each has so many classes; the last one may have fewer
  unsigned groups = 1;       // of blocks that share rows
  // Sets of statistics in shared memory, see ColumnSharedMemory:
  int sets_shift = 0;  // log2 of the sets that a block's threads store, from set 0 on
  int last_set = 0;    // what the gradient needs
  int sets = 1;
};

// A block has (threads of a row, rows) threads. In columns it has (threads side by side, threads of a row), since there
// the neighbours of an element in memory are of other rows.
struct RowPlan {
  dim3 block = 1;
  unsigned grid = 1;
  RowKernel kernel = RowKernel::kRowsLossOnly;
  int64_t rows = 0, step = 0;  // a block's rows of one turn and of the next are a step apart
  int blocks = 1;              // that share a row; in a cluster, or split
  int blocks_shift = 0;        // log2 of them, where they are a power of two
  int threads_shift = 0;       // log2 of the threads that share a row, in all its blocks
  bool cluster = false;        // the blocks that share a row are a cluster
  bool shifted = false;        // a gradient's rows are aligned otherwise than the logits'
  int row_pitch = 0;           // of few classes: bytes from one row to the next in shared memory
  // Of kRowsInSharedMemory, see cross_entropy_row_pipeline.cuh; columns have slots, too.
  int tiles = 0;  // of a thread, in a row
  int depth = 0;  // so many tiles of a thread have slots in shared memory
  int slots = 0;  // of a thread, each for a vector; fewer than `depth` tiles take where a row ends
  ColumnPlan columns;
  int64_t shared_bytes = 0;  // of a block

  bool is_split() const { return kernel == RowKernel::kSplitRows || kernel == RowKernel::kSplitColumns; }

  LaunchShape shape(const CrossEntropyOptions& o, bool overlaps) const {
    return {grid, block, cluster ? blocks : 1, shared_bytes, overlaps && o.tuning.overlap};
  }

  // Does the grid depend on how many blocks the device holds at once? See limit_grid.
  bool has_limited_grid() const {
    return kernel == RowKernel::kRowsInSharedMemory || kernel == RowKernel::kRowsLossOnly;
  }

  // There are no more blocks than the device holds at once, some times over, and each takes several rows in turn; but
  // not where a gradient of class indices or of float32 is written, which was up to 8 % slower so on an H200, as if
  // blocks that never end stayed in step with one another, and read and wrote at the same times. Only of rows so long
  // that a multiprocessor holds no more than two blocks, a block takes two, and copies the second while it still works
  // on the first: 2 to 3 % faster with 16-bit elements.
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

// ---- What plans and kernels agree on

constexpr int kFullDeviceBlocks = 8;  // of a multiprocessor: so many blocks fill the device, and fewer rows are few

// How many vectors of logits a thread holds at a time, and as many of probabilities: bytes in flight against registers.
// In columns, where a vector is one class. The loop that writes the gradient takes half of them: half of its traffic is
// its stores.
FUSEDLOSS_ANYWHERE constexpr int tile_vectors(TargetKind kind) { return kind == TargetKind::kProbabilities ? 2 : 4; }
template <TargetKind kTarget>
constexpr int kTileVectors = tile_vectors(kTarget);
template <bool kSpread>
constexpr int kColumnTileVectors = kSpread ? 4 : 8;
constexpr int kRegisterVectors = 8;  // of a row that some lanes of a warp keep in registers, for each lane

// In shared memory, of each vector of logits that is kept: probabilities are kept beside them.
inline int64_t kept_bytes_of_vector(const CrossEntropyOptions& o) {
  return o.target_probability ? 2 * kVectorBytes : kVectorBytes;
}

}  // namespace fusedloss::cuda
