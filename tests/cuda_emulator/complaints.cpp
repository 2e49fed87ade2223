// The errors that were found, and the address ranges of this library.
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <set>

#include "runtime.h"

namespace emulator {
namespace {

constexpr size_t kEnough = 50;

std::vector<std::string> messages;
std::set<std::string> known;
thread_local char anchor;  // makes the thread-local segment exist; to a launch, it is shared memory

int find_module(dl_phdr_info* info, size_t, void* result) {
  Module m = {};
  m.begin = reinterpret_cast<char*>(~uintptr_t(0));
  m.base = reinterpret_cast<char*>(info->dlpi_addr);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    char* begin = m.base + segment.p_vaddr;
    if (segment.p_type == PT_LOAD) {
      m.begin = std::min(m.begin, begin);
      m.end = std::max(m.end, begin + segment.p_memsz);
    } else if (segment.p_type == PT_TLS) {
      m.shared_begin = static_cast<char*>(info->dlpi_tls_data);
      m.shared_end = m.shared_begin + segment.p_memsz;
    }
  }
  const char* self = reinterpret_cast<const char*>(&find_module);
  if (self < m.begin || self >= m.end) return 0;
  *static_cast<Module*>(result) = m;
  return 1;
}

}  // namespace

Module found;

const Module& this_module() { return found; }

void look_for_this_module() {
  *static_cast<volatile char*>(&anchor) = 0;  // the first access creates the segment
  dl_iterate_phdr(find_module, &found);
}

std::string place(const void* pc) {
  char text[32];
  // Minus 1, so that the address is in an instruction before the return address, hence on the line of the access.
  std::snprintf(text, sizeof text, "@0x%zx", size_t(static_cast<const char*>(pc) - this_module().base - 1));
  return text;
}

std::string place(SourceLine line) { return std::string(line.file) + ":" + std::to_string(line.line); }

size_t complaints() { return messages.size(); }

void complain(const std::string& kind, const std::string& text, const void* pc) {
  if (messages.size() >= kEnough || !known.insert(kind + (pc ? place(pc) : text)).second) return;
  char who[120] = "";
  if (running) {
    const uint3 b = running->block->idx, t = running->idx;
    std::snprintf(who, sizeof who, " block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
  }
  messages.push_back(kind + who + ": " + text + (pc ? " " + place(pc) : ""));
}

EMULATOR_EXPORT int emulator_message_count() { return int(messages.size()); }
EMULATOR_EXPORT const char* emulator_message(int i) { return messages[size_t(i)].c_str(); }
EMULATOR_EXPORT void emulator_forget_messages() {
  messages.clear();
  known.clear();
}

}  // namespace emulator
