// The functions that a kernel calls when it is compiled with g++ -fsanitize=thread,undefined: before each load and
// store, and where undefined behaviour is found. No sanitizer's library is linked; these functions take its place.
#include "runtime.h"

using namespace emulator;

#define PC __builtin_return_address(0)

extern "C" {

#define ACCESSES_OF(size)                                                                          \
  void __tsan_read##size(void* p) { check_access(p, size, Access::kRead, true, PC); }              \
  void __tsan_write##size(void* p) { check_access(p, size, Access::kWrite, true, PC); }            \
  void __tsan_unaligned_read##size(void* p) { check_access(p, size, Access::kRead, false, PC); }   \
  void __tsan_unaligned_write##size(void* p) { check_access(p, size, Access::kWrite, false, PC); } \
  void __tsan_volatile_read##size(void* p) { check_access(p, size, Access::kRead, true, PC); }     \
  void __tsan_volatile_write##size(void* p) { check_access(p, size, Access::kWrite, true, PC); }
ACCESSES_OF(1)
ACCESSES_OF(2)
ACCESSES_OF(4)
ACCESSES_OF(8)
ACCESSES_OF(16)
void __tsan_read_range(void* p, size_t size) { check_access(p, size, Access::kRead, false, PC); }
void __tsan_write_range(void* p, size_t size) { check_access(p, size, Access::kWrite, false, PC); }
// Reads the guard of a launcher's static variable, which belongs to the host.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// The argument of each handler begins with the place in the source.
struct Undefined {
  const char* file;
  uint32_t line, column;
};
#define UNDEFINED(name)                                                                     \
  void __ubsan_handle_##name(Undefined* where) {                                            \
    complain("UNDEFINED", #name " at " + place(SourceLine{where->file, int(where->line)})); \
  }
// For a null or misaligned pointer. The compiler splits some 16-byte loads into pieces that would pass as aligned.
void __ubsan_handle_type_mismatch_v1(Undefined* where, const void* p) {
  const std::string at = place(SourceLine{where->file, int(where->line)});
  complain("MISALIGNED", (p ? "pointer at " : "null pointer at ") + at);
  if (running) stop();
}
UNDEFINED(out_of_bounds)  // of an array whose size is known
UNDEFINED(shift_out_of_bounds)
UNDEFINED(add_overflow)
UNDEFINED(sub_overflow)
UNDEFINED(mul_overflow)
UNDEFINED(negate_overflow)
UNDEFINED(divrem_overflow)

// For assert in a kernel. libc's version would end the process.
__attribute__((visibility("hidden"))) void __assert_fail(const char* condition, const char*, unsigned,
                                                         const char*) noexcept {
  complain("DEVICE ASSERT", condition);
  stop();
}

}  // extern "C"
