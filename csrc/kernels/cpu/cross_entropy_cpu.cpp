// How a row becomes a loss on the CPU: cpu/cross_entropy_rows.h, or cpu/cross_entropy_columns.h where neighbouring
// rows lie side by side. This file compiles them for each instruction set and picks one.

#include "kernels/cpu/cross_entropy_cpu.h"

#include "kernels/cpu/cross_entropy_chunks.h"
#include "kernels/cpu/dispatch_dtype.h"

#define FUSEDLOSS_KERNELS "kernels/cpu/cross_entropy_kernels.h"
#include "kernels/cpu/instruction_sets.h"

namespace fusedloss::cpu {

CrossEntropyWork cross_entropy_work(const CrossEntropyOptions& o) {
  const int64_t chunks = chunk_count(o);
  const int64_t elements = chunks == 0 ? 1 : std::max<int64_t>(1, o.rows() * o.classes / chunks);
  return {chunks, std::max<int64_t>(1, kChunkElements / elements)};
}

int64_t cross_entropy_scratch_bytes(const CrossEntropyOptions& o) {
  return chunk_count(o) * int64_t(sizeof(ChunkResult));
}

void cross_entropy_weight_sum(const CrossEntropyOptions& o) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(weight_sum<AccumulateType<T>>(o)));
}

void cross_entropy_weigh(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(weigh<T>(o, begin, end)));
}

void cross_entropy_total_weight(const CrossEntropyOptions& o) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(total_weight<T>(o)));
}

void cross_entropy_forward(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(forward<T>(o, begin, end)));
}

int64_t cross_entropy_finish(const CrossEntropyOptions& o) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(finish<T>(o)));
}

void cross_entropy_backward(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(backward<T>(o, begin, end)));
}

}  // namespace fusedloss::cpu
