// See processor.h.
#include "processor.h"

#include <cstdint>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vovnet_fast {
namespace cpu {

namespace {

struct Features {
  bool avx2 = false, avx512 = false;
  bool avx512bf16 = false, avx512vnni = false, avxvnni = false, amx_bf16 = false, amx_int8 = false;
};

#ifdef __x86_64__

bool bit(unsigned bits, int index) { return (bits >> index & 1u) != 0; }

#ifdef __linux__
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool may_use_tiles() { return false; }
#endif

// What the system saves of a thread's registers: XCR0.
unsigned saved_registers() {
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Leaves 1 and 7 of CPUID. (__builtin_cpu_supports asks the compiler's runtime, and that of some
// builds of Clang knows of nothing.)
Features find() {
  Features found;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  constexpr unsigned kVectors = 0x6, kVectors512 = 0xe6;
  const bool fma = bit(c, 12), xgetbv = bit(c, 27), f16c = bit(c, 29);
  const unsigned saved = xgetbv ? saved_registers() : 0;
  const bool avx = bit(c, 28) && fma && f16c && (saved & kVectors) == kVectors;
#ifdef __APPLE__  // It saves the larger ones of whoever has used them.
  const bool wide = avx;
#else
  const bool wide = avx && (saved & kVectors512) == kVectors512;
#endif
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  found.avx2 = avx && bit(b, 5);
  found.avx512 =
      found.avx2 && wide && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  found.avx512vnni = found.avx512 && bit(c, 11);
  const bool tiles = bit(d, 24), products_bf16 = bit(d, 22), products_int8 = bit(d, 25);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    found.avxvnni = found.avx2 && bit(a, 4);
    found.avx512bf16 = found.avx512 && bit(a, 5);
  }
  if (tiles && (products_bf16 || products_int8) && may_use_tiles()) {
    found.amx_bf16 = products_bf16 && found.avx512bf16;
    found.amx_int8 = products_int8;
  }
  return found;
}

#else

Features find() { return {}; }

#endif

const Features& features() {
  static const Features found = find();
  return found;
}

}  // namespace

bool has_avx2() { return features().avx2; }
bool has_avx512() { return features().avx512; }
bool has_avx512bf16() { return features().avx512bf16; }
bool has_avx512vnni() { return features().avx512vnni; }
bool has_avxvnni() { return features().avxvnni; }
bool has_amx_bf16() { return features().amx_bf16; }
bool has_amx_int8() { return features().amx_int8; }

}  // namespace cpu
}  // namespace vovnet_fast
