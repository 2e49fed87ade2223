// What the emulator's own files share. They are compiled without -fsanitize, unlike the kernels.
#pragma once

#include <cuda_runtime.h>

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

// ---- Threads: scheduler.cpp

struct Block;

enum class State : uint8_t { kReady, kAtBarrier, kAtClusterBarrier, kAtWarpOp, kDone };

// A CUDA thread.
struct Thread {
  Block* block;
  uint3 idx;
  uint32_t number;  // within the block
  State state;
  char* stack;
  void* stack_pointer;    // while it does not run
  uint32_t warp_syncs;    // how many __syncwarp it has passed
  bool fenced;            // has it called __threadfence?
  SourceLine waits_at;    // while at a barrier or warp operation
  int predicate;          // at a barrier
  WarpOp op;              // at a warp operation; what it gives to it and gets from it
  unsigned mask;
  int source_lane;
  uint64_t value, result;
  // The asynchronous copies that it has asked for, each with the number of the group that it belongs to.
  struct Copy {
    void* to;
    const void* from;
    size_t size;
    size_t group;
  };
  std::vector<Copy> copies;
  size_t copies_done, groups_committed;
};

struct Region;  // memory.cpp

// The blocks of a cluster run side by side, clusters one after another. A block without a cluster is one of its own.
struct Block {
  // What an atomic has told about another block's past.
  struct Acquired {
    uint32_t barriers;      // that block's accesses before its barrier of this number are known
    uint32_t at_barrier;    // to all threads of this block after its own barrier of this number …
    uint32_t thread;        // … and to this thread at once
  };

  uint3 idx;
  uint32_t number;  // within the grid
  uint32_t barriers;  // how many __syncthreads and cluster barriers it has passed
  std::shared_ptr<Region> shared;  // its shared memory while another block runs; what was done to it at any time
  bool awaits_cluster;  // has another block reached into it since the last cluster barrier, or can it not be sure of it?
  std::vector<Thread> threads;
  std::map<uint32_t, Acquired> acquired;  // by the other block's number
};

constexpr size_t kStackSize = 64 * 1024;
constexpr uint32_t kMaxGrid = 1u << 19, kMaxBlock = 1024;  // as far as a Moment counts
constexpr uint32_t kMaxCluster = 8;
constexpr size_t kMaxDynamicShared = 64 * 1024;

struct Launch {
  unsigned grid, block_x, block_y, cluster, shared_bytes;
};

extern Thread* running;  // null while the host runs
extern std::vector<Block> cluster;  // the blocks that run
extern std::mt19937 random_bits;

void maybe_preempt();        // lets another thread go first, now and then
[[noreturn]] void stop();    // ends the launch, from within a thread

// ---- Memory: memory.cpp

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// By the running thread. `pc` is the instruction behind the access, for the message.
void check_access(const void* p, size_t size, Access access, bool must_be_aligned, const void* pc);
// Tells the memory that a launch, or a block, begins. A kernel may read its own arguments.
void begin_launch(const void* arguments, size_t size, size_t shared_bytes);
void begin_block(Block& block);
// Shared memory has one address for all blocks: this puts the block's there.
void show_shared_memory(const Block& block);
// All blocks of the cluster know what the others did before their common barrier.
void synchronise_cluster();

// ---- Complaints: complaints.cpp

// Kept for Python to fetch; once for each place in the code. `pc`, or else the text, is the place.
void complain(const std::string& kind, const std::string& text, const void* pc = nullptr);
std::string place(const void* pc);   // "@0x…", which Python makes a source line of
std::string place(SourceLine line);
size_t complaints();

// Where this library lies in memory, and its thread-local segment, which holds the kernels' shared memory.
struct Module {
  char *begin, *end, *base;
  char *shared_begin, *shared_end;
};
const Module& this_module();
void look_for_this_module();  // each OS thread has a segment of its own

}  // namespace emulator
