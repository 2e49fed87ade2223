// The kernels of one instruction set, and the choice among them. Included by cpu/instruction_sets.h, so without
// include guard.

namespace fusedloss::cpu::FUSEDLOSS_ISA {
namespace {

#include "cpu/vec.h"
#include "formulas/cross_entropy.h"
#include "cpu/cross_entropy_problem.h"
#include "cpu/cross_entropy_rows.h"
#include "cpu/cross_entropy_columns.h"

template <typename T, Target kTarget>
void backward_chunks(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  const Problem<T> p(o);
  for (int64_t k = begin; k < end; ++k) {
    if (in_rows(o)) {
      backward_rows<T, kTarget>(p, chunk_range(o, k));
    } else {
      backward_columns<T, kTarget>(p, chunk_range(o, k));
    }
  }
}

// Where grad_logits is given it is written too, while the cache holds the logits.
template <typename T, Target kTarget>
void forward_chunks(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  const Problem<T> p(o);
  for (int64_t k = begin; k < end; ++k) {
    ChunkResult result;
    if (in_rows(o)) {
      forward_rows<T, kTarget>(p, chunk_range(o, k), chunk_range(o, end - 1).end, result);
    } else {
      forward_columns<T, kTarget>(p, chunk_range(o, k), result);
      if (o.grad_logits != nullptr) backward_columns<T, kTarget>(p, chunk_range(o, k));
    }
    static_cast<ChunkResult*>(o.scratch)[k] = result;
  }
}

template <typename T>
void forward(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  switch (target_kind(o)) {
    case Target::kOneClass:
      return forward_chunks<T, Target::kOneClass>(o, begin, end);
    case Target::kSmoothed:
      return forward_chunks<T, Target::kSmoothed>(o, begin, end);
    case Target::kProbability:
      return forward_chunks<T, Target::kProbability>(o, begin, end);
  }
}

template <typename T>
void backward(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  switch (target_kind(o)) {
    case Target::kOneClass:
      return backward_chunks<T, Target::kOneClass>(o, begin, end);
    case Target::kSmoothed:
      return backward_chunks<T, Target::kSmoothed>(o, begin, end);
    case Target::kProbability:
      return backward_chunks<T, Target::kProbability>(o, begin, end);
  }
}

template <typename A>
void weight_sum(const CrossEntropyOptions& o) {
  constexpr int kLanes = Simd<A>::kLanes;
  const A* weight = static_cast<const A*>(o.weight);
  typename Simd<A>::V sum = {};
  int64_t c = 0;
  for (; c + kLanes <= o.classes; c += kLanes) sum += load(weight + c);
  if (c < o.classes) sum += load_first(weight + c, int(o.classes - c));
  *static_cast<A*>(o.weight_sum) = sum_of_lanes<A>(sum);
}

template <typename T>
void weigh(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  const Problem<T> p(o);
  for (int64_t k = begin; k < end; ++k) {
    const ChunkRange range = chunk_range(o, k);
    const int64_t first = range.outer * o.inner + range.begin;
    CompensatedSum weight;  // added up as the forward pass does
    for (int64_t row = first; row < first + range.end - range.begin; ++row) {
      if (o.target_index == nullptr) {
        weight.add(1);
      } else if (p.counts(row)) {
        weight.add(p.weight_of(o.target_index[row]));
      }
    }
    static_cast<ChunkResult*>(o.scratch)[k].weight = weight;
  }
}

template <typename T>
void total_weight(const CrossEntropyOptions& o) {
  CompensatedSum weight;
  for (int64_t k = 0; k < chunk_count(o); ++k) weight.add(static_cast<const ChunkResult*>(o.scratch)[k].weight);
  *static_cast<Statistic<T>*>(o.total_weight) = Statistic<T>(weight.value());
}

// The chunks' sums in their order, in double; rounded once.
template <typename T>
int64_t finish(const CrossEntropyOptions& o) {
  ChunkResult total;
  const int64_t chunks = chunk_count(o);
  for (int64_t k = 0; k < chunks; ++k) {
    const ChunkResult& chunk = static_cast<const ChunkResult*>(o.scratch)[k];
    total.loss.add(chunk.loss);
    total.weight.add(chunk.weight);
    if (total.bad_row < 0) total.bad_row = chunk.bad_row;
  }
  if (o.reduction == Reduction::kMean) {
    *static_cast<Statistic<T>*>(o.total_weight) = Statistic<T>(total.weight.value());
    write_loss<T>(o, 0, Statistic<T>(divide_by_total_weight(total.loss.value(), total.weight.value())));
  }
  if (o.reduction == Reduction::kSum) write_loss<T>(o, 0, Statistic<T>(total.loss.value()));
  return total.bad_row;
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_ISA
