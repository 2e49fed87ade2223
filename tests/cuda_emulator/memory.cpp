// Checks every load and store of a kernel: is it inside a buffer, aligned, of memory that was written before, and
// ordered after every conflicting access by another thread?
//
// Races are found by happens-before, not by luck. Each two bytes of memory remember their last write and last two
// reads, as moments. A moment is a thread and how many barriers it had passed. Whether one moment happened before
// another is then a comparison of counts, in whatever order the threads were run.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace fusedloss::cuda {
thread_local uint4 dynamic_shared_memory[emulator::kMaxDynamicShared / sizeof(uint4)];
}

namespace emulator {
constexpr size_t kGranule = 2;  // bytes that share a shadow; neighbouring 1-byte writes would look like a race
constexpr size_t kPage = 256;   // bytes of shared memory that are copied and cleared together

bool same_thread(Moment a, Moment b) { return a.block == b.block && a.thread == b.thread; }

struct Shadow {
  Moment write, reads[2];
  const void *write_pc, *read_pc;
};

struct Region {
  char *begin, *end;
  bool read_only;
  std::string name;
  Shadow* shadow;  // the system provides pages of zeros when they are first touched
  std::vector<uint8_t> written;

  Region(char* begin, char* end, bool read_only, bool is_written, std::string name)
      : begin(begin), end(end), read_only(read_only), name(std::move(name)), written(granules(), is_written) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* pages = mmap(nullptr, shadow_bytes(), PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    shadow = static_cast<Shadow*>(pages);
  }
  Region(const Region&) = delete;
  ~Region() { munmap(shadow, shadow_bytes()); }

  size_t granules() const { return size_t(end - begin) / kGranule + 1; }
  size_t shadow_bytes() const { return granules() * sizeof(Shadow); }
  void forget_accesses() { madvise(shadow, shadow_bytes(), MADV_DONTNEED); }
};

// A block's shared memory while another block runs, and its shadow at any time. The variables of all kernels have a
// place in it, and one kernel uses few of them. So only the pages that the block has used are copied and cleared.
struct SharedMemory : Region {
  std::vector<size_t> used;  // pages, by their numbers
  std::vector<uint8_t> is_used;

  explicit SharedMemory(size_t size) : SharedMemory(new char[size], size) {}
  ~SharedMemory() { delete[] begin; }

  size_t size() const { return size_t(end - begin); }

  void use(size_t offset, size_t bytes) {
    for (size_t page = offset / kPage; page <= (offset + bytes - 1) / kPage; ++page)
      if (!is_used[page]) {
        is_used[page] = true;
        used.push_back(page);
      }
  }

  // Copies the pages that this block has used from one image of shared memory to another.
  void copy_used(char* to, const char* from) const {
    for (const size_t page : used) {
      const size_t offset = page * kPage;
      std::memcpy(to + offset, from + offset, std::min(kPage, size() - offset));
    }
  }

  // Fills memory with NaN, which shows if a kernel reads it before it is written.
  void clear() {
    for (const size_t page : used) {
      const size_t offset = page * kPage, bytes = std::min(kPage, size() - offset);
      const size_t granule = offset / kGranule, count = (bytes + 1) / kGranule;
      std::memset(begin + offset, 0xff, bytes);
      std::fill_n(shadow + granule, count, Shadow{});
      std::fill_n(written.begin() + ptrdiff_t(granule), count, 0);
    }
  }

  void forget_use() {
    for (const size_t page : used) is_used[page] = false;
    used.clear();
  }

 private:
  SharedMemory(char* begin, size_t size)
      : Region(begin, begin + size, false, false, "shared memory"), is_used(size / kPage + 1) {
    std::memset(begin, 0xff, size);
  }
};

namespace {

std::map<const char*, Region> buffers;  // by their first byte
const Block* shown = nullptr;           // the block whose shared memory is at the common address
size_t dynamic_shared_bytes = 0;        // as requested by the launch
const char *arguments_begin, *arguments_end;

std::map<const void*, Known> released;  // by the address of an atomic

bool is_known(const Known& known, Moment m) {
  const auto it = known.find(m.block - 1);
  return it != known.end() && m.barriers < it->second;
}

bool conflicts(Moment earlier, Access access) {
  if (earlier.block == 0 || (earlier.atomic && access == Access::kAtomic)) return false;
  return !happened_before_now(earlier);
}

std::string describe(Moment m) {
  if (m.block == kSent) return describe_piece(m);
  return "block " + std::to_string(m.block - 1) + " thread " + std::to_string(m.thread) + (m.atomic ? " (atomic)" : "");
}

// `other` is "a read" or "a write", at the moment m.
void report_race(const Region& region, Access access, const char* other, Moment m, const void* other_pc,
                 const void* pc) {
  const char* own = access == Access::kRead ? "read" : "write";
  complain("DATA RACE",
           std::string(own) + " of '" + region.name + "' conflicts with " + other + " by " + describe(m) + " " +
               place(other_pc),
           pc);
}

void check_granule(Region& region, size_t i, Access access, Moment me, const void* pc) {
  Shadow& s = region.shadow[i];
  if (access != Access::kWrite && !region.written[i]) complain("UNINITIALISED READ", "of '" + region.name + "'", pc);
  if (conflicts(s.write, access)) report_race(region, access, "a write", s.write, s.write_pc, pc);
  if (access == Access::kRead) {
    if (s.reads[0].block != 0 && !same_thread(s.reads[0], me)) s.reads[1] = s.reads[0];
    s.reads[0] = me;
    s.read_pc = pc;
    return;
  }
  for (const Moment& read : s.reads)
    if (conflicts(read, access)) report_race(region, access, "a read", read, s.read_pc, pc);
  s = {me, {}, pc, nullptr};
  region.written[i] = true;
}

const char* dynamic_begin() { return reinterpret_cast<const char*>(fusedloss::cuda::dynamic_shared_memory); }

Region* region_of(const char* p) {
  for (const Block& block : cluster)
    if (p >= block.shared->begin && p < block.shared->end) return block.shared.get();
  auto it = buffers.upper_bound(p);
  if (it == buffers.begin() || p >= (--it)->second.end) return nullptr;
  return &it->second;
}

[[noreturn]] void report_out_of_bounds(const char* p, size_t size, Access access, const void* pc) {
  std::string text = std::string(access == Access::kRead ? "read" : "write") + " of " + std::to_string(size) + " bytes";
  const auto it = buffers.upper_bound(p);
  if (it != buffers.begin()) {
    const Region& before = std::prev(it)->second;
    text += ", ends " + std::to_string(p + size - before.end) + " bytes after the end of '" + before.name + "'";
  }
  complain("OUT OF BOUNDS", text, pc);
  stop();
}

bool is_own_stack(const char* p) { return p >= running->stack && p < running->stack + kStackSize; }

bool is_constant(const char* p) {
  return (p >= arguments_begin && p < arguments_end) || (p >= this_module().begin && p < this_module().end);
}

void check_dynamic_shared_memory(const char* p, size_t size, const void* pc) {
  if (p + size > dynamic_begin() + dynamic_shared_bytes && p < dynamic_begin() + kMaxDynamicShared &&
      p >= dynamic_begin()) {
    complain("OUT OF BOUNDS", "after the " + std::to_string(dynamic_shared_bytes) + " bytes of dynamic shared memory",
             pc);
    stop();
  }
}

// p: the address for which the shadow is kept; for shared memory, in the block's SharedMemory.
void check_shadowed(const char* p, size_t size, Access access, bool must_be_aligned, Moment me, const void* pc) {
  if (must_be_aligned && reinterpret_cast<uintptr_t>(p) % size != 0) {
    complain("MISALIGNED", std::to_string(size) + "-byte access", pc);
    stop();
  }
  maybe_preempt();
  Region* region = region_of(p);
  if (region == nullptr || p + size > region->end) {
    if (access == Access::kRead && is_constant(p)) return;
    report_out_of_bounds(p, size, access, pc);
  }
  if (region->read_only && access != Access::kRead) {
    complain("WRITE TO INPUT", "'" + region->name + "'", pc);
    stop();
  }
  const size_t last = size_t(p + size - 1 - region->begin) / kGranule;
  for (size_t i = size_t(p - region->begin) / kGranule; i <= last; ++i) check_granule(*region, i, access, me, pc);
}

void check_shared(const Block& block, size_t offset, size_t size, Access access, bool must_be_aligned, Moment me,
                  const void* pc) {
  check_shadowed(block.shared->begin + offset, size, access, must_be_aligned, me, pc);
  block.shared->use(offset, size);
}

}  // namespace

Moment now(Access access) {
  const Block& b = *running->block;
  return {b.number + 1, running->number, access == Access::kAtomic, b.barriers, running->warp_syncs};
}

// CUDA's rules: a block's barrier orders its threads, __syncwarp those of a warp, and a fence with an atomic orders
// blocks. Shuffles order nothing. A piece has arrived for the threads that have waited for its phase.
bool happened_before_now(Moment m) {
  const Block& b = *running->block;
  if (m.block == kSent) return piece_came_before_now(m);
  if (m.block == b.number + 1)
    return m.thread == running->number || m.barriers < b.barriers ||
           (m.thread / warpSize == running->number / warpSize && m.warp_syncs < running->warp_syncs);
  return is_known(b.known, m) || is_known(running->known, m);
}

void check_access(const void* address, size_t size, Access access, bool must_be_aligned, const void* pc) {
  const char* p = static_cast<const char*>(address);
  if (running == nullptr || is_own_stack(p)) return;
  const Module& m = this_module();
  const bool is_shared = p >= m.shared_begin && p < m.shared_end;
  if (!is_shared && buffers.empty()) return;  // global memory is torch's, which is not known here
  check_dynamic_shared_memory(p, size, pc);
  if (is_shared) {
    check_shared(*running->block, size_t(p - m.shared_begin), size, access, must_be_aligned, now(access), pc);
  } else {
    check_shadowed(p, size, access, must_be_aligned, now(access), pc);
  }
}

void check_sent(const void* place, const Block& to, Moment m, const void* pc) {
  check_dynamic_shared_memory(static_cast<const char*>(place), sizeof(uint4), pc);
  check_shared(to, size_t(place_in_shared_memory(place)), sizeof(uint4), Access::kWrite, true, m, pc);
}

void begin_launch(const void* arguments, size_t size, size_t shared_bytes) {
  look_for_this_module();
  arguments_begin = static_cast<const char*>(arguments);
  arguments_end = arguments_begin + size;
  dynamic_shared_bytes = shared_bytes;
  released.clear();
  for (auto& [begin, region] : buffers) region.forget_accesses();  // the previous launch happened before this one
  shown = nullptr;
}

void begin_block(Block& block) {
  const Module& m = this_module();
  if (block.shared == nullptr) block.shared = std::make_shared<SharedMemory>(size_t(m.shared_end - m.shared_begin));
  block.shared->clear();
  if (shown == &block) block.shared->copy_used(m.shared_begin, block.shared->begin);
  block.shared->forget_use();
}

void show_shared_memory(const Block& block) {
  if (shown == &block) return;
  const Module& m = this_module();
  const SharedMemory& next = *block.shared;
  if (shown == nullptr) {
    std::memcpy(m.shared_begin, next.begin, next.size());
  } else {
    shown->shared->copy_used(shown->shared->begin, m.shared_begin);
    shown->shared->copy_used(m.shared_begin, next.begin);
    next.copy_used(m.shared_begin, next.begin);
  }
  shown = &block;
}

ptrdiff_t place_in_shared_memory(const void* p) {
  const Module& m = this_module();
  const char* at = static_cast<const char*>(p);
  if (at < m.shared_begin || at >= m.shared_end) {
    complain("OUT OF BOUNDS", "an address that must be in shared memory is not");
    stop();
  }
  return at - m.shared_begin;
}

char* shared_memory_now(const Block& block) {
  return shown == &block ? this_module().shared_begin : block.shared->begin;
}

Block& started_block(unsigned rank) {
  if (rank >= cluster.size()) {
    complain("NO SUCH BLOCK", "the cluster has " + std::to_string(cluster.size()) + " blocks");
    stop();
  }
  Block& other = cluster[rank];
  if (&other != running->block && !running->block->known.count(other.number))
    complain("BLOCK MAY NOT HAVE STARTED", "its shared memory is accessed before the first cluster barrier");
  return other;
}

void synchronise_cluster() {
  for (Block& block : cluster)
    for (const Block& other : cluster)
      if (&block != &other) learn(block.known, other.number, other.barriers);
}

// Release: whoever sees the atomic knows what this block did before the fence. Acquire: the reverse.
void synchronise_through(const void* p) {
  if (!running->fenced) return;
  Block& b = *running->block;
  Known& published = released[p];
  for (const auto& [block, barriers] : published) learn(running->known, block, barriers);
  published[b.number] = b.barriers + 1;
}

extern "C" void emulator_fence() { running->fenced = true; }

extern "C" void emulator_before_atomic(void* p, int size) {
  check_access(p, size_t(size), Access::kAtomic, true, __builtin_return_address(0));
  synchronise_through(p);
}

// ---- For Python

EMULATOR_EXPORT void emulator_add_buffer(char* begin, size_t size, int read_only, int written, const char* name) {
  buffers.try_emplace(begin, begin, begin + size, read_only != 0, written != 0, name);
}
EMULATOR_EXPORT void emulator_forget_buffers() { buffers.clear(); }
EMULATOR_EXPORT uint64_t emulator_bytes_not_written(const char* begin) {
  const Region& region = buffers.at(begin);
  uint64_t count = 0;
  for (size_t i = 0; i < size_t(region.end - region.begin) / kGranule; ++i) count += !region.written[i];
  return count * kGranule;
}

}  // namespace emulator
