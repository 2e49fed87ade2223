// Stores of 16 bytes where the gradient's rows are aligned differently from the logits' rows, as they are for a slice
// of a padded vocabulary.
//
// The vectors that the lanes of a warp have computed are neighbours in the gradient, but each begins between two
// 16-byte boundaries. So each lane stores the aligned vector that ends inside its computed vector. It gets the
// beginning of the aligned vector from the lane before. Lane 0 is different, because the two parts of its aligned
// vector belong to different places: the end of it, which lane 0 has computed, is the beginning of what the warp
// stores, and the beginning of it, which comes from the last lane, is the end of what the warp stores. The elements of
// these "edge" vectors are stored one by one, for all vectors of a tile at once, after an exchange through shared
// memory.
#pragma once

#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

constexpr int kMaxTileVectors = 8;  // maximum vectors of a tile that a thread has

// The edge vectors: those of lane 0, for each warp of a block.
__device__ __forceinline__ uint4 (&edges_of_warps()) [kMaxRowWarps][kMaxTileVectors] {
  __shared__ uint4 edges[kMaxRowWarps][kMaxTileVectors];
  return edges;
}

// Hides from the compiler where the value comes from. Otherwise the compiler would compute everything that follows from
// a thread's number before the loop over the rows, and keep it in registers that are needed elsewhere.
__device__ __forceinline__ int opaque(int value) {
#if FUSEDLOSS_CUDA_ARCH
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// A warp's vectors of a tile in the gradient. All lanes of the warp store them together.
template <typename T>
struct ShiftedVectors {
  char* boundary;  // the last 16-byte boundary before the first lane's first vector
  int bytes;       // bytes from the boundary to that vector: 0 where a row happens to be aligned like its logits
  int lane, warp;  // the lane's number, and the warp's number in the block
  int step;        // bytes from a vector of a lane to its next one
  int vectors;     // vectors of the row, from the first lane's first vector on

  // The number of lanes that have a k-th vector.
  template <bool kWhole>
  __device__ __forceinline__ int lanes(int k) const {
    if constexpr (kWhole) return kWarp;
    const int left = vectors - k * step / kVectorBytes;
    return left < 0 ? 0 : left < kWarp ? left : kWarp;
  }

  template <bool kWhole>
  __device__ __forceinline__ void store(int k, const Vector<T, kVectorSize<T>>& vector) const {
    constexpr bool kHalves = sizeof(T) == 2;  // then a word may combine halves of two words
    const int lanes_here = lanes<kWhole>(k), before = lane == 0 ? lanes_here - 1 : lane - 1;
    // The words of a lane are rotated to their positions in the aligned vector. Those that wrap around from its end to
    // its beginning belong to the next lane.
    const bool by_one = sizeof(T) < 8 && (bytes & 4), by_two = bytes & 8;
    uint32_t moved[4], words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) moved[i] = choose(by_one, vector.words[(i + 3) % 4], vector.words[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = choose(by_two, moved[(i + 2) % 4], moved[i]);
    const uint32_t last = kHalves ? __shfl_sync(kAllLanes, words[3], before) : 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) words[i] = __shfl_sync(kAllLanes, words[i], 4 * i + 4 <= bytes ? before : lane);
    if constexpr (kHalves) {
      const int shift = bytes & 2 ? 16 : 0;
#pragma unroll
      for (int i = 3; i >= 0; --i) words[i] = __funnelshift_l(i > 0 ? words[i - 1] : last, words[i], shift);
    }
    const uint4 shifted = {words[0], words[1], words[2], words[3]};
    if (lane == 0) edges_of_warps()[warp][k] = shifted;
    else if (kWhole || lane < lanes_here) store_vector(boundary + k * step + lane * kVectorBytes, shifted);
  }

  // Called after the tile's vectors have been stored.
  template <bool kWhole, int kVectors>
  __device__ __forceinline__ void store_edges() const {
    static_assert(kVectors <= kMaxTileVectors);
    const int i = lane % kVectorSize<T>;
    __syncwarp();
#pragma unroll
    for (int k = lane / kVectorSize<T>; k < kVectors; k += kWarp / kVectorSize<T>) {
      if (!kWhole && lanes<kWhole>(k) <= 0) continue;
      const int place = i * int(sizeof(T)), behind = place < bytes ? lanes<kWhole>(k) * kVectorBytes : 0;
      *reinterpret_cast<T*>(boundary + k * step + place + behind) =
          reinterpret_cast<const T*>(&edges_of_warps()[warp][k])[i];
    }
    __syncwarp();  // before the next tile overwrites the edges, and before another lane writes the target class
  }

 private:
  // Takes values: a choice between elements of an array is a choice between addresses, for which the array must be in
  // memory.
  static __device__ __forceinline__ uint32_t choose(bool first, uint32_t a, uint32_t b) { return first ? a : b; }
};

}  // namespace fusedloss::cuda
