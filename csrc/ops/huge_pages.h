// Requests huge pages for large new outputs on the CPU. With small pages, the page faults of the first write cost more
// than the kernel.
#pragma once

#include <ATen/core/Tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fusedloss {

// Must be called before the first write. This is a hint for this memory only. It has no effect if the system forbids
// huge pages, or already uses them for all memory.
inline void prefer_huge_pages(const at::Tensor& fresh) {
#if defined(__linux__)
  constexpr size_t kWorthIt = size_t(4) << 20;  // smaller tensors mostly reuse memory that the allocator kept
  if (!fresh.is_cpu() || fresh.nbytes() < kWorthIt) return;
  const uintptr_t page = uintptr_t(getpagesize()), address = uintptr_t(fresh.data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + fresh.nbytes()) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // an error is harmless
#endif
}

}  // namespace fusedloss
