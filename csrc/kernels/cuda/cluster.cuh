// Clusters: blocks that run at the same time, wait for one another and access each other's shared memory.
#pragma once

#include "kernels/cuda/launch.cuh"

namespace fusedloss::cuda {

constexpr int kMaxCluster = 8;  // blocks; every GPU that has clusters supports this many

#if FUSEDLOSS_CUDA_ARCH >= 900 || defined(FUSEDLOSS_LAUNCH)

// Waits for all threads of the cluster. What they did before is then visible to all of them.
__device__ __forceinline__ void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

#else

// Never called: the host launches clusters only if the kernels were compiled for them (see query_device).
__device__ __forceinline__ void cluster_sync() { __trap(); }

#endif

// ---- Messages from one block to another: the receiver waits for these bytes alone (st.async)
//
// A barrier of the cluster would also wait until all earlier stores are done, such as those of a gradient.
//
// The receiver has an arrival barrier (mbarrier) in its shared memory, which goes from phase to phase. A phase ends
// when one thread of the receiver has announced in this phase how many bytes to expect, and all of them have arrived.
// Some bytes may arrive before the announcement. A thread that has waited for the end of a phase can read the bytes
// that arrived in it. Nothing else that the senders did is ordered by the barrier.
//
//   start_arrivals(barriers)            initialises the barriers, in phase 0; one thread calls it, before a barrier of
//                                       the cluster
//   shared_address(&barrier)            converts a barrier's address for the functions below, once for all of them
//   expect_arrivals(at, bytes)          announces how many bytes will arrive in this phase
//   send_to_block(rank, &p, piece, at)  starts a write of 16 bytes to p in the shared memory of the block of that rank;
//                                       when they arrive, that block's barrier counts them
//   wait_for_arrivals(at, parity)       if the number of the current phase has this parity (0 or 1), waits for the end
//                                       of that phase; otherwise the previous phase is meant, and it returns at once
//
// The emulator, which defines FUSEDLOSS_LAUNCH, also defines these five functions.

#if FUSEDLOSS_CUDA_ARCH >= 900

__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ unsigned in_block_of_cluster(unsigned address, int rank) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

template <int kCount>
__device__ __forceinline__ void start_arrivals(uint64_t (&barriers)[kCount]) {
  for (uint64_t& barrier : barriers)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect_arrivals(unsigned at, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

__device__ __forceinline__ void send_to_block(int rank, const uint4* p, uint4 piece, unsigned at) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   in_block_of_cluster(shared_address(p), rank)),
               "r"(piece.x), "r"(piece.y), "r"(piece.z), "r"(piece.w), "r"(in_block_of_cluster(at, rank))
               : "memory");
}

__device__ __forceinline__ void wait_for_arrivals(unsigned at, unsigned parity) {
  for (unsigned done = 0; done == 0;)
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
}

#elif !defined(FUSEDLOSS_LAUNCH)

// __builtin_unreachable lets the compiler drop all code behind a call of one of these functions.
__device__ __forceinline__ void no_arrivals() {
  __trap();
  __builtin_unreachable();
}
template <int kCount>
__device__ __forceinline__ void start_arrivals(uint64_t (&)[kCount]) {
  no_arrivals();
}
__device__ __forceinline__ unsigned shared_address(const void*) { return 0; }
__device__ __forceinline__ void expect_arrivals(unsigned, unsigned) { no_arrivals(); }
__device__ __forceinline__ void send_to_block(int, const uint4*, uint4, unsigned) { no_arrivals(); }
__device__ __forceinline__ void wait_for_arrivals(unsigned, unsigned) { no_arrivals(); }

#endif

}  // namespace fusedloss::cuda
