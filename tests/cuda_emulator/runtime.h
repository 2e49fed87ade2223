// What the emulator's own files share. They are compiled without -fsanitize, unlike the kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {

// ---- Threads: scheduler.cpp

struct Block;

enum class State : uint8_t { kReady, kAtBarrier, kAtWarpOp, kDone };

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
};

// Blocks run one after another, and each finds shared memory in the same place.
struct Block {
  // What an atomic has told about another block's past.
  struct Acquired {
    uint32_t barriers;      // that block's accesses before its barrier of this number are known
    uint32_t at_barrier;    // to all threads of this block after its own barrier of this number …
    uint32_t thread;        // … and to this thread at once
  };

  uint3 idx;
  uint32_t number;  // within the grid
  uint32_t barriers;  // how many __syncthreads it has passed
  std::vector<Thread> threads;
  std::map<uint32_t, Acquired> acquired;  // by the other block's number
};

constexpr size_t kStackSize = 64 * 1024;
constexpr uint32_t kMaxGrid = 1u << 19, kMaxBlock = 1024;  // as far as a Moment counts

extern Thread* running;  // null while the host runs
extern std::mt19937 random_bits;

void maybe_preempt();        // lets another thread go first, now and then
[[noreturn]] void stop();    // ends the launch, from within a thread

// ---- Memory: memory.cpp

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// By the running thread. `pc` is the instruction behind the access, for the message.
void check_access(const void* p, size_t size, Access access, bool must_be_aligned, const void* pc);
// Tells the memory that a launch, or a block, begins. A kernel may read its own arguments.
void begin_launch(const void* arguments, size_t size);
void begin_block();

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

}  // namespace emulator
