// How work is divided into chunks for threads, and what each chunk of rows stores for the reduction.
#pragma once

#include <cstdint>

namespace fusedloss::cpu {

// How a pass is divided. The bounds of chunks depend on the sizes alone, so results do not depend on the number of
// threads.
struct Work {
  int64_t chunks;
  int64_t grain;  // minimum chunks for each thread
};

// Approximate number of elements of a chunk: the least work for which it pays to wake a thread.
constexpr int64_t kChunkElements = 32768;

// A sum in double (one in each lane, if V is a vector) and the rounding errors of its additions: for float64, a plain
// sum over thousands of rows would lose a digit. cpu/reduce-inl.h has the functions that add to it.
template <typename V>
struct CompensatedSum {
  V value, lost;
};

struct ChunkResult {
  CompensatedSum<double> loss = {}, target_weight = {};
  int64_t bad_row = -1;  // the first row whose target is out of range, or -1
};

}  // namespace fusedloss::cpu
