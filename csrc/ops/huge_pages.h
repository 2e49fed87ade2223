// Huge pages for large fresh outputs on the CPU: the page faults of their first write would cost more than the kernel.
#pragma once

#include <ATen/core/Tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fusedloss {

// Before the first write. Only a wish, of this memory alone; without effect where the system forbids huge pages, and
// where it gives them to everyone anyway.
inline void prefer_huge_pages(const at::Tensor& fresh) {
#if defined(__linux__)
  constexpr size_t kWorthIt = size_t(4) << 20;  // smaller ones are mostly memory that the allocator has kept
  if (!fresh.is_cpu() || fresh.nbytes() < kWorthIt) return;
  const uintptr_t page = uintptr_t(getpagesize()), address = uintptr_t(fresh.data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + fresh.nbytes()) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // an error changes nothing
#endif
}

}  // namespace fusedloss
