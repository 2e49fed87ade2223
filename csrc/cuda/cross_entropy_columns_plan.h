// Who takes which part of columns: rows that are neighbours in memory, or that have very few classes. Included by
// cross_entropy_plan.h.
#pragma once

#include "cuda/cross_entropy_plan.h"

namespace fusedloss::cuda {

constexpr int kMaxColumnThreads = 512;
constexpr int kBackwardColumnThreads = 256;  // at most, of a block that knows the rows' statistics
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
  c.exchange_set = c.last_set + 1;
  c.sets = c.exchange_set + (plan.cluster ? 2 * plan.blocks : 0);
  const int64_t places = column_places(int(plan.block.x), c.width), bytes = bytes_of(o.dtype);
  const int64_t arrays = o.is_spread() ? kStateArrays<true> : kStateArrays<false>;
  const int64_t all = places * (c.sets * arrays * (bytes == 8 ? 8 : 4) + 4 + bytes);
  c.exchange_bytes = divide_up(all, kPackBytes) * kPackBytes;
}

// with_exchange: as in plan_rows.
inline RowPlan plan_columns(const CrossEntropyOptions& o, bool with_exchange) {
  const CudaTuning& t = o.tuning;
  RowPlan plan;
  ColumnPlan& c = plan.of_columns;
  plan.columns = true;
  plan.rows = o.rows();
  c.width = column_width(o);
  c.units = plan.rows / c.width;
  const bool keeps = with_exchange && o.grad_logits != nullptr && c.width > 1;
  const int64_t kept_bytes = keeps ? RowPlan::kept_bytes_of_pack(o) : 0;  // of a thread, a class
  const unsigned most_threads =
      with_exchange ? max_column_threads(o.dtype == DType::kFloat64, o.is_spread()) : kBackwardColumnThreads;

  // Of a class, a block reads at least 64 bytes that lie side by side; 128 where that costs no room to keep them in.
  const unsigned least_x = unsigned((keeps ? 64 : 128) / (c.width * bytes_of(o.dtype)));
  unsigned x = 64, y = 1;
  const auto blocks = [&] { return divide_up(c.units, x) * plan.blocks; };
  // Of a block's shared memory; tuning.kept_bytes is half of what a multiprocessor has. It then holds 512 threads at
  // least, or 384 in small blocks.
  const auto room = [&] { return 2 * t.kept_bytes * (x * y) / (x * y > 128 ? kMaxColumnThreads : 384); };
  const auto fits = [&] {
    plan.block = dim3(x, y);
    plan_column_memory(o, plan);
    return kept_bytes == 0 || o.classes * x * kept_bytes <= plan.blocks * (room() - c.exchange_bytes);
  };
  const auto more_threads = [&] {
    return o.classes >= 2 * y * kLeastClasses && (!fits() || blocks() < 8 * t.multiprocessors);
  };
  while (x > least_x && more_threads()) x /= 2, y *= 2;
  while (x * y < most_threads && more_threads()) y *= 2;

  // Several blocks for the same rows: to keep all of their classes, or to have all multiprocessors at work.
  const auto more_blocks = [&] {
    return o.classes >= 2 * plan.blocks * y * kLeastClasses &&
           (!fits() || blocks() < 4 * t.multiprocessors);
  };
  if (!with_exchange) {
    while (more_blocks()) plan.blocks *= 2;
  } else if (t.cluster_blocks > 1) {
    while (2 * plan.blocks <= t.cluster_blocks && more_blocks()) plan.blocks *= 2;
    plan.cluster = plan.blocks > 1;
  } else if (blocks() < 4 * t.multiprocessors) {
    // Nothing is kept: wider reads, and as many blocks as the backward pass will have.
    while (x * c.width * bytes_of(o.dtype) < 256 && y > 1 && c.units >= 2 * x) x *= 2, y /= 2;
    while (o.classes >= 2 * plan.blocks * y * kLeastClasses && blocks() < 4 * t.multiprocessors) plan.blocks *= 2;
    plan.split = plan.blocks > 1;
  }

  plan.block = dim3(x, y);
  plan.blocks_shift = log2_of(plan.blocks);
  plan.threads_shift = log2_of(plan.blocks * y);
  plan_column_memory(o, plan);
  if (keeps && !plan.split) {
    const int64_t classes = divide_up(o.classes, plan.blocks * y);  // of a thread
    const int64_t fit = (room() - c.exchange_bytes) / (x * y * kept_bytes);
    // All, or else whole tiles of the second sweep.
    constexpr int64_t kTile = kColumnPacks<false> / 2;
    plan.slots = int(fit >= classes ? classes : fit > 0 ? fit / kTile * kTile : 0);
    c.kept_vectors = int(plan.slots * kept_bytes / kPackBytes * x * y);
  }
  const int64_t most = larger(t.max_blocks / plan.blocks, 1);
  plan.grid = unsigned(smaller(divide_up(c.units, x), most) * plan.blocks);
  plan.step = int64_t(plan.grid / plan.blocks) * x;
  return plan;
}

}  // namespace fusedloss::cuda
