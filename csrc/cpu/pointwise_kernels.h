// Losses of one element of each operand, for one instruction set: whatever is not the formula. Blocks of elements are
// given to it in the statistics' type, where they are or widened in a buffer; what it leaves is summed or stored.
// Included by cpu/instruction_sets.h, so without include guard.

namespace fusedloss::cpu::FUSEDLOSS_ISA {
namespace {

#include "cpu/vec.h"
#include "cpu/loss_values.h"

template <typename T>
void widen(const T* from, Statistic<T>* to, int n) {
  constexpr int kLanes = kLanesOf<T>;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load_first(from + i, n - i));  // whole vectors: the formula knows no others
}

template <typename T>
void narrow(const Statistic<T>* from, T* to, int n) {
  constexpr int kLanes = kLanesOf<T>;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_first(to + i, load(from + i), n - i);
}

template <typename A>
void fill(A* to, A value) {
  for (int64_t i = 0; i < kPointwiseBlock; i += Simd<A>::kLanes) store(to + i, typename Simd<A>::V{} + value);
}

// Eight vectors are added in their own type, three roundings deep, and such sums in double.
template <typename A>
double sum_of(const A* values, int n) {
  using V = typename Simd<A>::V;
  constexpr int kLanes = Simd<A>::kLanes, kParts = kLanes / Simd<double>::kLanes;
  typedef A Part __attribute__((vector_size(Simd<double>::kLanes * sizeof(A))));
  DoubleV sum[kParts] = {};
  const auto add = [&](V v) {
    Part part[kParts];
    __builtin_memcpy(part, &v, sizeof v);
    FUSEDLOSS_UNROLL for (int k = 0; k < kParts; ++k) sum[k] += __builtin_convertvector(part[k], DoubleV);
  };
  const auto at = [&](int k) { return load(values + k * kLanes); };
  int i = 0;
  for (; i + 8 * kLanes <= n; i += 8 * kLanes, values += 8 * kLanes)
    add(((at(0) + at(1)) + (at(2) + at(3))) + ((at(4) + at(5)) + (at(6) + at(7))));
  for (; i + kLanes <= n; i += kLanes, values += kLanes) add(at(0));
  if (i < n) add(load_first(values, n - i));
  return sum_of_lanes<double>(kParts == 1 ? sum[0] : sum[0] + sum[kParts - 1]);
}

template <typename T>
class Evaluation {
 public:
  Evaluation(const PointwiseFormula& formula, const PointwiseOptions& o) : o_(o), operands_(o.operands) {
    if constexpr (sizeof(A) == 8) {
      on_block_ = formula.of_double[int(instruction_set())];
    } else {
      on_block_ = formula.of_float[int(instruction_set())];
    }
    for (int k = 0; k < operands_; ++k) {
      const T* operand = static_cast<const T*>(o.operand[k]);
      if (repeats_within_block(k)) repeat(operand, o.operand_period[k], operand_[k]);
      if (o.grad[k] != nullptr) block_.wrt |= 1u << k;
    }
    block_.operand = operand_of_block_;
    block_.parameter = o.parameter;
    block_.grad_output = grad_output_;
    block_.grad = grad_of_block_;
    if (block_.wrt != 0 && o.grad_output_stride == 0) fill(grad_output_, common_grad_output());
  }

  // Elements [begin, begin + n) -> the sum of their losses, where one is wanted.
  double run(int64_t begin, int n) {
    constexpr int kLanes = kLanesOf<T>;
    block_.size = (n + kLanes - 1) / kLanes * kLanes;
    const bool whole = block_.size == n;  // else a vector would reach beyond the tensors' end
    for (int k = 0; k < operands_; ++k) {
      operand_of_block_[k] = operand_[k];
      if (repeats_within_block(k)) {
        operand_of_block_[k] = operand_[k] + begin % o_.operand_period[k];
      } else if (o_.operand_period[k] != 0) {
        operand_of_block_[k] = read_around(k, begin % o_.operand_period[k], n, whole);
      } else {
        operand_of_block_[k] = read(at<const T>(o_.operand[k], begin), operand_[k], n, whole);
      }
      grad_of_block_[k] = in_place<T>(whole && o_.grad[k] != nullptr) ? at<A>(o_.grad[k], begin) : grad_[k];
    }
    if (block_.wrt != 0 && o_.grad_output_stride != 0) {
      block_.grad_output = loss_is_wide() ? read(at<const A>(o_.grad_output, begin), grad_output_, n, whole)
                                          : read(at<const T>(o_.grad_output, begin), grad_output_, n, whole);
    }
    const bool store_losses = o_.loss != nullptr && o_.reduction == Reduction::kNone;
    const bool losses_in_place = store_losses && whole && (loss_is_wide() || in_place<T>(true));
    block_.loss = losses_in_place ? at<A>(o_.loss, begin) : loss_;

    on_block_(block_);

    for (int k = 0; k < operands_; ++k)
      if (o_.grad[k] != nullptr && grad_of_block_[k] == grad_[k]) narrow(grad_[k], at<T>(o_.grad[k], begin), n);
    if (!store_losses) return o_.loss == nullptr ? 0 : sum_of(loss_, n);
    if (losses_in_place) return 0;
    loss_is_wide() ? narrow(loss_, at<A>(o_.loss, begin), n) : narrow(loss_, at<T>(o_.loss, begin), n);
    return 0;
  }

 private:
  using A = Statistic<T>;

  template <typename U, typename Memory>
  static U* at(Memory* memory, int64_t i) {
    return static_cast<U*>(memory) + i;
  }
  // May the formula work on the tensor itself, if `whole`?
  template <typename U>
  static bool in_place(bool whole) {
    return std::is_same_v<U, A> && whole;
  }
  template <typename U>
  static const void* read(const U* from, A* buffer, int n, bool whole) {
    if (in_place<U>(whole)) return from;
    widen(from, buffer, n);
    return buffer;
  }

  // Of an operand with a period: so short a one is written out beforehand, for a block that begins anywhere in it.
  bool repeats_within_block(int k) const {
    return o_.operand_period[k] != 0 && o_.operand_period[k] <= kPointwiseBlock;
  }
  static void repeat(const T* from, int64_t period, A* to) {
    for (int64_t i = 0; i < period; ++i) to[i] = load_one(from + i);
    for (int64_t filled = period, n; filled < period + kPointwiseBlock; filled += n) {
      n = std::min(filled, period + kPointwiseBlock - filled);
      std::copy_n(to, n, to + filled);
    }
  }
  // A longer one: a block that reaches beyond its end goes on at its beginning.
  const void* read_around(int k, int64_t begin, int n, bool whole) {
    const T* operand = static_cast<const T*>(o_.operand[k]);
    const int until_end = int(std::min(int64_t(n), o_.operand_period[k] - begin));
    if (until_end == n) return read(operand + begin, operand_[k], n, whole);
    widen(operand + begin, operand_[k], until_end);
    widen(operand, operand_[k] + until_end, n - until_end);
    return operand_[k];
  }

  bool loss_is_wide() const { return o_.loss_dtype != o_.dtype; }

  // With the mean's division.
  A common_grad_output() const {
    const A g = read_grad_output<T>(o_, 0);
    return o_.reduction == Reduction::kMean ? g / A(o_.divisor) : g;
  }

  const PointwiseOptions& o_;
  const int operands_;
  void (*on_block_)(const PointwiseBlock&);
  PointwiseBlock block_ = {};
  const void* operand_of_block_[kMaxOperands];
  void* grad_of_block_[kMaxOperands];
  // Not 4096 bytes from one to the next: a load would wait for a store whose address ends in the same twelve bits.
  alignas(64) A operand_[kMaxOperands][2 * kPointwiseBlock + 48];
  alignas(64) A grad_[kMaxOperands][kPointwiseBlock + 80];
  alignas(64) A loss_[kPointwiseBlock];
  alignas(64) A grad_output_[kPointwiseBlock];
};

template <typename T>
void evaluate(const PointwiseFormula& formula, const PointwiseOptions& o, int64_t begin_chunk, int64_t end_chunk) {
  Evaluation<T> evaluation(formula, o);
  for (int64_t k = begin_chunk; k < end_chunk; ++k) {
    const int64_t end = std::min((k + 1) * kPointwiseChunk, o.numel);
    double sum = 0;
    for (int64_t i = k * kPointwiseChunk; i < end; i += kPointwiseBlock)
      sum += evaluation.run(i, int(std::min(kPointwiseBlock, end - i)));
    if (o.scratch != nullptr) static_cast<double*>(o.scratch)[k] = sum;
  }
}

// The chunks' sums in their order, in double; rounded once.
template <typename T>
void finish(const PointwiseOptions& o) {
  if (o.reduction == Reduction::kNone) return;
  double sum = 0;
  for (int64_t k = 0; k < pointwise_chunks(o); ++k) sum += static_cast<const double*>(o.scratch)[k];
  write_loss<T>(o, 0, Statistic<T>(o.reduction == Reduction::kMean ? sum / o.divisor : sum));
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_ISA
