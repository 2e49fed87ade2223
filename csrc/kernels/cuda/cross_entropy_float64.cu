#include "kernels/cuda/cross_entropy_cuda.cuh"

const fusedloss::cuda::CrossEntropyLaunchers fusedloss::cuda::kCrossEntropyFloat64 = kLaunchers<double>;
