// The launch bounds of the cross entropy kernels, in one table: the threads of a block, at most, and how many such
// blocks a multiprocessor must hold at once. Without that number the compiler spills registers to make room for a few
// more blocks.
#pragma once

#include "kernels/cuda/cross_entropy_target.h"
#include "kernels/cuda/launch.cuh"

namespace fusedloss::cuda {

// For float64 with any target, and for the other types by the kind of target.
struct ByTarget {
  int float64, index, smoothed_index, probabilities;

  constexpr int of(bool is_float64, TargetKind target) const {
    return is_float64                             ? float64
           : target == TargetKind::kIndex         ? index
           : target == TargetKind::kSmoothedIndex ? smoothed_index
                                                  : probabilities;
  }
};

template <typename T, TargetKind kTarget>
constexpr int for_target(const ByTarget& numbers) {
  return numbers.of(sizeof(T) == 8, kTarget);
}

constexpr int kFewClassesThreads = 128;   // of a block whose threads take a row of a few classes each
constexpr int kLaneBlockThreads = 128;    // of a block in which some lanes of a warp take a row
constexpr int kRowThreads = 256;          // of a block that takes one row, at most
constexpr int kColumnThreadsAcross = 64;  // side by side, of a block that takes columns, at most
constexpr int kSplitColumnThreads = 256;  // of a block that shares its columns with others, at most
// Of a block that has its columns for itself, at most.
constexpr ByTarget kColumnThreads = {256, 512, 256, 256};

// clang-format off
//                                    float64, index, smoothed, probabilities
constexpr ByTarget kFewClassesBlocks =     {2, 6, 4, 4};
constexpr ByTarget kLossOnlyBlocks =       {1, 4, 3, 3};
constexpr ByTarget kColumnsBlocks =        {1, 1, 2, 2};
constexpr ByTarget kSplitColumnsBlocks =   {1, 3, 2, 2};
template <bool kShifted>
constexpr ByTarget kRowsBlocks =           {1, 3, kShifted ? 2 : 3, 2};
template <bool kWithGradient>
constexpr ByTarget kThreadColumnsBlocks =  {4, kWithGradient ? 8 : 12, 8, 6};
// For six blocks, smoothing would spill registers in float32, and on GPUs before Hopper.
template <typename T, bool kShifted>
constexpr ByTarget kRegisterRowsBlocks =   {2, kShifted ? 5 : 6,
                                            kShifted || sizeof(T) == 4 || FUSEDLOSS_CUDA_ARCH < 900 ? 5 : 6, 4};
// clang-format on

}  // namespace fusedloss::cuda
