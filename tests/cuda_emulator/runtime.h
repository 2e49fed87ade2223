// What the emulator's own files share. Unlike the kernels, they are compiled without -fsanitize.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {

constexpr size_t kStackSize = 64 * 1024;
constexpr uint32_t kMaxGrid = 1u << 19, kMaxBlock = 1024;  // limited by the fields of Moment
constexpr uint32_t kMaxCluster = 8;
constexpr size_t kMaxDynamicShared = 64 * 1024;

// ---- The order of accesses

// The time of an access: a thread, and how many barriers it had passed.
struct Moment {
  uint64_t block : 19;  // number + 1; 0 means never, kSent the arrival of a piece
  uint64_t thread : 10;
  uint64_t atomic : 1;
  uint64_t barriers : 17;  // for a piece, this field and the next hold its number
  uint64_t warp_syncs : 17;
};
constexpr uint64_t kSent = kMaxGrid - 1;

// For each block's number: its accesses before its barrier of this number are known.
using Known = std::map<uint32_t, uint32_t>;
void learn(Known& known, uint32_t block, uint32_t barriers);

// An mbarrier at which one thread arrives in each phase: arrivals.cpp
struct ArrivalBarrier {
  struct Phase {
    Known senders;              // of the pieces that arrived: up to which barrier the senders' accesses are known
    std::vector<Moment> waits;  // by thread: when it had waited for the phase's end
  };

  Moment started;
  int64_t bytes_to_come;      // negative if more have arrived than were announced so far
  bool expects;               // has the number of bytes of this phase been announced?
  std::vector<Phase> phases;  // the phases that have ended, and the current one
};

// ---- Threads: scheduler.cpp

struct Block;

enum class State : uint8_t { kReady, kAtBarrier, kAtClusterBarrier, kAtWarpOp, kAtArrivals, kDone };
constexpr size_t kStates = size_t(State::kDone) + 1;

// A CUDA thread.
struct Thread {
  Block* block;
  uint3 idx;
  uint32_t number;  // within the block
  State state;
  char* stack;
  void* stack_pointer;  // while it is not running
  uint32_t warp_syncs;  // how many __syncwarp it has passed
  bool fenced;          // has it called __threadfence?
  SourceLine waits_at;  // while at a barrier or warp operation
  int predicate;        // at a barrier
  WarpOp op;            // at a warp operation; with its other arguments and its result
  int source_lane;
  uint64_t value, result;
  // The asynchronous copies that it has started, each with the number of its group.
  struct Copy {
    void* to;
    const void* from;
    size_t size;
    size_t group;
  };
  std::vector<Copy> copies;
  size_t copies_done, groups_committed;
  Known known;  // to this thread alone, until its block's next barrier
};

struct Warp {
  unsigned alive = 0;                   // the lanes that have not returned
  unsigned waiting = 0;                 // the lanes that wait at a warp operation
  std::array<unsigned, 32> masks = {};  // by lane: the mask of the operation
};

struct SharedMemory;  // memory.cpp

// The blocks of a cluster run side by side, clusters one after another. A block without a cluster is a cluster of one.
struct Block {
  uint3 idx;
  uint32_t number;    // within the grid
  uint32_t barriers;  // how many __syncthreads and cluster barriers it has passed
  std::shared_ptr<SharedMemory> shared;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::array<uint32_t, kStates> in_state;        // how many of the threads are in each state
  Known known;                                   // to all of its threads
  std::map<ptrdiff_t, ArrivalBarrier> arrivals;  // by their place in shared memory
};

struct Launch {
  unsigned grid, block_x, block_y, cluster, shared_bytes;
};

extern Thread* running;             // null while the host runs
extern std::vector<Block> cluster;  // the blocks that are running
extern std::mt19937 random_bits;

void maybe_preempt();      // now and then lets another thread run first
[[noreturn]] void stop();  // ends the launch; called by a thread
// Puts the running thread into this state until it is woken.
void wait_as(State state, SourceLine caller);
void wake(Thread& thread);

// ---- Memory: memory.cpp

enum class Access : uint8_t { kRead, kWrite, kAtomic };

Moment now(Access access);
bool happened_before_now(Moment m);  // as the running thread knows

// Checks an access by the running thread. `pc` is the instruction after the access, for the message.
void check_access(const void* p, size_t size, Access access, bool must_be_aligned, const void* pc);
// Checks 16 bytes that the running thread sends to `place` in block `to`'s shared memory, where they arrive at moment
// m.
void check_sent(const void* place, const Block& to, Moment m, const void* pc);
// Start the bookkeeping of a launch or of a block. A kernel may read its own arguments.
void begin_launch(const void* arguments, size_t size, size_t shared_bytes);
void begin_block(Block& block);
// Shared memory has the same address for all blocks: this copies the block's contents there.
void show_shared_memory(const Block& block);
ptrdiff_t place_in_shared_memory(const void* p);  // offset of that address, for the running thread
char* shared_memory_now(const Block& block);      // where the block's bytes are
// The block of this rank in the running thread's cluster. Complains if it may not have started.
Block& started_block(unsigned rank);
// Afterwards all blocks of the cluster know what the others did before their common barrier.
void synchronise_cluster();

// ---- Messages between the blocks of a cluster: arrivals.cpp

void forget_pieces();
bool pieces_on_their_way();
void let_a_piece_arrive();
void check_end_of_cluster();           // has each block waited for all that was sent to it?
bool piece_came_before_now(Moment m);  // as the running thread knows
std::string describe_piece(Moment m);

// ---- Complaints: complaints.cpp

// Keeps a message for Python to fetch, once for each place in the code. The place is `pc` or, without one, the text.
void complain(const std::string& kind, const std::string& text, const void* pc = nullptr);
std::string place(const void* pc);  // "@0x…", which Python replaces by a source line
std::string place(SourceLine line);
size_t complaints();

// The addresses of this library and of its thread-local segment, which holds the kernels' shared memory.
struct Module {
  char *begin, *end, *base;
  char *shared_begin, *shared_end;
};
const Module& this_module();
void look_for_this_module();  // each OS thread has its own segment

}  // namespace emulator
