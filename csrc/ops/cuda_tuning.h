// The tuning that the next calls pass to the CUDA kernels: the defaults of options.h, unless someone has changed them.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/options.h"

namespace fusedloss {

const CudaTuning& cuda_tuning();

// Sets one field of CudaTuning by its name, for all later calls of the process; "defaults" restores all of them. For
// benchmarks and tests: no lock protects a call that runs meanwhile.
void set_cuda_tuning(const std::string& name, int64_t value);

}  // namespace fusedloss
