// Runs a kernel: each CUDA thread is a fiber with a stack of its own, and blocks run one after another. A seed decides
// which thread runs first. Threads are switched at barriers, at warp operations and, on request, between any two memory
// accesses.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "runtime.h"

extern "C" {
uint3 emulator_thread_idx, emulator_block_idx;
dim3 emulator_block_dim, emulator_grid_dim;
// Saves the running fiber's registers on its stack and its stack pointer in *from, then continues where `to` was saved.
void emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));
}
asm(R"(.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulator {

Thread* running = nullptr;
std::vector<Launch> launches;
std::vector<Block> cluster;
std::mt19937 random_bits;

namespace {

unsigned seed = 0;           // 0: in the order of the threads' numbers
unsigned preempt_every = 0;  // the most accesses between two switches; 0: threads are only switched where they wait
unsigned accesses_left = 0;

void (*kernel_thread)(void*);
void* kernel_arguments;
bool stopped = false;
cudaError_t last_error = cudaSuccess;

void* host_stack_pointer;
std::vector<Thread*> ready;

void back_to_host() { emulator_switch(&running->stack_pointer, host_stack_pointer); }

unsigned thread_count() { return emulator_block_dim.x * emulator_block_dim.y * emulator_block_dim.z; }

bool same_place(SourceLine a, SourceLine b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// The only way to change a state, so that the counts and masks that depend on it are right.
void set_state(Thread& t, State state) {
  Block& block = *t.block;
  --block.in_state[size_t(t.state)];
  ++block.in_state[size_t(state)];
  t.state = state;
  Warp& warp = block.warps[t.number / warpSize];
  const unsigned lane = 1u << t.number % warpSize;
  warp.waiting = state == State::kAtWarpOp ? warp.waiting | lane : warp.waiting & ~lane;
  if (state == State::kDone) warp.alive &= ~lane;
}

// ---- Barriers

// After a barrier, all threads of a block know what any of them has learnt of other blocks.
void pass_barrier(Block& block) {
  ++block.barriers;
  for (Thread& t : block.threads) {
    for (const auto& [other, barriers] : t.known) learn(block.known, other, barriers);
    t.known.clear();
  }
}

// If all threads that have not returned wait at one barrier of this kind: how many of them have a true predicate.
std::optional<int> all_wait(const Block* blocks, size_t count, State at_barrier) {
  for (const Block* block = blocks; block < blocks + count; ++block)
    if (block->in_state[size_t(at_barrier)] + block->in_state[size_t(State::kDone)] < block->threads.size())
      return std::nullopt;
  const Thread* first = nullptr;
  int with_predicate = 0;
  bool some_returned = false;
  for (const Block* block = blocks; block < blocks + count; ++block)
    for (const Thread& t : block->threads) {
      if (t.state == State::kDone) {
        some_returned = true;
        continue;
      }
      if (first == nullptr) first = &t;
      if (!same_place(t.waits_at, first->waits_at))
        complain("DIVERGENT BARRIER", place(first->waits_at) + " and " + place(t.waits_at));
      with_predicate += t.predicate;
    }
  if (first == nullptr) return std::nullopt;
  if (some_returned) complain("BARRIER WITHOUT RETURNED THREADS", place(first->waits_at));
  return with_predicate;
}

// Opens the block's barrier once every thread waits at it or has returned.
void try_barrier(Block& block) {
  const auto with_predicate = all_wait(&block, 1, State::kAtBarrier);
  if (!with_predicate) return;
  pass_barrier(block);
  for (Thread& t : block.threads)
    if (t.state == State::kAtBarrier) {
      t.result = uint64_t(*with_predicate);
      wake(t);
    }
}

// The same for all blocks of a cluster.
void try_cluster_barrier() {
  if (!all_wait(cluster.data(), cluster.size(), State::kAtClusterBarrier)) return;
  for (Block& block : cluster) pass_barrier(block);
  synchronise_cluster();
  for (Block& block : cluster)
    for (Thread& t : block.threads)
      if (t.state == State::kAtClusterBarrier) wake(t);
}

// ---- Warp operations

bool agree(const Thread& a, const Thread& b) {
  const Warp& warp = a.block->warps[a.number / warpSize];
  const bool same_mask = warp.masks[a.number % warpSize] == warp.masks[b.number % warpSize];
  return a.op == b.op && same_mask && same_place(a.waits_at, b.waits_at);
}

// The lanes of the mask that satisfy the predicate. `lanes` are the threads of the warp.
template <typename Predicate>
unsigned which(const Thread* lanes, unsigned mask, Predicate predicate) {
  unsigned found = 0;
  for (int i = 0; i < warpSize; ++i)
    if (mask >> i & 1) found |= unsigned(predicate(lanes[i])) << i;
  return found;
}

void complete(Thread* lanes, unsigned participants, bool whole_warp) {
  const unsigned ballot = which(lanes, participants, [](const Thread& t) { return t.value != 0; });
  for (int i = 0; i < warpSize; ++i) {
    if (!(participants >> i & 1)) continue;
    Thread& t = lanes[i];
    if (t.op == kSyncWarp && whole_warp) ++t.warp_syncs;
    if (t.op == kBallot) t.result = ballot;
    if (t.op == kShuffle) {
      const bool there = participants >> t.source_lane & 1;
      if (!there) complain("SHUFFLE FROM INACTIVE LANE", place(t.waits_at));
      t.result = there ? lanes[t.source_lane].value : ~uint64_t(0);
    }
    wake(t);
  }
}

// Completes a warp operation once all lanes of its mask that have not returned wait at it.
void try_warp_op(Block& block, uint32_t thread) {
  const Warp& warp = block.warps[thread / warpSize];
  Thread* lanes = &block.threads[thread / warpSize * warpSize];
  for (int i = 0; i < warpSize; ++i) {
    const unsigned participants = warp.masks[i] & warp.alive;
    if (!(warp.waiting >> i & 1) || (participants & ~warp.waiting) != 0) continue;
    const Thread& first = lanes[i];
    if (which(lanes, participants, [&](const Thread& t) { return !agree(t, first); }) != 0) {
      complain("DIVERGENT WARP OPERATION", place(first.waits_at));
      stopped = true;
      return;
    }
    complete(lanes, participants, participants == warp.alive);
  }
}

// ---- Blocks

void thread_main() {
  kernel_thread(kernel_arguments);
  if (running->copies_done != running->copies.size())
    complain("ASYNCHRONOUS COPY", "not waited for before its thread ended");
  set_state(*running, State::kDone);
  try_warp_op(*running->block, running->number);
  try_barrier(*running->block);
  try_cluster_barrier();
  back_to_host();
  std::abort();  // nobody wakes a thread that is done
}

// Stacks are kept for the next launch. The system provides their pages when they are first touched.
char* stack_of(const Block& block, uint32_t thread) {
  static char* stacks = nullptr;
  if (stacks == nullptr) {
    void* pages = mmap(nullptr, kMaxCluster * kMaxBlock * kStackSize, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    stacks = static_cast<char*>(pages);
  }
  return stacks + (size_t(&block - cluster.data()) * kMaxBlock + thread) * kStackSize;
}

void start_thread(Block& block, uint32_t number) {
  const dim3 size = emulator_block_dim;
  Thread& t = block.threads[number];
  t = {};
  t.block = &block;
  t.number = number;
  t.idx = {number % size.x, number / size.x % size.y, number / size.x / size.y};
  t.stack = stack_of(block, number);
  // What emulator_switch will pop: six registers, then thread_main as the return address.
  void** top = reinterpret_cast<void**>(t.stack + kStackSize - 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(thread_main);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  t.stack_pointer = top;
  ready.push_back(&t);
}

void run(Thread* thread) {
  running = thread;
  emulator_thread_idx = thread->idx;
  emulator_block_idx = thread->block->idx;
  show_shared_memory(*thread->block);
  emulator_switch(&host_stack_pointer, thread->stack_pointer);
  running = nullptr;
}

void report_deadlock() {
  for (Block& block : cluster)
    for (Thread& t : block.threads)
      if (t.state != State::kDone) {
        running = &t;  // for the message
        complain("DEADLOCK", "waits for threads or bytes that never arrive, at " + place(t.waits_at));
        running = nullptr;
        stopped = true;
        return;
      }
}

void start(Block& block, uint32_t number) {
  const dim3 grid = emulator_grid_dim;
  block.number = number;
  block.idx = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  block.barriers = 0;
  block.known.clear();
  block.arrivals.clear();
  block.in_state = {};
  block.in_state[size_t(State::kReady)] = thread_count();
  block.warps.assign((thread_count() + warpSize - 1) / warpSize, Warp{~0u});
  if (const uint32_t rest = thread_count() % warpSize) block.warps.back().alive = (1u << rest) - 1;
  begin_block(block);
  for (uint32_t t = 0; t < thread_count(); ++t) start_thread(block, t);
}

constexpr unsigned kThreadsBetweenArrivals = 16;  // on average

// Runs the cluster whose blocks have the numbers from `first` on.
void run_cluster(uint32_t first) {
  ready.clear();
  forget_pieces();
  for (uint32_t rank = 0; rank < cluster.size(); ++rank) start(cluster[rank], first + rank);
  for (size_t head = 0; !stopped;) {
    const bool nobody_is_ready = head == ready.size();
    // A piece that was sent arrives at any time, and at the latest when no thread can continue.
    if (pieces_on_their_way() && (nobody_is_ready || (seed != 0 && random_bits() % kThreadsBetweenArrivals == 0))) {
      let_a_piece_arrive();
      continue;
    }
    if (nobody_is_ready) break;
    // Choose among the threads that have waited longest, so that none waits forever.
    const size_t choices = std::min<size_t>(ready.size() - head, cluster.size() * thread_count());
    if (seed != 0) std::swap(ready[head], ready[head + random_bits() % choices]);
    run(ready[head++]);
    if (head > 65536) {
      ready.erase(ready.begin(), ready.begin() + ptrdiff_t(head));
      head = 0;
    }
  }
  if (!stopped) report_deadlock();
  if (!stopped) check_end_of_cluster();
}

bool launchable(dim3 grid, dim3 block, unsigned cluster_size, size_t shared_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  return threads > 0 && threads <= kMaxBlock && blocks > 0 && blocks < kMaxGrid - 1 && grid.y < 65536 &&
         grid.z < 65536 && cluster_size > 0 && cluster_size <= kMaxCluster && grid.x % cluster_size == 0 &&
         shared_bytes <= kMaxDynamicShared;
}

}  // namespace

void wake(Thread& thread) {
  set_state(thread, State::kReady);
  ready.push_back(&thread);
}

void wait_as(State state, SourceLine caller) {
  set_state(*running, state);
  running->waits_at = caller;
  back_to_host();
}

void learn(Known& known, uint32_t block, uint32_t barriers) {
  uint32_t& so_far = known[block];
  so_far = std::max(so_far, barriers);
}

void maybe_preempt() {
  if (preempt_every == 0 || accesses_left-- > 0) return;
  accesses_left = random_bits() % preempt_every;
  ready.push_back(running);
  back_to_host();
}

void stop() {
  stopped = true;
  back_to_host();
  std::abort();
}

extern "C" void emulator_copy_later(void* to, const void* from, size_t size) {
  if (size != 4 && size != 8 && size != 16)
    complain("ASYNCHRONOUS COPY", "of " + std::to_string(size) + " bytes; only 4, 8 or 16 are allowed");
  running->copies.push_back({to, from, size, running->groups_committed});
}
extern "C" void emulator_commit_copies() { ++running->groups_committed; }
extern "C" size_t emulator_next_copy(size_t groups, void** to, const void** from) {
  Thread& t = *running;
  if (t.copies_done == t.copies.size() || t.copies[t.copies_done].group + groups >= t.groups_committed) return 0;
  const Thread::Copy& copy = t.copies[t.copies_done++];
  *to = copy.to;
  *from = copy.from;
  return copy.size;
}

extern "C" int emulator_block_barrier(int predicate, SourceLine caller) {
  set_state(*running, State::kAtBarrier);
  running->predicate = predicate;
  running->waits_at = caller;
  try_barrier(*running->block);
  back_to_host();
  return int(running->result);
}

extern "C" void emulator_cluster_barrier(SourceLine caller) {
  set_state(*running, State::kAtClusterBarrier);
  running->waits_at = caller;
  try_cluster_barrier();
  back_to_host();
}

extern "C" uint64_t emulator_warp_op(WarpOp op, unsigned mask, uint64_t value, int source_lane, SourceLine caller) {
  Thread& t = *running;
  if (!(mask >> t.number % warpSize & 1)) {
    complain("LANE NOT IN ITS OWN MASK", place(caller));
    stop();
  }
  set_state(t, State::kAtWarpOp);
  t.op = op;
  t.block->warps[t.number / warpSize].masks[t.number % warpSize] = mask;
  t.value = value;
  t.source_lane = source_lane;
  t.waits_at = caller;
  try_warp_op(*t.block, t.number);
  back_to_host();
  return t.result;
}

// The shared memory that kernels were prepared for since the last reset. A GPU permits 48 KB without that, but the test
// problems are small, so the limit is lower here.
std::map<const void*, size_t> prepared;
constexpr size_t kUnasked = 256;

bool holds_clusters = true;
EMULATOR_EXPORT void emulator_set_clusters(bool held) { holds_clusters = held; }

extern "C" int64_t emulator_prepare(const void* kernel, size_t shared_bytes, unsigned cluster) {
  prepared[kernel] = std::max(prepared[kernel], shared_bytes);
  if (cluster > 1 && !holds_clusters) return 0;
  return 2 * int64_t(cluster);  // few, so that small problems have blocks with several rows
}

extern "C" cudaError_t emulator_launch(const void* kernel, dim3 grid, dim3 block, unsigned cluster_size,
                                       size_t shared_bytes, void (*thread)(void*), void* arguments, size_t size) {
  if (!launchable(grid, block, cluster_size, shared_bytes)) return last_error = cudaErrorInvalidConfiguration;
  if (shared_bytes > kUnasked && shared_bytes > prepared[kernel]) return last_error = cudaErrorInvalidValue;
  emulator_grid_dim = grid;
  emulator_block_dim = block;
  kernel_thread = thread;
  kernel_arguments = arguments;
  stopped = false;
  random_bits.seed(seed);
  accesses_left = preempt_every ? random_bits() % preempt_every : 0;
  begin_launch(arguments, size, shared_bytes);
  const size_t complaints_before = complaints();
  launches.push_back({grid.x, block.x, block.y, cluster_size, unsigned(shared_bytes)});

  std::vector<uint32_t> order(size_t(grid.x) * grid.y * grid.z / cluster_size);
  for (size_t i = 0; i < order.size(); ++i) order[i] = uint32_t(i) * cluster_size;
  if (seed != 0) std::shuffle(order.begin(), order.end(), random_bits);
  cluster.resize(cluster_size);
  for (Block& b : cluster) b.threads.resize(thread_count());
  for (const uint32_t first : order)
    if (!stopped) run_cluster(first);
  if (complaints() > complaints_before) last_error = cudaErrorLaunchFailure;
  return last_error;
}

// Also forgets the last error and the list of launches.
EMULATOR_EXPORT void emulator_schedule(unsigned with_seed, unsigned with_preempt_every) {
  launches.clear();
  last_error = cudaSuccess;
  prepared.clear();
  seed = with_seed;
  preempt_every = with_preempt_every;
}

EMULATOR_EXPORT unsigned emulator_launch_count() { return unsigned(launches.size()); }
EMULATOR_EXPORT const Launch* emulator_launch_number(unsigned i) { return &launches[i]; }

}  // namespace emulator

// ---- The part of the CUDA runtime's API that the launchers call

extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// A tiny GPU, so that small problems reach every kernel.
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 4; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 16 * 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 8 * 1024; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

extern "C" cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

extern "C" cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}
