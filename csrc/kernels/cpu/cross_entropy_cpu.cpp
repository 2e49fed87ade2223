// Cross entropy on the CPU. cpu/cross_entropy_rows-inl.h computes it if the classes of a row are contiguous, and
// cpu/cross_entropy_columns-inl.h if neighbouring rows are. This file compiles both for each instruction set and
// selects the kernels of one.

#include "kernels/cpu/cross_entropy_cpu.h"

#include <algorithm>

#include "kernels/cpu/cross_entropy_chunks.h"

#define FUSEDLOSS_KERNELS "kernels/cpu/cross_entropy_kernels-inl.h"
#include "kernels/cpu/foreach_instruction_set.h"

namespace fusedloss::cpu {

Work cross_entropy_work(const CrossEntropyOptions& o) {
  const int64_t chunks = chunk_count(o);
  const int64_t elements = chunks == 0 ? 1 : std::max<int64_t>(1, o.rows() * o.classes / chunks);
  return {chunks, std::max<int64_t>(1, kChunkElements / elements)};
}

int64_t cross_entropy_scratch_bytes(const CrossEntropyOptions& o) {
  return chunk_count(o) * int64_t(sizeof(ChunkResult));
}

const CrossEntropyKernels& cross_entropy_kernels(const CrossEntropyOptions& o) {
  static constexpr const CrossEntropyKernels* kTable[] = FUSEDLOSS_FOR_EACH_INSTRUCTION_SET(kCrossEntropyKernels);
  return kTable[int(instruction_set())][int(o.dtype)];
}

}  // namespace fusedloss::cpu
