// What a thread holds of its rows or columns at a time: a tile of vectors in registers, and its slots in shared memory.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "kernels/cuda/cross_entropy_options.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

// A thread's own slots in shared memory: one for each vector of logits, and one beside it for the probabilities. No
// other thread uses them, so no barrier is needed. (One exception: in columns, another thread reads the logit of the
// target class, after a barrier.) The slots of a warp are interleaved, so that a thread's next slot is a warp's width
// further on. Instructions can contain this distance because it is a constant.
template <typename T, TargetKind kTarget>
class Slots {
 public:
  explicit __device__ __forceinline__ Slots(const TypedOptions<T>& o)
      : Slots(o, int(threadIdx.y * blockDim.x + threadIdx.x)) {}
  // The slots of another thread of the block. The block must consist of whole warps.
  __device__ __forceinline__ Slots(const TypedOptions<T>& o, int thread)
      : own(dynamic_shared_memory + thread / kWarp * (o.plan.slots * kSlotsOfVector * kWarp) + thread % kWarp) {}

  __device__ __forceinline__ uint4& logits(int i) const { return own[kSlotsOfVector * i * kWarp]; }
  __device__ __forceinline__ uint4& probabilities(int i) const { return own[(kSlotsOfVector * i + 1) * kWarp]; }

 private:
  static constexpr int kSlotsOfVector = kTarget == TargetKind::kProbabilities ? 2 : 1;
  uint4* own;
};

// Waits for this thread's copies, except for the last `groups` groups of them. The toolkit's function alone does not
// keep the compiler from moving reads to before it.
__device__ __forceinline__ void wait_for_copies(int groups) {
  __pipeline_wait_prior(size_t(groups));
#if FUSEDLOSS_CUDA_ARCH
  asm volatile("" ::: "memory");
#endif
}

// kVectors vectors of kWidth elements that are neighbours in memory: classes of a row (RowTile), or one class of
// several rows (ColumnTile). kWhole means that all vectors exist, so that no branch separates one vector's instructions
// from the next one's.
template <typename T, TargetKind kTarget, int kWidth, int kVectors, bool kWhole>
struct VectorTile {
  using A = AccumulateType<T>;

  Vector<T, kWidth> x[kVectors];  // logits
  Vector<T, kWidth> t[kTarget == TargetKind::kProbabilities ? kVectors : 1] = {};
  int count;  // vectors that exist; kVectors or more if all do

  __device__ __forceinline__ bool is_there(int k) const { return kWhole || k < count; }

  template <typename F>
  __device__ __forceinline__ void for_each_vector(F f) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if (is_there(k)) f(k);
  }

  // Zero-fill what does not exist, or the register's value from the previous tile would stay live.
  __device__ __forceinline__ void load_from_slots(const Slots<T, kTarget>& slots, int number) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      x[k] = Vector<T, kWidth>();
      if (!is_there(k)) continue;
      x[k].from_uint4(slots.logits(number * kVectors + k));
      if (kTarget == TargetKind::kProbabilities) t[k].from_uint4(slots.probabilities(number * kVectors + k));
    }
  }

  // q of element i of vector k, whose class has weight w. For a class index, this leaves out the term kept * w_y, which
  // only the target class has.
  template <SpreadKind kKind>
  __device__ __forceinline__ A coefficient(const TypedOptions<T>& o, int k, int i, A w) const {
    return is_of_probabilities(kKind) ? probability_coefficient(t[k][i], w, o.smoothing)
                                      : math::rounded_product(o.smoothing.uniform, w);
  }
};

}  // namespace fusedloss::cuda
