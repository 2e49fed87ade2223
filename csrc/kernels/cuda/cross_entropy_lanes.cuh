// Short rows whose gradient is wanted: some lanes of a warp share one, and each keeps its part of it in registers, so that
// the row is read once.
#pragma once

#include "kernels/cuda/cross_entropy_finish.cuh"

namespace fusedloss::cuda {

// Blocks that a multiprocessor must hold at once. Said outright since the compiler, left to choose, spills registers. For six
// of them, smoothing would spill some in float32, and on GPUs before Hopper.
template <typename T, TargetKind kTarget, bool kShifted>
constexpr int kLaneBlocks = sizeof(T) == 8                                ? 2
                            : kTarget == TargetKind::kProbabilities       ? 4
                            : kShifted                                    ? 5
                            : kTarget == TargetKind::kIndex               ? 6
                            : sizeof(T) == 4 || FUSEDLOSS_CUDA_ARCH < 900 ? 5
                                                                          : 6;

// threadIdx.x: the lane among those of a row; threadIdx.y: the row of the block.
template <typename T, TargetKind kTarget, bool kShifted>
__global__ void __launch_bounds__(kLaneBlockThreads, (kLaneBlocks<T, kTarget, kShifted>)) forward_rows_in_registers(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  __shared__ LossAccumulator sums[kLaneBlockThreads];  // a row's first lane has one for itself
  if (threadIdx.x == 0) sums[threadIdx.y] = {};
  let_next_launch_start();
  A grad_output = 0;
  bool is_first_turn = true;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < o.plan.rows; first += o.plan.step) {
    const int64_t number = first + threadIdx.y;
    // All lanes of a warp take part when statistics are merged, so those behind the last row look at a row once more.
    const bool is_row = number < o.plan.rows;
    const Row<T, kTarget> row(o, is_row ? number : first);
    const auto range = range_of_thread(row, int(threadIdx.x));
    // Asked for whether the row contributes or not: nobody waits for its target first.
    const RowTile<T, kTarget, kVectorSize<T>, kRegisterVectors, false> tile(row, range, 0);
    const T x_y = prefetch_target_logit(row);
    auto state = empty_row_state<A>();
    on_spread<kTarget>(o, [&](auto spread) { accumulate_tile<decltype(spread)::value>(state, row, tile); });
    if (range.template units<1>() > 0) accumulate_tiles<1, kTileVectors<kTarget>>(state, row, range);
    state = lanes_merge<is_spread(kTarget)>(state, int(blockDim.x));
    const A scale = scale_of(row, state);
    if (is_row && threadIdx.x == 0) store_row_result(row, state, scale, x_y, sums[threadIdx.y]);
    if (is_first_turn) {
      wait_for_launch_before();  // for total_weight
      grad_output = scaled_grad_output(o, A(1));
    }
    is_first_turn = false;
    if (!is_row) continue;
    if (!row.contributes()) {
      write_row_of_zeros(row, range);
      continue;
    }
    write_gradient(row, gradient_factors(o, state.max, scale, grad_output), range, x_y, [&](const GradientFactors<A>& factors) {
      on_spread<kTarget>(
          o, [&](auto spread) { write_tile<decltype(spread)::value, kShifted>(row, factors, tile, range, 0); });
    });
  }
  store_block_sum_of_rows(o, sums);
}

}  // namespace fusedloss::cuda
