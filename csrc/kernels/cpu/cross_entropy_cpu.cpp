// How a row becomes a loss on the CPU: cpu/cross_entropy_rows-inl.h, or cpu/cross_entropy_columns-inl.h where
// neighbouring rows lie side by side. This file compiles them for each instruction set and picks one.

#include "kernels/cpu/cross_entropy_cpu.h"

#include <algorithm>

#include "kernels/cpu/cross_entropy_chunks.h"

#define FUSEDLOSS_KERNELS "kernels/cpu/cross_entropy_kernels-inl.h"
#include "kernels/cpu/foreach_instruction_set.h"

namespace fusedloss::cpu {
namespace {

const CrossEntropyKernels& kernels(const CrossEntropyOptions& o) {
  static constexpr const CrossEntropyKernels* kTable[] = FUSEDLOSS_FOR_EACH_INSTRUCTION_SET(kCrossEntropyKernels);
  return kTable[int(instruction_set())][int(o.dtype)];
}

}  // namespace

Work cross_entropy_work(const CrossEntropyOptions& o) {
  const int64_t chunks = chunk_count(o);
  const int64_t elements = chunks == 0 ? 1 : std::max<int64_t>(1, o.rows() * o.classes / chunks);
  return {chunks, std::max<int64_t>(1, kChunkElements / elements)};
}

int64_t cross_entropy_scratch_bytes(const CrossEntropyOptions& o) {
  return chunk_count(o) * int64_t(sizeof(ChunkResult));
}

void cross_entropy_weight_sum(const CrossEntropyOptions& o) { kernels(o).weight_sum(o); }

void cross_entropy_sum_target_weights(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  kernels(o).sum_target_weights(o, begin, end);
}

void cross_entropy_total_weight(const CrossEntropyOptions& o) { kernels(o).total_weight(o); }

void cross_entropy_forward(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  kernels(o).forward(o, begin, end);
}

int64_t cross_entropy_finish(const CrossEntropyOptions& o) { return kernels(o).finish(o); }

void cross_entropy_backward(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  kernels(o).backward(o, begin, end);
}

}  // namespace fusedloss::cpu
