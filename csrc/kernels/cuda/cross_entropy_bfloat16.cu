#include "kernels/cuda/cross_entropy_cuda.cuh"

const fusedloss::cuda::CrossEntropyLaunchers fusedloss::cuda::kCrossEntropyBFloat16 = kLaunchers<__nv_bfloat16>;
