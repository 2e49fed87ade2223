// Pointwise losses for one instruction set, without the formula. The formula is called for blocks of elements, in place
// where possible. Buffers are used for operands that repeat, for the elements at the end that do not fill a vector, and
// for 16-bit losses and grad_output.
#if defined(FUSEDLOSS_POINTWISE_KERNELS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_POINTWISE_KERNELS_INL
#undef FUSEDLOSS_POINTWISE_KERNELS_INL
#else
#define FUSEDLOSS_POINTWISE_KERNELS_INL
#endif

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "kernels/cpu/loss_values-inl.h"
#include "kernels/cpu/pointwise_cpu.h"

FUSEDLOSS_BEGIN_NAMESPACE

template <typename T>
void widen(const T* from, AccumulateType<T>* to, int n) {
  for_each_vector<T>(0, n, [&](auto whole, int i) __attribute__((always_inline)) {
    store(to + i, load_lanes<whole>(from + i, n - i));  // stores a whole vector, because the formula reads it whole
  });
}

template <typename T>
void narrow(const AccumulateType<T>* from, T* to, int n) {
  for_each_vector<T>(0, n, [&](auto whole, int i) __attribute__((always_inline)) {
    store_lanes<whole>(to + i, load(from + i), n - i);
  });
}

template <typename T>
class Evaluation {
 public:
  Evaluation(const PointwiseFormula& formula, const PointwiseOptions& o)
      : o_(o),
        operands_(o.operands),
        of_block_((sizeof(A) == 8 ? formula.of_double : formula.of_float)[int(instruction_set())]) {
    for (int k = 0; k < operands_; ++k) {
      const T* operand = static_cast<const T*>(o.operand[k]);
      if (repeats_within_block(k)) repeat(operand, o.operand_period[k], operand_[k]);
      if (o.operand_period[k] != 0) block_size_ = kPointwiseBlock;
      if (o.grad[k] != nullptr) block_.wrt |= 1u << k;
    }
    block_.dtype = o.dtype;
    block_.operand = operand_of_block_;
    block_.parameter = o.parameter;
    block_.grad_output = grad_output_;
    block_.one_grad_output = o.grad_output_stride == 0;
    block_.grad = grad_of_block_;
    if (block_.wrt != 0 && block_.one_grad_output) std::fill_n(grad_output_, kLanes, common_grad_output());
    if (stores_losses() || !block_.one_grad_output) block_size_ = kPointwiseBlock;
  }

  // Computes a chunk and returns the sum of its losses if it is wanted. The elements at the end that do not fill a
  // vector are a separate block.
  double run(int64_t begin, int64_t end) {
    const int64_t end_of_vectors = end - (end - begin) % kLanes;
    double sum = 0;
    for (; begin < end_of_vectors; begin += block_.size) {
      block_.size = std::min(block_size_, end_of_vectors - begin);
      sum += run_block(begin, int(block_.size));
    }
    if (begin < end) {
      block_.size = kLanes;
      sum += run_block(begin, int(end - begin));
    }
    return sum;
  }

 private:
  using A = AccumulateType<T>;
  static constexpr int kLanes = kLanesOf<T>;

  // Computes elements [begin, begin + n). n is the block's size, unless the block is a single vector that would extend
  // beyond the end of the tensors: n is then less.
  double run_block(int64_t begin, int n) {
    const bool whole = block_.size == n;
    for (int k = 0; k < operands_; ++k) {
      operand_of_block_[k] = read_operand(k, begin, n, whole);
      grad_of_block_[k] = o_.grad[k] == nullptr ? nullptr : whole ? at<T>(o_.grad[k], begin) : grad_[k];
    }
    if (block_.wrt != 0 && !block_.one_grad_output) {
      block_.grad_output = loss_is_wide() ? read(at<const A>(o_.grad_output, begin), n, whole)
                                          : read(at<const T>(o_.grad_output, begin), n, whole);
    }
    const bool in_place = whole && stores_losses() && (loss_is_wide() || std::is_same_v<T, A>);
    const bool sums = whole && !stores_losses();
    block_.loss = sums ? nullptr : in_place ? at<A>(o_.loss, begin) : loss_;

    const double sum = of_block_(block_);

    for (int k = 0; k < operands_ && !whole; ++k)
      if (o_.grad[k] != nullptr) std::copy_n(grad_[k], n, at<T>(o_.grad[k], begin));
    if (sums || in_place) return sum;
    if (!stores_losses()) return std::accumulate(loss_, loss_ + n, 0.);
    loss_is_wide() ? narrow(loss_, at<A>(o_.loss, begin), n) : narrow(loss_, at<T>(o_.loss, begin), n);
    return 0;
  }

  template <typename U, typename Memory>
  static U* at(Memory* memory, int64_t i) {
    return static_cast<U*>(memory) + i;
  }

  // The block's part of grad_output, if each element has its own.
  template <typename U>
  const void* read(const U* from, int n, bool whole) {
    if (std::is_same_v<U, A> && whole) return from;
    widen(from, grad_output_, n);
    return grad_output_;
  }

  const void* read_operand(int k, int64_t begin, int n, bool whole) {
    const int64_t period = o_.operand_period[k];
    if (repeats_within_block(k)) return operand_[k] + begin % period;
    const T* const operand = static_cast<const T*>(o_.operand[k]);
    const T* const from = operand + (period != 0 ? begin % period : begin);
    const int until_end = period != 0 ? int(std::min(int64_t(n), operand + period - from)) : n;
    if (whole && until_end == n) return from;
    std::copy_n(from, until_end, operand_[k]);
    std::copy_n(operand, n - until_end, operand_[k] + until_end);  // continues at the operand's beginning
    if (!whole) std::fill_n(operand_[k] + n, kLanes - n, T{});
    return operand_[k];
  }

  // True if operand k repeats with a period of at most one block. It is then expanded beforehand, so that a block can
  // begin anywhere in the period.
  bool repeats_within_block(int k) const {
    return o_.operand_period[k] != 0 && o_.operand_period[k] <= kPointwiseBlock;
  }
  static void repeat(const T* from, int64_t period, T* to) {
    std::copy_n(from, period, to);
    for (int64_t filled = period, n; filled < period + kPointwiseBlock; filled += n) {
      n = std::min(filled, period + kPointwiseBlock - filled);
      std::copy_n(to, n, to + filled);
    }
  }

  bool stores_losses() const { return o_.loss != nullptr && o_.reduction == Reduction::kNone; }
  bool loss_is_wide() const { return o_.loss_dtype != o_.dtype; }

  // grad_output, if it is the same for all elements, divided by the divisor of the mean.
  A common_grad_output() const {
    const A g = read_grad_output<T>(o_, 0);
    return o_.reduction == Reduction::kMean ? g / A(o_.divisor) : g;
  }

  const PointwiseOptions& o_;
  const int operands_;
  PointwiseFunction* const of_block_;
  int64_t block_size_ = kPointwiseChunk;
  PointwiseBlock block_ = {};
  const void* operand_of_block_[kMaxOperands];
  void* grad_of_block_[kMaxOperands];
  // The size avoids a distance of 4096 bytes between the buffers: a load would wait for an earlier store whose address
  // has the same low twelve bits.
  alignas(64) T operand_[kMaxOperands][2 * kPointwiseBlock + 96];
  alignas(64) T grad_[kMaxOperands][kLanes];
  alignas(64) A loss_[kPointwiseBlock];
  alignas(64) A grad_output_[kPointwiseBlock];
};

template <typename T>
void evaluate(const PointwiseFormula& formula, const PointwiseOptions& o, int64_t begin_chunk, int64_t end_chunk) {
  Evaluation<T> evaluation(formula, o);
  for (int64_t k = begin_chunk; k < end_chunk; ++k) {
    const double sum = evaluation.run(k * kPointwiseChunk, std::min((k + 1) * kPointwiseChunk, o.numel));
    if (o.scratch != nullptr) static_cast<double*>(o.scratch)[k] = sum;
  }
}

// Adds the chunks' sums in their order, in double, and rounds the result once.
template <typename T>
void finish(const PointwiseOptions& o) {
  if (o.reduction == Reduction::kNone) return;
  double sum = 0;
  for (int64_t k = 0; k < pointwise_work(o).chunks; ++k) sum += static_cast<const double*>(o.scratch)[k];
  write_loss<T>(o, 0, AccumulateType<T>(o.reduction == Reduction::kMean ? sum / o.divisor : sum));
}

template <typename T>
constexpr PointwiseKernels kKernelsOf = {evaluate<T>, finish<T>};
constexpr PointwiseKernels kPointwiseKernels[] = FUSEDLOSS_FOR_EACH_DTYPE(kKernelsOf);

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
