// The functions of a number, in `math`, for the device that a formula is compiled for: a number is a scalar on the GPU,
// and on the CPU a vector too. With them come FUSEDLOSS_INLINE, and FUSEDLOSS_BEGIN_NAMESPACE and
// FUSEDLOSS_END_NAMESPACE around whatever is compiled for the device.
//
// A file whose name ends in -inl.h is compiled once for each instruction set, in a namespace of its own. So its include
// guard is a toggle: cpu/foreach_instruction_set.h defines or undefines FUSEDLOSS_ISA_TOGGLE before each of them. In
// CUDA sources nothing does, and the guard is like any other.
#if defined(__CUDACC__) || defined(FUSEDLOSS_CUDA_ON_CPU)
#include "kernels/cuda/math.cuh"
#else
#include "kernels/cpu/math-inl.h"
#endif
