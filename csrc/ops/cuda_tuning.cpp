#include "ops/cuda_tuning.h"

#include <c10/util/Exception.h>

namespace fusedloss {
namespace {

CudaTuning tuning;

struct Field {
  const char* name;
  int64_t CudaTuning::* member;
};
constexpr Field kFields[] = {
    {"thread_classes", &CudaTuning::thread_classes},
    {"warp_bytes", &CudaTuning::warp_bytes},
    {"lane_vectors", &CudaTuning::lane_vectors},
    {"min_lanes", &CudaTuning::min_lanes},
    {"block_threads", &CudaTuning::block_threads},
    {"other_threads", &CudaTuning::other_threads},
    {"split_classes", &CudaTuning::split_classes},
    {"target_weight_rows", &CudaTuning::target_weight_rows},
    {"max_blocks", &CudaTuning::max_blocks},
    {"waves", &CudaTuning::waves},
    {"overlap", &CudaTuning::overlap},
    {"multiprocessors", &CudaTuning::multiprocessors},
    {"kept_bytes", &CudaTuning::kept_bytes},
    {"cluster_blocks", &CudaTuning::cluster_blocks},
};

}  // namespace

const CudaTuning& cuda_tuning() { return tuning; }

void set_cuda_tuning(const std::string& name, int64_t value) {
  if (name == "defaults") {
    tuning = CudaTuning();
    return;
  }
  for (const Field& field : kFields) {
    if (name != field.name) continue;
    tuning.*field.member = value;
    return;
  }
  TORCH_CHECK_VALUE(false, "set_cuda_tuning: name must be a field of CudaTuning or \"defaults\", got \"", name, "\"");
}

}  // namespace fusedloss
