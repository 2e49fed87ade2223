// A plan names the kernel that processes the rows of a call, and how many threads share each row. The host makes it
// from the sizes, the layout and the properties of the device (cross_entropy_plan_rows.h,
// cross_entropy_plan_columns.h). The kernels only follow it. ARCHITECTURE.md has a glossary: row, column, unit, tile,
// slot, set, spread, split.
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
  kFewClasses,          // forward_few_classes: one thread processes a row
  kRowsInRegisters,     // forward_rows_in_registers: some lanes of a warp process a row, and keep it for its gradient
  kRowsInSharedMemory,  // forward_rows: lanes, a block or a cluster processes a row, and keeps it for its gradient
  kRowsLossOnly,        // forward_rows_loss_only: lanes or a block processes a row; no gradient is written
  kSplitRows,           // forward_rows_loss_only with several blocks per row; finish_split_rows follows
  kColumnsOfThread,     // forward_columns_of_thread: one thread processes all classes of its rows
  kColumnsOfBlock,      // forward_columns: one block processes all classes of its rows
  kSplitColumns,        // forward_columns_split: several blocks share the rows; finish_split_rows follows
  // Backward pass, and the gradient of split rows and split columns in the forward pass.
  kBackwardFewClasses,
  kBackwardRows,
  kBackwardColumns,
};

// In columns, adjacent elements belong to different rows, and the classes of a row lie apart. See
// cross_entropy_columns.cuh.
struct ColumnPlan {
  int width = 1;         // rows of one unit: a thread processes this many neighbouring rows together
  int64_t units = 0;     // total number of units; RowPlan::step counts units in columns
  int kept_vectors = 0;  // 16-byte vectors that the block keeps at the start of shared memory; the exchange follows
  int64_t exchange_bytes = 0;  // shared memory through which the block's threads exchange statistics and what the
                               // gradient needs of a row (cross_entropy_column_exchange.cuh)
  int classes_of_block = 0;    // if blocks share rows: classes of each block; the last block may have fewer
  unsigned groups = 1;         // groups of blocks that share rows
  // Sets of statistics in shared memory, see ColumnSharedMemory.
  int sets_shift = 0;  // log2 of the number of sets that the block's threads store, starting with set 0
  int last_set = 0;    // the set that holds what the gradient needs of each row; 0 if there is only one set
  int sets = 1;
};

// The dimensions of a block are (threads of a row, rows). For few classes they are (rows, 1). For columns they are
// (units, threads of a row): threads with consecutive threadIdx.x access neighbouring rows.
struct RowPlan {
  dim3 block = 1;
  unsigned grid = 1;
  RowKernel kernel = RowKernel::kRowsLossOnly;
  int64_t rows = 0, step = 0;  // step: stride of the loop over the rows, in rows (columns: in units)
  int blocks = 1;              // blocks that share a row: a cluster, or separate blocks (split)
  int blocks_shift = 0;        // log2 of `blocks`, if that is a power of two
  int threads_shift = 0;       // log2 of the threads that share a row, in all its blocks (columns: in one block)
  bool cluster = false;        // the blocks that share a row are a cluster
  bool shifted = false;        // the gradient's rows are aligned differently from the logits' rows
  int row_pitch = 0;           // few classes: bytes from one row to the next in shared memory
  // For kRowsInSharedMemory, see cross_entropy_row_pipeline.cuh. Columns use `slots`, too.
  int tiles = 0;  // tiles of each thread in a row
  int depth = 0;  // the first `depth` of these tiles are kept in slots in shared memory
  int slots = 0;  // slots of a thread, one vector each; the last tile may need fewer than a whole tile
  ColumnPlan columns;
  int64_t shared_bytes = 0;  // per block

  bool is_split() const { return kernel == RowKernel::kSplitRows || kernel == RowKernel::kSplitColumns; }

  // overlaps: the kernel may start before the previous kernel ends (launch.cuh).
  LaunchShape shape(const CrossEntropyOptions& o, bool overlaps) const {
    return {grid, block, cluster ? blocks : 1, shared_bytes, overlaps && o.tuning.overlap};
  }

  // True if the grid depends on how many blocks the device holds at once. See limit_grid.
  bool has_limited_grid() const {
    return kernel == RowKernel::kRowsInSharedMemory || kernel == RowKernel::kRowsLossOnly;
  }

  // Reduces the grid, so that each block loops over several rows, in the two cases where that is faster
  // (docs/experiments.md, measured on an H200):
  //   - No gradient is written, or the targets are 16-bit class probabilities. The grid gets at most tuning.waves times
  //     as many blocks as the device holds at once.
  //   - 16-bit class indices without a cluster, with rows so long that a multiprocessor holds at most two blocks. Half
  //     as many blocks copy the next row while they still work on the current one: 1.7 to 3.3 % faster.
  // In the other cases, in which a gradient of class indices or of float32 is written, a limit was up to 8 % slower.
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

// Enough blocks for all rows, in whole groups of `blocks_together` blocks, but about tuning.max_blocks at most.
inline unsigned grid_size(const CrossEntropyOptions& o, int64_t rows_of_block, int64_t blocks_together = 1) {
  const int64_t groups = divide_up(o.rows(), rows_of_block), most = larger(1, o.tuning.max_blocks / blocks_together);
  return unsigned(smaller(groups, most) * blocks_together);
}

// ---- Constants that plans and kernels share

// This many blocks per multiprocessor fill the device. Where there are fewer, most plans have more threads share a row.
constexpr int kFullDeviceBlocks = 8;

// The vectors of logits in a tile; a tile also has as many vectors of class probabilities, if these are the targets.
// More vectors mean more bytes in flight, but also more registers. The loop that writes the gradient processes half as
// many at a time, because half of its traffic is stores.
FUSEDLOSS_ANYWHERE constexpr int tile_vectors(TargetKind kind) { return kind == TargetKind::kProbabilities ? 2 : 4; }
template <TargetKind kTarget>
constexpr int kTileVectors = tile_vectors(kTarget);
// The same for columns, where a vector holds one class of ColumnPlan::width rows. kSpread: is_spread(TargetKind).
template <bool kSpread>
constexpr int kColumnTileVectors = kSpread ? 4 : 8;
constexpr int kRegisterVectors = 8;  // maximum vectors per lane in forward_rows_in_registers

// Shared memory for each vector of logits that is kept. Probabilities are kept beside the logits.
inline int64_t kept_bytes_of_vector(const CrossEntropyOptions& o) {
  return o.target_probability ? 2 * kVectorBytes : kVectorBytes;
}

}  // namespace fusedloss::cuda
