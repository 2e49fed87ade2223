// Kernels that use everything that the emulator checks, either correctly or with one planted bug. `sum` sums `input`
// and leaves the sum of each block in `partial`; the last block to finish adds those. In `exchange`, the blocks of a
// cluster send each other the first elements, and each block adds up all of them.
#include <cassert>

namespace {

constexpr int kThreads = 96;
constexpr int kBlocks = 4, kTurns = 5;  // of the cluster

// The planted bugs. tests/test_cuda_emulator.py lists the complaint that each of them must cause.
enum {
  kNone,
  kNoBarrier,         // warps' sums are read before they are written
  kNoFence,           // blocks' sums are not published before the ticket is taken
  kNoSyncWarp,        // lanes read what other lanes of their warp may not have written yet
  kDivergentBarrier,  // a barrier that only the first warp reaches
  kDivergentShuffle,  // a shuffle that half of a warp reaches
  kPlainTicket,       // blocks count with += instead of an atomic
  kPastSharedArray,
  kPastInput,
  kUninitialised,  // shared memory is read before it is written
  kMisaligned,     // a 16-byte load from a misaligned address
  kWriteToInput,
  kAssert,
  kOverflow,             // of a signed integer
  kNoWait,               // messages are read before they arrive
  kWrongParity,          // waits for a phase that ended long ago
  kTooFewBytes,          // one block's piece is not waited for
  kTooManyBytes,         // some of the expected bytes never arrive
  kStillRead,            // blocks send to a place that others may still read
  kNoBarrierBeforeSend,  // other threads of the sending block may still read the previous messages
  kNotStarted,           // the barrier that counts the messages is not initialised
  kNoClusterBarrier,     // blocks send to one that may not have started, or whose barrier may not be initialised
  kSentAtTheEnd,         // blocks send to one that may have ended
  kNoSuchBlock,
};

__device__ float load_input(const float* input, int numel, int i) {
  if (planted_bug == kPastInput) return input[i];
  if (planted_bug == kMisaligned) {
    const float4 four = *reinterpret_cast<const float4*>(input + 1);
    return four.x;
  }
  return i < numel ? input[i] : 0.0f;
}

__device__ float warp_sum(float value) {
  if (planted_bug == kDivergentShuffle && threadIdx.x % 2 == 0) return value;
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// Returns the value of each lane's neighbour, by way of shared memory.
__device__ float neighbour(float value) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = value;
  if (planted_bug != kNoSyncWarp) __syncwarp();
  return values[threadIdx.x ^ 1];
}

__device__ float block_sum(float value) {
  __shared__ float of_warp[kThreads / warpSize];
  volatile int past = planted_bug == kPastSharedArray ? kThreads : 0;
  if (planted_bug == kUninitialised) value += of_warp[0];
  value = warp_sum(value);
  if (threadIdx.x % warpSize == 0) of_warp[threadIdx.x / warpSize + past] = value;
  if (planted_bug == kDivergentBarrier ? threadIdx.x < warpSize : planted_bug != kNoBarrier) __syncthreads();
  return of_warp[0] + of_warp[1] + of_warp[2];
}

__device__ bool is_last_block(unsigned* ticket) {
  __shared__ bool is_last[2];  // the second is unused: two bytes share a shadow
  if (threadIdx.x == 0) {
    if (planted_bug != kNoFence) __threadfence();
    const unsigned number = planted_bug == kPlainTicket ? (*ticket += 1) - 1 : atomicAdd(ticket, 1u);
    is_last[0] = number == gridDim.x - 1;
  }
  __syncthreads();
  return is_last[0];
}

__global__ void sum(float* input, int numel, float* partial, unsigned* ticket, float* total) {
  const float value = load_input(input, numel, int(blockIdx.x * blockDim.x + threadIdx.x));
  const float of_block = block_sum((value + neighbour(value)) / 2);
  if (planted_bug == kWriteToInput) input[0] = 0;
  if (planted_bug == kAssert) __assert_fail("planted", "", 0, "");
  if (planted_bug == kOverflow) {
    volatile int most = 0x7fffffff;
    most = most + 1;
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = of_block;
  if (!is_last_block(ticket) || threadIdx.x != 0) return;
  float result = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) result += partial[i];
  *total = result;
}

__global__ void exchange(const float* input, float* total) {
  __shared__ float4 of_block[2][kBlocks];
  __shared__ uint64_t arrived[2];
  const int rank = int(blockIdx.x), thread = int(threadIdx.x);
  const auto send = [&](int turn) {
    const int place = planted_bug == kStillRead ? 0 : turn % 2;
    const float value = input[turn % kTurns * kBlocks + rank];
    uint4 piece = {};
    std::memcpy(&piece, &value, sizeof value);
    send_to_block(thread + (planted_bug == kNoSuchBlock), reinterpret_cast<uint4*>(&of_block[place][rank]), piece,
                  shared_address(&arrived[turn % 2]));
  };
  if (thread == 0 && planted_bug != kNotStarted) start_arrivals(arrived);
  if (planted_bug != kNoClusterBarrier) __cluster_barrier_wait();
  float sum = 0;
  for (int turn = 0; turn < kTurns; ++turn) {
    const int place = planted_bug == kStillRead ? 0 : turn % 2;
    const auto at = shared_address(&arrived[turn % 2]);
    if (planted_bug != kNoBarrierBeforeSend) __syncthreads();  // all threads have read the previous messages
    const int blocks = planted_bug == kTooFewBytes ? kBlocks - 1 : planted_bug == kTooManyBytes ? kBlocks + 1 : kBlocks;
    if (thread == 0) expect_arrivals(at, unsigned(blocks * sizeof(uint4)));
    if (thread < kBlocks) send(turn);
    if (planted_bug != kNoWait) wait_for_arrivals(at, planted_bug == kWrongParity ? 0 : unsigned(turn / 2 % 2));
    for (int block = 0; block < kBlocks; ++block) sum += of_block[place][block].x;
  }
  if (planted_bug == kSentAtTheEnd && thread < kBlocks) send(kTurns);
  if (thread == 0) total[1 + rank] = sum;
}

}  // namespace

// `total` has one element for `sum`, then one for each block of `exchange`.
extern "C" __attribute__((visibility("default"))) int self_test(float* input, int numel, float* partial,
                                                                unsigned* ticket, float* total) {
  launch_on_cpu(sum, dim3(unsigned(numel + kThreads - 1) / kThreads), dim3(kThreads), 1, 0, input, numel, partial,
                ticket, total);
  launch_on_cpu(exchange, dim3(kBlocks), dim3(kThreads), kBlocks, 0, input, total);
  return cudaGetLastError();
}
