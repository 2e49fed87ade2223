// The kernels of the negative log likelihood for one instruction set.
//
// Both passes access one element of each row, in an order that a hardware prefetcher cannot predict. The forward pass
// has many loads in flight at once. The backward pass writes the elements while the cache still holds the zeros that it
// has filled the tile with.
#if defined(FUSEDLOSS_NLL_LOSS_KERNELS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_NLL_LOSS_KERNELS_INL
#undef FUSEDLOSS_NLL_LOSS_KERNELS_INL
#else
#define FUSEDLOSS_NLL_LOSS_KERNELS_INL
#endif

#include <cstring>

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/loss_values-inl.h"
#include "kernels/cpu/nll_loss_cpu.h"
#include "kernels/cpu/reduce-inl.h"
#include "kernels/formulas/nll_loss-inl.h"
#include "kernels/integers.h"
#include "kernels/tiles.h"

FUSEDLOSS_BEGIN_NAMESPACE

// The options with typed weights. All arithmetic is in double, since there are only a few operations for each row.
template <typename T>
struct TypedNLLLossOptions {
  using A = AccumulateType<T>;

  const NLLLossOptions& o;
  const A* weight;

  explicit TypedNLLLossOptions(const NLLLossOptions& options)
      : o(options), weight(static_cast<const A*>(options.weight)) {}

  FUSEDLOSS_INLINE bool counts(int64_t y) const { return y != o.ignore_index && y >= 0 && y < o.classes; }
  FUSEDLOSS_INLINE double weight_of(int64_t y) const { return weight ? double(weight[y]) : 1.0; }

  // The factor of a row's gradient: its grad_output, divided by total_weight for the mean.
  FUSEDLOSS_INLINE double scaled_grad_output(int64_t row) const {
    const double g = double(read_grad_output<T>(o, row));
    if (o.reduction != Reduction::kMean) return g;
    return divide_by_total_weight(g, double(*static_cast<const A*>(o.total_weight)));
  }
};

template <typename T>
void forward(const NLLLossOptions& o, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = 16;  // rows whose plain sum is then added to the compensated sum
  const TypedNLLLossOptions<T> p(o);
  for (int64_t k = begin; k < end; ++k) {
    ChunkResult chunk;
    int64_t row = k * kNLLLossForwardRows, outer = row / o.inner, inner = row % o.inner;
    const int64_t last = smaller(row + kNLLLossForwardRows, o.rows());
    while (row < last) {
      double loss_sum = 0, target_weight = 0;
      for (const int64_t until = smaller(row + kTogether, last); row < until; ++row) {
        const int64_t y = o.target_index[row];
        double loss = 0;
        if (p.counts(y)) {
          const Strides& s = o.input_strides;
          const int64_t at = outer * s.outer + y * s.classes + inner * s.inner;
          const double w = p.weight_of(y);
          loss = nll_loss_value(double(load_one(static_cast<const T*>(o.input) + at)), w);
          loss_sum += loss;
          target_weight += w;
        } else if (y != o.ignore_index && chunk.bad_row < 0) {
          chunk.bad_row = row;
        }
        if (o.reduction == Reduction::kNone) write_loss<T>(o, row, AccumulateType<T>(loss));
        if (++inner == o.inner) {
          inner = 0;
          ++outer;
        }
      }
      add(chunk.loss, loss_sum);
      add(chunk.target_weight, target_weight);
    }
    static_cast<ChunkResult*>(o.scratch)[k] = chunk;
  }
}

template <typename T>
int64_t finish(const NLLLossOptions& o) {
  const ChunkResult all = sum_of_chunks(o.scratch, divide_up(o.rows(), kNLLLossForwardRows));
  write_reduced_loss<T>(o, all);
  if (o.reduction == Reduction::kMean) write_total_weight<T>(o, all);
  return all.bad_row;
}

template <typename T>
void backward(const NLLLossOptions& o, int64_t begin, int64_t end) {
  const TypedNLLLossOptions<T> p(o);
  const Tiling tiling = nll_loss_tiling(o);
  T* const grad = static_cast<T*>(o.grad_input);
  const double common_grad_output = o.grad_output_stride == 0 ? p.scaled_grad_output(0) : 0;
  for (int64_t k = begin; k < end; ++k) {
    const Tile tile = tiling.at(k);
    const Runs runs = tiling.runs_of(tile);
    for (int64_t j = 0; j < runs.count[1]; ++j)
      for (int64_t i = 0; i < runs.count[0]; ++i)
        std::memset(grad + runs.start + i * runs.step[0] + j * runs.step[1], 0, size_t(runs.length) * sizeof(T));
    for (int64_t outer = tile.first_outer; outer < tile.first_outer + tile.outer; ++outer) {
      for (int64_t inner = tile.first_inner; inner < tile.first_inner + tile.inner; ++inner) {
        const int64_t row = outer * o.inner + inner, y = o.target_index[row];
        if (y < tile.first_class || y >= tile.first_class + tile.classes || !p.counts(y)) continue;
        const double g = o.grad_output_stride == 0 ? common_grad_output : p.scaled_grad_output(row);
        const int64_t at = outer * o.grad_strides.outer + y * o.grad_strides.classes + inner * o.grad_strides.inner;
        store_one(grad + at, AccumulateType<T>(nll_loss_gradient(p.weight_of(y), g)));
      }
    }
  }
}

template <typename T>
constexpr NLLLossKernels kKernelsOf = {forward<T>, finish<T>, backward<T>};
constexpr NLLLossKernels kNLLLossKernels[] = FUSEDLOSS_FOR_EACH_DTYPE(kKernelsOf);

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
