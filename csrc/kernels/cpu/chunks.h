// Work that is cut into chunks for threads, and what a chunk of rows leaves for the reduction.
#pragma once

#include <cstdint>

namespace fusedloss::cpu {

// How a pass is cut. The bounds of chunks depend on the sizes alone, so that results do not depend on how many threads
// share them.
struct Work {
  int64_t chunks;
  int64_t grain;  // chunks that are worth a thread
};

// Elements of a chunk, roughly: what a thread should have to do before it is worth waking.
constexpr int64_t kChunkElements = 32768;

// A sum in double, in each lane of a V, with what its additions rounded off: for float64 a plain sum over thousands of
// rows would lose a digit. cpu/reduce-inl.h adds to it.
template <typename V>
struct CompensatedSum {
  V value, lost;
};

struct ChunkResult {
  CompensatedSum<double> loss = {}, target_weight = {};
  int64_t bad_row = -1;  // the first row whose target is out of range, or -1
};

}  // namespace fusedloss::cpu
