#include "kernels/cuda/cross_entropy_cuda.cuh"

template struct fusedloss::cuda::CrossEntropyOf<fusedloss::DType::kBFloat16>;
