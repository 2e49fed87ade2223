// The kernels for rows of a few classes that follow one another without gaps. A thread takes a row, and keeps its
// exponentials in registers.
//
// If each thread accessed its row in memory, a warp's accesses would lie a row apart. Each would move 32 bytes, of
// which it needs 2 or 4. So a block copies the logits of all its rows to shared memory as one piece, with 16-byte
// accesses. The threads replace them with the gradient there, and the block copies it to memory as one piece. Class
// probabilities are read directly from memory.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <type_traits>

#include "kernels/cuda/cross_entropy_launch_bounds.h"
#include "kernels/cuda/cross_entropy_options.cuh"
#include "kernels/cuda/cross_entropy_plan_rows.h"
#include "kernels/cuda/cross_entropy_row_loss.cuh"
#include "kernels/cuda/loss_values.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

// The block's rows in shared memory.
template <typename T>
class StagedRows {
 public:
  // The rows from `first` on. All threads of the block must call load and store.
  __device__ __forceinline__ StagedRows(const TypedOptions<T>& options, int64_t first)
      : o(options), pitch(o.plan.row_pitch), first(first) {}

  __device__ __forceinline__ bool has_row() const { return first + threadIdx.x < o.plan.rows; }
  __device__ __forceinline__ T* row() const { return reinterpret_cast<T*>(memory() + int(threadIdx.x) * pitch); }

  __device__ __forceinline__ void load() const {
    const T* const from = static_cast<const T*>(o.logits) + first * o.classes;
    __syncthreads();  // all threads have read or stored the previous rows
    for_each_vector([&](int i, char* staged, auto piece) {
      constexpr int kPiece = decltype(piece)::value;
#pragma unroll
      for (int at = 0; at < kVectorBytes; at += kPiece)
        __pipeline_memcpy_async(staged + at, reinterpret_cast<const char*>(from + i) + at, kPiece);
    });
    for_each_element_behind([&](int i, T* staged) { *staged = from[i]; });
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
  }

  __device__ __forceinline__ void store() const {
    T* const to = static_cast<T*>(o.grad_logits) + first * o.classes;
    __syncthreads();  // all threads have written their rows
    for_each_vector([&](int i, const char* staged, auto piece) {
      constexpr int kPiece = decltype(piece)::value;
      using Piece = std::conditional_t<kPiece == 16, uint4, std::conditional_t<kPiece == 8, uint2, uint32_t>>;
      alignas(16) Piece pieces[kVectorBytes / kPiece];
#pragma unroll
      for (int k = 0; k < kVectorBytes / kPiece; ++k) pieces[k] = reinterpret_cast<const Piece*>(staged)[k];
      store_vector(to + i, *reinterpret_cast<const uint4*>(pieces));
    });
    for_each_element_behind([&](int i, const T* staged) { to[i] = *staged; });
  }

 private:
  const TypedOptions<T>& o;
  const int pitch;
  const int64_t first;

  static __device__ __forceinline__ char* memory() { return reinterpret_cast<char*>(dynamic_shared_memory); }
  __device__ __forceinline__ int row_bytes() const { return int(o.classes * sizeof(T)); }
  __device__ __forceinline__ int elements() const {
    return int(smaller(o.plan.rows - first, int64_t(kFewClassesThreads)) * o.classes);
  }

  // Calls f(number of the first element, place in shared memory, bytes that can be copied at a time) for each vector of
  // the block's rows.
  template <typename F>
  __device__ __forceinline__ void for_each_vector(F f) const {
    const int vectors = elements() / kVectorSize<T>;
    if (pitch == row_bytes()) {
      for (int v = int(threadIdx.x); v < vectors; v += kFewClassesThreads)
        f(v * kVectorSize<T>, memory() + v * kVectorBytes, std::integral_constant<int, kVectorBytes>());
    } else {
      const unsigned vectors_of_row = row_bytes() / kVectorBytes;
      for (int v = int(threadIdx.x); v < vectors; v += kFewClassesThreads)
        f(v * kVectorSize<T>, memory() + v * kVectorBytes + unsigned(v) / vectors_of_row * (pitch - row_bytes()),
          std::integral_constant<int, row_gap_bytes(sizeof(T))>());
    }
  }
  // Calls f(number, place) for the elements after the last vector, which only the last block has. Rows have no gaps
  // between them in that case.
  template <typename F>
  __device__ __forceinline__ void for_each_element_behind(F f) const {
    const int i = elements() / kVectorSize<T> * kVectorSize<T> + int(threadIdx.x);
    if (i < elements()) f(i, reinterpret_cast<T*>(memory()) + i);
  }
};

// A row in registers: its logits, and then their exponentials.
template <typename T, TargetKind kTarget, SpreadKind kKind>
struct RowOfThread {
  using A = AccumulateType<T>;

  const RowTarget<T, kTarget>& row;
  T* const staged;             // the logits, which the gradient replaces
  const T* const probability;  // null for a class index
  A x[kFewClasses];

  __device__ __forceinline__ RowOfThread(const RowTarget<T, kTarget>& target, T* logits)
      : row(target),
        staged(logits),
        probability(is_of_probabilities(kKind)
                        ? static_cast<const T*>(row.o.target_probability) + row.number * row.o.target_strides.outer
                        : nullptr) {
    for_each_class([&](int c) { x[c] = widen(staged[c]); });
  }

  template <typename F>
  __device__ __forceinline__ void for_each_class(F f) const {
#pragma unroll
    for (int c = 0; c < kFewClasses; ++c)
      if (c < row.o.classes) f(c);
  }

  // q of class c. For a class index, this leaves out the term kept * w_y, which only the target class has.
  __device__ __forceinline__ A coefficient(int c) const {
    const TypedOptions<T>& o = row.o;
    const A w = is_weighted(kKind) ? o.weight_of(c) : A(1);
    return is_of_probabilities(kKind)
               ? probability_coefficient(A(widen(probability[c * o.target_strides.classes])), w, o.smoothing)
               : math::rounded_product(o.smoothing.uniform, w);
  }

  __device__ __forceinline__ T logit_of_target() const { return row.y < 0 ? T() : staged[row.y]; }

  __device__ __forceinline__ RowState<A> statistics() {
    auto state = empty_row_state<A>();
    for_each_class([&](int c) { state.max = math::max(state.max, x[c]); });
    const A reference = shift(state.max);
    for_each_class([&](int c) {
      const A distance = x[c] - reference;
      x[c] = math::exp_nonpositive(distance);
      add_class<is_spread(kTarget)>(state, distance, x[c], coefficient(c));
    });
    return state;
  }

  // For the backward pass, where the statistics are known.
  __device__ __forceinline__ void compute_exponentials(A max) {
    const A reference = shift(max);
    for_each_class([&](int c) { x[c] = math::exp_nonpositive(x[c] - reference); });
  }

  // Computes the gradient from the exponentials. As in other kernels, the target class is written after the others. x_y
  // is its logit.
  __device__ __forceinline__ void write_gradient(A max, A scale, A grad_output, T x_y) const {
    const bool contributes = row.contributes();
    const A factor = scale * grad_output;
    for_each_class([&](int c) {
      const A grad = is_spread(kTarget) ? logit_gradient(x[c], scale, coefficient(c), grad_output) : x[c] * factor;
      staged[c] = contributes ? narrow<T>(grad) : T();
    });
    if (row.y < 0) return;
    const A e = math::exp_nonpositive(A(widen(x_y)) - max);
    staged[row.y] = narrow<T>(logit_gradient(e, scale, row.coefficient(), grad_output));
  }
};

template <typename T, TargetKind kTarget>
__global__ void __launch_bounds__(kFewClassesThreads, (for_target<T, kTarget>(kFewClassesBlocks)))
    forward_few_classes(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  let_next_launch_start();
  LossAccumulator sum = {};
  for (int64_t first = int64_t(blockIdx.x) * kFewClassesThreads; first < o.plan.rows; first += o.plan.step) {
    const StagedRows<T> block_rows(o, first);
    const int64_t number = first + threadIdx.x, target = o.target_at(number);
    block_rows.load();
    wait_for_launch_before();  // scale_grad_output reads total_weight
    const A grad_output = o.grad_logits != nullptr ? o.scale_grad_output(A(1)) : A(0);
    if (block_rows.has_row()) {
      const RowTarget<T, kTarget> row(o, number, o.class_of(target));
      on_spread<kTarget>(o, [&](auto spread) {
        RowOfThread<T, kTarget, decltype(spread)::value> classes(row, block_rows.row());
        const T x_y = classes.logit_of_target();
        const RowState<A> state = classes.statistics();
        const A scale = row.scale_of(state);
        store_row_result(row, state, scale, x_y, sum);
        if (o.grad_logits != nullptr) classes.write_gradient(state.max, scale, grad_output, x_y);
      });
    }
    if (o.grad_logits != nullptr) block_rows.store();
  }
  store_block_sum_of_threads(o, sum);
}

template <typename T, TargetKind kTarget>
__global__ void __launch_bounds__(kFewClassesThreads, (for_target<T, kTarget>(kFewClassesBlocks)))
    backward_few_classes(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  wait_for_launch_before();
  if (gradient_is_ready<T>(o)) return;
  for (int64_t first = int64_t(blockIdx.x) * kFewClassesThreads; first < o.plan.rows; first += o.plan.step) {
    const StagedRows<T> block_rows(o, first);
    const int64_t number = first + threadIdx.x, target = o.target_at(number);
    block_rows.load();
    if (block_rows.has_row()) {
      const RowTarget<T, kTarget> row(o, number, o.class_of(target));
      const A max = static_cast<const A*>(o.row_max)[number], scale = static_cast<const A*>(o.row_scale)[number];
      on_spread<kTarget>(o, [&](auto spread) {
        RowOfThread<T, kTarget, decltype(spread)::value> classes(row, block_rows.row());
        const T x_y = classes.logit_of_target();
        classes.compute_exponentials(max);
        classes.write_gradient(max, scale, o.scale_grad_output(grad_output_at<T>(o, number)), x_y);
      });
    }
    block_rows.store();
  }
}

}  // namespace fusedloss::cuda
