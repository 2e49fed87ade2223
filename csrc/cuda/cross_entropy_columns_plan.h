// Who takes which part of columns: rows that are neighbours in memory, or that have very few classes. Included by
// cross_entropy_plan.h.
#pragma once

#include "cuda/cross_entropy_plan.h"

namespace fusedloss::cuda {

constexpr int kMaxColumnThreads = 512;
constexpr int kColumnThreadsAcross = 64;     // side by side, where there are rows enough
constexpr int kApartThreads = 256;           // at most, of a block that shares its rows with others
constexpr int64_t kLeastClasses = 8;  // of a thread, where there is a choice: as many loads as it has in flight

// Of a block, at most: fewer where a thread needs more registers.
constexpr int max_column_threads(bool is_float64, bool is_spread) {
  return is_float64 || is_spread ? kMaxColumnThreads / 2 : kMaxColumnThreads;
}

// Statistics of a row that are exchanged: its maximum and sum; of spread targets also dot and mass.
template <bool kSpread>
constexpr int kStateArrays = kSpread ? 4 : 2;

// In shared memory, what belongs to the i-th rows of all threads side by side begins i strides behind what belongs to
// the first ones. A multiple of 32 would have the rows of one thread meet in one bank.
FUSEDLOSS_ANYWHERE int column_stride(int threads, int width) {
  return threads >= 32 && width > 1 ? threads + 32 / width : threads;
}
FUSEDLOSS_ANYWHERE int column_places(int threads, int width) { return column_stride(threads, width) * width; }

// Rows that one 16-byte access can reach together, or 1. Loads and stores must be aligned, and the rows must lie side
// by side: of one outer index, so that the inner size must be a multiple as well.
inline int column_width(const CrossEntropyOptions& o) {
  const int64_t width = kPackBytes / bytes_of(o.dtype);
  const auto fits = [&](const void* p, const Strides& strides) {
    return p == nullptr || (reinterpret_cast<uintptr_t>(p) % kPackBytes == 0 && strides.inner == 1 &&
                            strides.classes % width == 0 && strides.outer % width == 0);
  };
  const bool all_fit = o.inner % width == 0 && fits(o.logits, o.logits_strides) &&
                       fits(o.grad_logits, o.grad_strides) && fits(o.target_probability, o.target_strides);
  return all_fit ? int(width) : 1;
}

// Sizes and places of what is in shared memory.
inline void plan_column_memory(const CrossEntropyOptions& o, RowPlan& plan) {
  ColumnPlan& c = plan.of_columns;
  const int threads_of_set = plan.block.x < 32 ? int(32 / plan.block.x) : 1;
  const int sets = int(plan.block.y) / threads_of_set;
  c.sets_shift = log2_of(sets);
  c.last_set = sets > 1 ? sets : 0;  // if there is one set, each row's thread puts one in the other's place
  c.sets = c.last_set + 1;
  const int64_t places = column_places(int(plan.block.x), c.width), bytes = bytes_of(o.dtype);
  const int64_t arrays = o.is_spread() ? kStateArrays<true> : kStateArrays<false>;
  const int64_t all = places * (c.sets * arrays * (bytes == 8 ? 8 : 4) + 4 + bytes);
  c.exchange_bytes = divide_up(all, kPackBytes) * kPackBytes;
}

// A block for all classes of its rows, if it can keep them in shared memory. Rows that are not taken side by side are
// never kept, but a block takes all classes of as many of them as it could keep: the cache may hold them until they are
// read again. False where they do not fit.
inline bool plan_whole_columns(const CrossEntropyOptions& o, RowPlan& plan) {
  const CudaTuning& t = o.tuning;
  ColumnPlan& c = plan.of_columns;
  const bool keeps = o.grad_logits != nullptr && c.width > 1;
  const int64_t bytes_of_class = c.width == 1 ? bytes_of(o.dtype) : RowPlan::kept_bytes_of_pack(o);  // of a thread
  const unsigned most_threads = max_column_threads(o.dtype == DType::kFloat64, o.is_spread());

  // Of a class, a block reads at least 64 bytes that lie side by side; 128 where that costs no room to keep them in.
  const unsigned least_x = unsigned((keeps ? 64 : 128) / (c.width * bytes_of(o.dtype)));
  unsigned x = kColumnThreadsAcross, y = 1;
  // Of a block's shared memory; tuning.kept_bytes is half of what a multiprocessor has. It then holds 512 threads at
  // least, or 384 in small blocks.
  const auto room = [&] { return 2 * t.kept_bytes * (x * y) / (x * y > 128 ? kMaxColumnThreads : 384); };
  const auto fits = [&] {
    plan.block = dim3(x, y);
    plan_column_memory(o, plan);
    if (y == 1) c.exchange_bytes = 0;  // a thread has its rows for itself
    return o.classes * x * bytes_of_class <= room() - c.exchange_bytes;
  };
  const auto more_threads = [&] {
    return o.classes >= 2 * y * kLeastClasses && (!fits() || divide_up(c.units, x) < 8 * t.multiprocessors);
  };
  while (x > least_x && more_threads()) x /= 2, y *= 2;
  while (x * y < most_threads && more_threads()) y *= 2;
  if (!fits()) return false;
  if (keeps) {
    plan.slots = int(divide_up(o.classes, y));
    c.kept_vectors = int(plan.slots * bytes_of_class / kPackBytes * x * y);
  }
  return true;
}

// Several blocks for the same rows: nothing is kept, and no thread waits for another block. Of a class, a block reads as
// much as it can side by side, 1 KB: on an H200, 256 bytes at a time took 28 % less than 64. The blocks are so many that
// all multiprocessors are at work until the end.
inline void plan_columns_apart(const CrossEntropyOptions& o, RowPlan& plan) {
  const int64_t most_blocks = 8 * o.tuning.multiprocessors;
  unsigned x = kColumnThreadsAcross, y = 1;
  const auto has_classes_for = [&](int64_t threads) { return o.classes >= threads * kLeastClasses; };
  const auto more_blocks = [&] { return divide_up(plan.of_columns.units, x) * plan.blocks < most_blocks; };
  while (2 * plan.of_columns.units <= x && has_classes_for(2 * y)) x /= 2, y *= 2;
  while (x * y < kApartThreads && has_classes_for(2 * y) && more_blocks()) y *= 2;
  while (has_classes_for(2 * plan.blocks * y) && more_blocks()) plan.blocks *= 2;
  plan.block = dim3(x, y);
  plan_column_memory(o, plan);
}

// with_exchange: as in plan_rows.
inline RowPlan plan_columns(const CrossEntropyOptions& o, bool with_exchange) {
  RowPlan plan;
  ColumnPlan& c = plan.of_columns;
  plan.columns = true;
  plan.rows = o.rows();
  c.width = column_width(o);
  c.units = plan.rows / c.width;
  const bool whole = with_exchange && plan_whole_columns(o, plan);
  if (!whole) plan_columns_apart(o, plan);
  plan.split = with_exchange && !whole;
  plan.blocks_shift = log2_of(plan.blocks);
  plan.threads_shift = log2_of(plan.blocks * plan.block.y);
  const int64_t most = larger(o.tuning.max_blocks / plan.blocks, 1);
  plan.grid = unsigned(smaller(divide_up(c.units, plan.block.x), most) * plan.blocks);
  plan.step = int64_t(plan.grid / plan.blocks) * plan.block.x;
  return plan;
}

}  // namespace fusedloss::cuda
