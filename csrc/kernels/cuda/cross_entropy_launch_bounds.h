// The launch bounds of the cross entropy kernels, in one table: the maximum number of threads of a block, and how many
// such blocks a multiprocessor must be able to hold at once. Without the second number, the compiler spills registers
// to make room for a few more blocks.
#pragma once

#include "kernels/cuda/cross_entropy_target.h"
#include "kernels/cuda/launch.cuh"

namespace fusedloss::cuda {

// A number for float64 with any kind of target, and one for each kind of target with the other dtypes.
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

constexpr int kFewClassesThreads = 128;   // threads of a block where each thread takes a row of a few classes
constexpr int kLaneBlockThreads = 128;    // threads of a block where some lanes of a warp take a row
constexpr int kRowThreads = 256;          // maximum threads of a block that takes one row
constexpr int kColumnThreadsAcross = 64;  // maximum threads side by side of a block that takes columns
constexpr int kSplitColumnThreads = 256;  // maximum threads of a block that shares its columns with other blocks
// Maximum threads of a block that does not share its columns with other blocks.
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
// With smoothing, six blocks would make the compiler spill registers in float32, and on GPUs before Hopper.
template <typename T, bool kShifted>
constexpr ByTarget kRegisterRowsBlocks =   {2, kShifted ? 5 : 6,
                                            kShifted || sizeof(T) == 4 || FUSEDLOSS_CUDA_ARCH < 900 ? 5 : 6, 4};
// clang-format on

}  // namespace fusedloss::cuda
