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
__global__ void __launch_bounds__(kRowsOfBlock, (kLaneBlocks<T, kTarget, kShifted>)) forward_lanes(const Problem<T> o) {
  using A = AccumulateType<T>;
  __shared__ Partial sums[kRowsOfBlock];  // a row's first lane has one for itself
  if (threadIdx.x == 0) sums[threadIdx.y] = {};
  let_next_launch_start();
  A grad_output = 0;
  bool is_first_turn = true;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < o.plan.rows; first += o.plan.step) {
    const int64_t number = first + threadIdx.y;
    // All lanes of a warp take part when statistics are merged, so those behind the last row look at a row once more.
    const bool is_row = number < o.plan.rows;
    const Row<T, kTarget> row(o, is_row ? number : first);
    const auto share = share_of(row, int(threadIdx.x));
    // Asked for whether the row counts or not: nobody waits for its target first.
    const Tile<T, kTarget, kVector<T>, kLanePacks, false> tile(row, share, 0);
    const T x_y = ask_for_target_logit(row);
    auto state = empty_row_state<A>();
    with_spread<kTarget>(o, [&](auto spread) { absorb_tile<decltype(spread)::value>(state, row, tile); });
    if (share.template units<1>() > 0) absorb<1, kTilePacks<kTarget>>(state, row, share);
    state = lanes_merge<is_spread(kTarget)>(state, int(blockDim.x));
    const A scale = scale_of(row, state);
    if (is_row && threadIdx.x == 0) finish_row(row, state, scale, x_y, sums[threadIdx.y]);
    if (is_first_turn) {
      wait_for_launch_before();  // for total_weight
      grad_output = with_mean(o, A(1));
    }
    is_first_turn = false;
    if (!is_row) continue;
    if (!row.counts()) {
      write_row_of_zeros(row, share);
      continue;
    }
    write_gradient(row, row_gradient(o, state.max, scale, grad_output), share, x_y, [&](const RowGradient<A>& of_row) {
      with_spread<kTarget>(
          o, [&](auto spread) { write_tile<decltype(spread)::value, kShifted>(row, of_row, tile, share, 0); });
    });
  }
  leave_rows(o, sums);
}

}  // namespace fusedloss::cuda
