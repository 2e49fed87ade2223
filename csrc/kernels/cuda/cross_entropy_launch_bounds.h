// The launch bounds of the cross entropy kernels, in one table: threads of a block, at most, and blocks of so many that
// a multiprocessor must hold at once. The second number is given since the compiler, left to choose, spills registers
// to make room for a few more blocks.
#pragma once

#include "kernels/cuda/cross_entropy_target.h"
#include "kernels/cuda/launch.cuh"

namespace fusedloss::cuda {

struct LaunchBounds {
  int threads, blocks;
};

// For float64 with any target, and for the other types by the kind of target.
struct LaunchBoundsByTarget {
  LaunchBounds float64, index, smoothed_index, probabilities;

  constexpr LaunchBounds of(bool is_float64, TargetKind target) const {
    return is_float64                              ? float64
           : target == TargetKind::kIndex          ? index
           : target == TargetKind::kSmoothedIndex  ? smoothed_index
                                                   : probabilities;
  }
};

constexpr int kFewClassesThreads = 128;   // of a block whose threads take a row of a few classes each
constexpr int kLaneBlockThreads = 128;    // of a block in which some lanes of a warp take a row
constexpr int kRowThreads = 256;          // of a block that takes one row, at most
constexpr int kColumnThreadsAcross = 64;  // side by side, of a block that takes columns, at most
constexpr int kSplitColumnThreads = 256;  // of a block that shares its columns with others, at most

//                                                float64    index      smoothed   probabilities
constexpr LaunchBoundsByTarget kFewClassesBounds = {{128, 2},  {128, 6},  {128, 4},  {128, 4}};
constexpr LaunchBoundsByTarget kLossOnlyBounds =   {{256, 1},  {256, 4},  {256, 3},  {256, 3}};
constexpr LaunchBoundsByTarget kColumnsBounds =    {{256, 1},  {512, 1},  {256, 2},  {256, 2}};
constexpr LaunchBoundsByTarget kSplitColumnsBounds = {{256, 1}, {256, 3}, {256, 2},  {256, 2}};
template <bool kShifted>
constexpr LaunchBoundsByTarget kRowsBounds =       {{256, 1},  {256, 3},  {256, kShifted ? 2 : 3},  {256, 2}};
template <bool kWithGradient>
constexpr LaunchBoundsByTarget kThreadColumnsBounds =
                                                   {{64, 4},   {64, kWithGradient ? 8 : 12},  {64, 8},  {64, 6}};
// For six blocks, smoothing would spill registers in float32, and on GPUs before Hopper.
template <typename T, bool kShifted>
constexpr LaunchBoundsByTarget kRegisterRowsBounds =
    {{128, 2},
     {128, kShifted ? 5 : 6},
     {128, kShifted || sizeof(T) == 4 || FUSEDLOSS_CUDA_ARCH < 900 ? 5 : 6},
     {128, 4}};

// What __launch_bounds__ takes, for logits of type T.
template <typename T, TargetKind kTarget>
constexpr int max_threads(const LaunchBoundsByTarget& bounds) {
  return bounds.of(sizeof(T) == 8, kTarget).threads;
}
template <typename T, TargetKind kTarget>
constexpr int min_blocks(const LaunchBoundsByTarget& bounds) {
  return bounds.of(sizeof(T) == 8, kTarget).blocks;
}

}  // namespace fusedloss::cuda
