// How cross entropy is divided into chunks for threads.
#pragma once

#include <algorithm>

#include "kernels/cpu/chunks.h"
#include "kernels/integers.h"
#include "kernels/options.h"

namespace fusedloss::cpu {

// True for the layout "rows", where the classes of a row are contiguous. Else the layout is "columns", where
// neighbouring rows are contiguous: [outer, classes, inner] with inner stride 1, as in (N, C, d1, …). A single class is
// contiguous in any layout; it counts as columns if its rows can be processed as columns.
inline bool in_rows(const CrossEntropyOptions& o) {
  if (o.logits_strides.classes != 1) return false;
  return o.classes != 1 || o.inner == 1 || o.logits_strides.inner != 1 ||
         (o.target_probability != nullptr && o.target_strides.inner != 1) ||
         (o.grad_logits != nullptr && o.grad_strides.inner != 1);
}

// Rows of a chunk of columns. A chunk then has a kilobyte of each class, and its statistics stay in L1.
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

// True if the forward pass sums the rows' weights as it reads the targets. If it also writes the gradient, the sum must
// be known beforehand.
inline bool sums_target_weights_in_forward(const CrossEntropyOptions& o) {
  return o.total_weight != nullptr && o.grad_logits == nullptr;
}

}  // namespace fusedloss::cpu
