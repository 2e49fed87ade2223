#include "kernels/cuda/cross_entropy_cuda.cuh"

const fusedloss::cuda::CrossEntropyLaunchers fusedloss::cuda::kCrossEntropyFloat16 = kLaunchers<__half>;
