#include "variant.h"

#include <cstdint>

#if defined(MSD_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace msd {
namespace {

#if defined(MSD_X86)
struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf) {
  Registers r{};
#if defined(_MSC_VER)
  int out[4];
  __cpuid(out, 0);
  if (static_cast<uint32_t>(out[0]) < leaf) return r;
  __cpuidex(out, static_cast<int>(leaf), 0);
  r = {static_cast<uint32_t>(out[0]), static_cast<uint32_t>(out[1]), static_cast<uint32_t>(out[2]),
       static_cast<uint32_t>(out[3])};
#else
  __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

uint64_t saved_registers() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));  // xgetbv, without asking for -mxsave
  return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

bool has_avx2_and_f16c() {
  const Registers one = cpuid(1);
  constexpr uint32_t kOsXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  if ((one.ecx & kOsXsave) == 0 || (one.ecx & kAvx) == 0 || (one.ecx & kF16c) == 0) return false;
  constexpr uint64_t kXmmAndYmm = 0x6;
  if ((saved_registers() & kXmmAndYmm) != kXmmAndYmm) return false;
  return (cpuid(7).ebx & (1u << 5)) != 0;
}
#endif

}  // namespace

bool machine_has(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2: {
#if defined(MSD_X86)
      static const bool has = has_avx2_and_f16c();  // asked at every call of an op, and slow on a virtual machine
      return has;
#else
      return false;
#endif
    }
  }
  return false;
}

}  // namespace msd
