// The plan for columns: rows that are neighbours in memory, and rows of very few classes that lie apart.
#pragma once

#include "kernels/cuda/cross_entropy_launch_bounds.h"
#include "kernels/cuda/cross_entropy_plan.h"

namespace fusedloss::cuda {

// Minimum classes of a thread, where there is a choice: as many as it has loads in flight.
constexpr int64_t kMinColumnClasses = 8;

// Where one block takes all classes of its rows.
constexpr int kKeptBytesAcross = 64;     // minimum bytes of a class that a block reads side by side, if it keeps them
constexpr int kUnkeptBytesAcross = 128;  // the same if it keeps nothing, so that they take no shared memory
constexpr int kSmallColumnBlock = 128;   // maximum threads of a small block
// Threads that a multiprocessor must be able to hold at once, in larger and in small blocks.
constexpr int kResidentColumnThreads = 512, kResidentSmallBlockThreads = 384;

// Where several blocks share the same rows.
constexpr int kSplitBytesAcross = 256;  // bytes of a class that a block reads side by side
constexpr int64_t kSplitTiles = 4;  // minimum tiles of kMinColumnClasses classes per thread, where there is a choice
constexpr int64_t kSplitWaves = 2;  // minimum waves of blocks, if each thread then has kSplitTiles tiles
constexpr int64_t kSplitWavesTried = 4;  // how many numbers of waves are tried, from the fewest on
constexpr int64_t kSplitStart = 2;       // the wait for a block's first tile, in tiles that it could take meanwhile

// Statistics of a row that threads exchange: its maximum and sum; for spread targets also dot and mass.
template <bool kSpread>
constexpr int kStateArrays = kSpread ? 4 : 2;

constexpr int kBanks = 32;  // banks of shared memory

// In shared memory, the values for the i-th rows of all threads side by side begin i strides after the values for their
// first rows. If the stride were a multiple of kBanks, all rows of a thread would lie in the same bank.
FUSEDLOSS_ANYWHERE int column_stride(int threads, int width) {
  return threads >= kBanks && width > 1 ? threads + kBanks / width : threads;
}
FUSEDLOSS_ANYWHERE int column_places(int threads, int width) { return column_stride(threads, width) * width; }

// The number of rows that one 16-byte access reaches, or 1. Loads and stores must be aligned. The rows must be
// neighbours in memory, which means they share one outer index; so the inner size must be a multiple of that number.
inline int column_width(const CrossEntropyOptions& o) {
  const int64_t width = kVectorBytes / bytes_of(o.dtype);
  const auto fits = [&](const void* p, const Strides& strides) {
    return p == nullptr || (reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0 && strides.inner == 1 &&
                            strides.classes % width == 0 && strides.outer % width == 0);
  };
  const bool all_fit = o.inner % width == 0 && fits(o.logits, o.logits_strides) &&
                       fits(o.grad_logits, o.grad_strides) && fits(o.target_probability, o.target_strides);
  return all_fit ? int(width) : 1;
}

// Lays out the shared memory. Threads of a warp that have the same rows store one set of statistics together. Each
// other thread along the classes stores a set of its own.
inline void plan_column_memory(const CrossEntropyOptions& o, RowPlan& plan) {
  ColumnPlan& c = plan.columns;
  const int threads_of_set = plan.block.x < kWarp ? int(kWarp / plan.block.x) : 1;
  const int sets = int(plan.block.y) / threads_of_set;
  c.sets_shift = log2_of(sets);
  c.last_set = sets > 1 ? sets : 0;  // if there is one set, what the gradient needs of a row replaces its statistics
  c.sets = c.last_set + 1;
  const int64_t places = column_places(int(plan.block.x), c.width), bytes = bytes_of(o.dtype);
  const int64_t arrays = o.is_spread() ? kStateArrays<true> : kStateArrays<false>;
  const int64_t value_bytes = bytes == 8 ? 8 : 4;
  const int64_t all = places * (c.sets * arrays * value_bytes + int64_t(sizeof(int)) + bytes);
  c.exchange_bytes = divide_up(all, kVectorBytes) * kVectorBytes;
}

// Plans blocks that take all classes of their rows. Returns false if a block cannot keep them in shared memory. Rows
// that are not taken side by side are never kept. A block still takes all classes of as many of them as it could keep,
// because the cache may hold them until they are read again.
inline bool plan_whole_columns(const CrossEntropyOptions& o, RowPlan& plan) {
  const CudaTuning& t = o.tuning;
  ColumnPlan& c = plan.columns;
  const bool keeps = o.grad_logits != nullptr && c.width > 1;
  const int64_t bytes_of_class = c.width == 1 ? bytes_of(o.dtype) : kept_bytes_of_vector(o);  // per thread
  const unsigned most_threads = unsigned(kColumnThreads.of(o.dtype == DType::kFloat64, target_kind(o)));
  const unsigned least_x = unsigned((keeps ? kKeptBytesAcross : kUnkeptBytesAcross) / (c.width * bytes_of(o.dtype)));

  unsigned x = kColumnThreadsAcross, y = 1;
  // Shared memory for a block. tuning.kept_bytes is half of what a multiprocessor has.
  const auto room = [&] {
    const int resident = x * y > kSmallColumnBlock ? kResidentColumnThreads : kResidentSmallBlockThreads;
    return 2 * t.kept_bytes * (x * y) / resident;
  };
  const auto fits = [&] {
    plan.block = dim3(x, y);
    plan_column_memory(o, plan);
    if (y == 1) c.exchange_bytes = 0;  // no other thread has the thread's rows
    return o.classes * x * bytes_of_class <= room() - c.exchange_bytes;
  };
  const auto more_threads = [&] {
    return o.classes >= 2 * y * kMinColumnClasses &&
           (!fits() || divide_up(c.units, x) < kFullDeviceBlocks * t.multiprocessors);
  };
  while (x > least_x && more_threads()) x /= 2, y *= 2;
  while (x * y < most_threads && more_threads()) y *= 2;
  if (!fits()) return false;
  if (keeps) {
    plan.slots = int(divide_up(o.classes, y));
    c.kept_vectors = int(plan.slots * bytes_of_class / kVectorBytes * x * y);
  }
  plan.kernel = y > 1 ? RowKernel::kColumnsOfBlock : RowKernel::kColumnsOfThread;
  return true;
}

// The threads of a block that shares its rows with other blocks. It reads 256 bytes of a class side by side: on an
// H200, both more and fewer bytes took longer. With more threads along the classes, there are fewer blocks whose
// statistics must be merged.
inline dim3 split_column_threads(const CrossEntropyOptions& o, const ColumnPlan& c) {
  unsigned x = kColumnThreadsAcross, y = 1;
  const auto has_tiles_for = [&](int64_t threads, int64_t tiles) {
    return o.classes >= threads * tiles * kMinColumnClasses;
  };
  while (2 * c.units <= x && has_tiles_for(2 * y, 1)) x /= 2, y *= 2;
  while (x * c.width * bytes_of(o.dtype) > kSplitBytesAcross && has_tiles_for(2 * y, kSplitTiles)) x /= 2, y *= 2;
  while (x * y < kSplitColumnThreads && has_tiles_for(2 * y, 1) &&
         divide_up(c.units, x) < kFullDeviceBlocks * o.tuning.multiprocessors)
    y *= 2;
  return dim3(x, y);
}

// Plans several blocks for the same rows. Nothing is kept, and no thread waits for another block. Each block has a
// range of classes that is a whole number of tiles, so that the number of blocks can be chosen to fill the device to
// the end. They fill it a few times over if their threads then have enough classes, because blocks differ in how long
// they take.
inline void plan_split_columns(const CrossEntropyOptions& o, RowPlan& plan) {
  ColumnPlan& c = plan.columns;
  plan.kernel = RowKernel::kSplitColumns;
  plan.block = split_column_threads(o, c);
  plan_column_memory(o, plan);

  const int64_t threads = plan.block.x * plan.block.y;
  const int64_t of_multiprocessor =
      kSplitColumnsBlocks.of(o.dtype == DType::kFloat64, target_kind(o)) * kSplitColumnThreads / threads;
  const int64_t resident = o.tuning.multiprocessors * of_multiprocessor, groups = divide_up(c.units, plan.block.x);
  const int64_t tiles = divide_up(o.classes, plan.block.y * kMinColumnClasses);
  const auto blocks_of = [&](int64_t waves) { return larger(1, waves * resident / groups); };
  const auto has_tiles = [&](int64_t waves) { return blocks_of(waves) * kSplitTiles <= tiles; };
  int64_t fewest = kSplitWaves, least_time = INT64_MAX, of_block = tiles;
  while (fewest > 1 && !has_tiles(fewest)) --fewest;
  for (int64_t waves = fewest; waves == fewest || (waves < fewest + kSplitWavesTried && has_tiles(waves)); ++waves) {
    const int64_t each = divide_up(tiles, blocks_of(waves));
    const int64_t time = divide_up(divide_up(tiles, each) * groups, resident) * (each + kSplitStart);
    if (time < least_time) least_time = time, of_block = each;
  }
  plan.blocks = int(divide_up(tiles, of_block));
  c.classes_of_block = int(of_block * plan.block.y * kMinColumnClasses);
}

inline RowPlan plan_columns(const CrossEntropyOptions& o, Pass pass) {
  RowPlan plan;
  ColumnPlan& c = plan.columns;
  plan.rows = o.rows();
  c.width = column_width(o);
  c.units = plan.rows / c.width;
  if (pass == Pass::kBackward || !plan_whole_columns(o, plan)) plan_split_columns(o, plan);
  if (pass == Pass::kBackward) plan.kernel = RowKernel::kBackwardColumns;
  plan.shared_bytes = c.kept_vectors * kVectorBytes + c.exchange_bytes;
  plan.threads_shift = log2_of(plan.block.y);
  const int64_t most = larger(o.tuning.max_blocks / plan.blocks, 1);
  c.groups = unsigned(smaller(divide_up(c.units, plan.block.x), most));
  plan.grid = c.groups * plan.blocks;
  plan.step = int64_t(c.groups) * plan.block.x;
  return plan;
}

}  // namespace fusedloss::cuda
