// What a thread holds of its rows at a time, whether they are rows or columns: a tile of vectors in registers, and its
// slots in shared memory.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "kernels/cuda/cross_entropy_options.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

// A thread's own slots in shared memory, each for a vector of logits, and one more for the probabilities beside it. No
// other thread reads or writes them, so no barrier is needed. Those of a warp lie together, and a thread's next slot a
// warp further on: a constant that instructions can contain.
template <typename T, TargetKind kTarget>
class Slots {
 public:
  explicit __device__ __forceinline__ Slots(const TypedOptions<T>& o)
      : Slots(o, int(threadIdx.y * blockDim.x + threadIdx.x)) {}
  // Those of another thread of the block. The block has whole warps.
  __device__ __forceinline__ Slots(const TypedOptions<T>& o, int thread)
      : own(dynamic_shared_memory + thread / kWarp * (o.plan.slots * kSlotsOfVector * kWarp) + thread % kWarp) {}

  __device__ __forceinline__ uint4& logits(int i) const { return own[kSlotsOfVector * i * kWarp]; }
  __device__ __forceinline__ uint4& probabilities(int i) const { return own[(kSlotsOfVector * i + 1) * kWarp]; }

 private:
  static constexpr int kSlotsOfVector = kTarget == TargetKind::kProbabilities ? 2 : 1;
  uint4* own;
};

// Waits for this thread's copies, but for the last `groups` groups of them. The toolkit's function alone does not keep
// the compiler from moving reads to before it.
__device__ __forceinline__ void wait_for_copies(int groups) {
  __pipeline_wait_prior(size_t(groups));
#if FUSEDLOSS_CUDA_ARCH
  asm volatile("" ::: "memory");
#endif
}

// kVectors vectors of kWidth elements that are neighbours in memory: classes of a row (RowTile), or one class of
// several rows (ColumnTile). kWhole: all vectors exist, so that nothing stands between one vector's instructions and
// the next one's.
template <typename T, TargetKind kTarget, int kWidth, int kVectors, bool kWhole>
struct VectorTile {
  using A = AccumulateType<T>;

  Vector<T, kWidth> x[kVectors];  // logits
  Vector<T, kWidth> t[kTarget == TargetKind::kProbabilities ? kVectors : 1] = {};
  int count;  // of vectors that exist; kVectors or more if all of them do

  __device__ __forceinline__ bool is_there(int k) const { return kWhole || k < count; }

  template <typename F>
  __device__ __forceinline__ void for_each_vector(F f) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if (is_there(k)) f(k);
  }

  // What is not there is 0: a register that is left as it was would have to be kept from the round before.
  __device__ __forceinline__ void load_from_slots(const Slots<T, kTarget>& slots, int number) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      x[k] = Vector<T, kWidth>();
      if (!is_there(k)) continue;
      x[k].from_uint4(slots.logits(number * kVectors + k));
      if (kTarget == TargetKind::kProbabilities) t[k].from_uint4(slots.probabilities(number * kVectors + k));
    }
  }

  // q of element i of vector k, w being its class's weight; for a class index, without what the target class has above
  // the others: kept * w_y.
  template <SpreadKind kKind>
  __device__ __forceinline__ A coefficient(const TypedOptions<T>& o, int k, int i, A w) const {
    return is_of_probabilities(kKind) ? probability_coefficient(t[k][i], w, o.smoothing)
                                      : math::rounded_product(o.smoothing.uniform, w);
  }
};

}  // namespace fusedloss::cuda
