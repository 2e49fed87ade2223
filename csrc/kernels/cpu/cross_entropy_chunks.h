// How cross entropy is cut for threads.
#pragma once

#include <algorithm>

#include "kernels/cpu/chunks.h"
#include "kernels/integers.h"
#include "kernels/options.h"

namespace fusedloss::cpu {

// Either a row's classes lie side by side ("rows"), or the rows themselves do ("columns"): [outer, classes, inner] with
// inner stride 1, as in (N, C, d1, …). One class lies beside itself whatever the layout is: its rows are columns if
// they can be.
inline bool in_rows(const CrossEntropyOptions& o) {
  if (o.logits_strides.classes != 1) return false;
  return o.classes != 1 || o.inner == 1 || o.logits_strides.inner != 1 ||
         (o.target_probability != nullptr && o.target_strides.inner != 1) ||
         (o.grad_logits != nullptr && o.grad_strides.inner != 1);
}

// Rows of a chunk of columns: a kilobyte of each class, and statistics that stay in L1.
constexpr int64_t kColumnChunk = 256;

struct ChunkRange {
  int64_t outer;       // columns only
  int64_t begin, end;  // rows: row numbers; columns: positions along inner
};

inline int64_t rows_per_chunk(const CrossEntropyOptions& o) {
  return std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, o.classes));
}

inline int64_t column_chunks_per_outer(const CrossEntropyOptions& o) { return divide_up(o.inner, kColumnChunk); }

inline int64_t chunk_count(const CrossEntropyOptions& o) {
  if (!in_rows(o)) return o.outer * column_chunks_per_outer(o);
  return divide_up(o.rows(), rows_per_chunk(o));
}

inline ChunkRange chunk_range(const CrossEntropyOptions& o, int64_t chunk) {
  if (in_rows(o)) {
    const int64_t begin = chunk * rows_per_chunk(o);
    return {0, begin, std::min(begin + rows_per_chunk(o), o.rows())};
  }
  const int64_t chunks = column_chunks_per_outer(o), begin = chunk % chunks * kColumnChunk;
  return {chunk / chunks, begin, std::min(begin + kColumnChunk, o.inner)};
}

// Are the rows' weights added up as the forward pass reads the targets? Where it writes the gradient as well, their sum
// must be known before.
inline bool sums_target_weights_in_forward(const CrossEntropyOptions& o) {
  return o.total_weight != nullptr && o.grad_logits == nullptr;
}

}  // namespace fusedloss::cpu
