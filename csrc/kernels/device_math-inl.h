// Includes the math functions (namespace `math`) of the device that a formula is compiled for. They take scalars on the
// GPU, and scalars or vectors on the CPU. The file also defines FUSEDLOSS_INLINE, and FUSEDLOSS_BEGIN_NAMESPACE and
// FUSEDLOSS_END_NAMESPACE, which enclose all code that is compiled for the device.
//
// A file whose name ends in -inl.h is compiled once for each instruction set, each time in a different namespace. Its
// include guard is therefore a toggle: cpu/foreach_instruction_set.h defines or undefines FUSEDLOSS_ISA_TOGGLE before
// each compilation. In CUDA sources the macro is never defined, so the guard works like any other.
#if defined(__CUDACC__) || defined(FUSEDLOSS_CUDA_ON_CPU)
#include "kernels/cuda/math.cuh"
#else
#include "kernels/cpu/math-inl.h"
#endif
