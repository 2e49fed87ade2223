// The tuning that calls pass to the CUDA kernels: the defaults of kernels/options.h, unless set_cuda_tuning changed
// them.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/options.h"

namespace fusedloss {

const CudaTuning& cuda_tuning();

// Sets one field of CudaTuning by name, for all later calls of the process; "defaults" restores all fields. For
// benchmarks and tests only: it is not synchronised with calls on other threads.
void set_cuda_tuning(const std::string& name, int64_t value);

}  // namespace fusedloss
