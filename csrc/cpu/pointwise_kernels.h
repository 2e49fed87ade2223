// Losses of one element each of input and target, for one instruction set; F is a formula, such as SquaredError.
// Included by cpu/instruction_sets.h, so without include guard.

namespace fusedloss::cpu::FUSEDLOSS_ISA {
namespace {

#include "cpu/vec.h"
#include "formulas/squared_error.h"

// Independent accumulators, to hide the latency of an addition.
constexpr int kUnroll = 4;
// Elements summed in the statistics' type before the sum goes on in double: so many to each lane of each accumulator, so
// that a narrow vector rounds no more often than a wide one. For float64 double is not wider: there, few long blocks.
template <typename T>
constexpr int64_t kSumBlock = (sizeof(Statistic<T>) == 8 ? 128 : 16) * kUnroll * kLanesOf<T>;

// Writes the losses of n <= a vector's elements where they are wanted, and returns them; lanes n and up are 0.
template <typename F, bool kWhole, typename T>
FUSEDLOSS_INLINE typename Simd<Statistic<T>>::V loss_of(const PointwiseOptions& o, int64_t i, int n) {
  using A = Statistic<T>;
  const auto x = load_lanes<kWhole>(static_cast<const T*>(o.input) + i, n);
  const auto t = load_lanes<kWhole>(static_cast<const T*>(o.target) + i, n);
  auto loss = F::value(x, t);
  if (o.reduction == Reduction::kNone) {
    if (o.loss_dtype == o.dtype) {
      store_lanes<kWhole>(static_cast<T*>(o.loss) + i, loss, n);
    } else {
      store_lanes<kWhole>(static_cast<A*>(o.loss) + i, loss, n);
    }
  }
  if constexpr (!kWhole) loss = lanes_from(n, A{}) ? typename Simd<A>::V{} : loss;
  return loss;
}

// The sum over elements [begin, begin + n).
template <typename F, typename T>
FUSEDLOSS_INLINE Statistic<T> sum_block(const PointwiseOptions& o, int64_t begin, int n) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  V sum[kUnroll] = {};
  int i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) sum[k] += loss_of<F, true, T>(o, begin + i + k * kLanes, kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) sum[0] += loss_of<F, true, T>(o, begin + i, kLanes);
  if (i < n) sum[0] += loss_of<F, false, T>(o, begin + i, n - i);
  return sum_of_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The chunks' sums in their order, in double; rounded once.
template <typename T>
void finish(const PointwiseOptions& o) {
  if (o.reduction == Reduction::kNone) return;
  double sum = 0;
  for (int64_t k = 0; k < pointwise_chunks(o); ++k) sum += static_cast<const double*>(o.scratch)[k];
  const auto loss = Statistic<T>(o.reduction == Reduction::kMean ? sum / double(o.numel) : sum);
  if (o.loss_dtype == o.dtype) {
    store_one(static_cast<T*>(o.loss), loss);
  } else {
    *static_cast<Statistic<T>*>(o.loss) = loss;
  }
}

// grad_output of the elements from i on, with the mean's division.
template <bool kWhole, typename T>
FUSEDLOSS_INLINE typename Simd<Statistic<T>>::V upstream(const PointwiseOptions& o, int64_t i, int n) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  const bool narrow = o.loss_dtype == o.dtype;
  const auto* as_t = static_cast<const T*>(o.grad_output);
  const auto* as_a = static_cast<const A*>(o.grad_output);
  if (o.grad_output_stride != 0) return narrow ? load_lanes<kWhole>(as_t + i, n) : load_lanes<kWhole>(as_a + i, n);
  const A g = o.grad_output == nullptr ? 1 : narrow ? load_one(as_t) : *as_a;
  return V{} + (o.reduction == Reduction::kMean ? g / A(o.numel) : g);
}

template <typename F, bool kWhole, typename T>
FUSEDLOSS_INLINE void gradient_of(const PointwiseOptions& o, typename Simd<Statistic<T>>::V g, int64_t i, int n) {
  const auto x = load_lanes<kWhole>(static_cast<const T*>(o.input) + i, n);
  const auto t = load_lanes<kWhole>(static_cast<const T*>(o.target) + i, n);
  const auto grad = g * F::derivative(x, t);
  if (o.grad_input != nullptr) store_lanes<kWhole>(static_cast<T*>(o.grad_input) + i, grad, n);
  if (o.grad_target != nullptr) store_lanes<kWhole>(static_cast<T*>(o.grad_target) + i, -grad, n);
}

// d loss/d input = g * F::derivative, d loss/d target = the negative; of elements [i, end).
template <typename F, typename T>
FUSEDLOSS_INLINE void write_gradients(const PointwiseOptions& o, int64_t i, int64_t end) {
  constexpr int kLanes = kLanesOf<T>;
  const bool one_g = o.grad_output_stride == 0;
  auto g = one_g ? upstream<true, T>(o, 0, kLanes) : typename Simd<Statistic<T>>::V{};
  for (; i + kLanes <= end; i += kLanes) {
    if (!one_g) g = upstream<true, T>(o, i, kLanes);
    gradient_of<F, true, T>(o, g, i, kLanes);
  }
  if (i < end) {
    const int n = int(end - i);
    if (!one_g) g = upstream<false, T>(o, i, n);
    gradient_of<F, false, T>(o, g, i, n);
  }
}

// Where gradients are wanted they are written too, while L1 holds the elements.
template <typename F, typename T>
void forward(const PointwiseOptions& o, int64_t begin_chunk, int64_t end_chunk) {
  const bool with_grad = o.grad_input != nullptr || o.grad_target != nullptr;
  for (int64_t k = begin_chunk; k < end_chunk; ++k) {
    const int64_t end = std::min((k + 1) * kPointwiseChunk, o.numel);
    double sum = 0;
    for (int64_t i = k * kPointwiseChunk; i < end; i += kSumBlock<T>) {
      const int64_t block_end = std::min(i + kSumBlock<T>, end);
      sum += sum_block<F, T>(o, i, int(block_end - i));
      if (with_grad) write_gradients<F, T>(o, i, block_end);
    }
    static_cast<double*>(o.scratch)[k] = sum;
  }
}

template <typename F, typename T>
void backward(const PointwiseOptions& o, int64_t begin_chunk, int64_t end_chunk) {
  write_gradients<F, T>(o, begin_chunk * kPointwiseChunk, std::min(end_chunk * kPointwiseChunk, o.numel));
}

// The family's members.
template <typename T>
void mse_forward(const PointwiseOptions& o, int64_t begin, int64_t end) {
  forward<SquaredError, T>(o, begin, end);
}
template <typename T>
void mse_backward(const PointwiseOptions& o, int64_t begin, int64_t end) {
  backward<SquaredError, T>(o, begin, end);
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_ISA
