#include "variant.h"

#include <cstdint>

#if defined(MSD_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(MSD_ARM64)
#if defined(_WIN32)
#include <windows.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace msd {
namespace {

#if defined(MSD_X86)
struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf, uint32_t part = 0) {
  Registers r{};
#if defined(_MSC_VER)
  int out[4];
  __cpuid(out, 0);
  if (static_cast<uint32_t>(out[0]) < leaf) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(part));
  r = {static_cast<uint32_t>(out[0]), static_cast<uint32_t>(out[1]), static_cast<uint32_t>(out[2]),
       static_cast<uint32_t>(out[3])};
#else
  __get_cpuid_count(leaf, part, &r.eax, &r.ebx, &r.ecx, &r.edx);
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

bool has_all(uint32_t flags, uint32_t wanted) { return (flags & wanted) == wanted; }

bool has_avx2_f16c_and_fma() {
  const Registers one = cpuid(1);
  constexpr uint32_t kFma = 1u << 12, kOsXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  if (!has_all(one.ecx, kFma | kOsXsave | kAvx | kF16c)) return false;
  constexpr uint64_t kXmmAndYmm = 0x6;
  if ((saved_registers() & kXmmAndYmm) != kXmmAndYmm) return false;
  return has_all(cpuid(7).ebx, 1u << 5);
}

bool has_avx_vnni() {
  if (!machine_has(Isa::kAvx2) || cpuid(7).eax < 1) return false;  // eax: the last part of the leaf
  return has_all(cpuid(7, 1).eax, 1u << 4);
}

// What the files of this set are compiled for: F, DQ, BW, VL and VNNI.
bool has_avx512_vnni() {
  if (!machine_has(Isa::kAvx2)) return false;
  constexpr uint64_t kMasksAndZmm = 0xe0;
  if ((saved_registers() & kMasksAndZmm) != kMasksAndZmm) return false;
  const Registers seven = cpuid(7);
  return has_all(seven.ebx, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && has_all(seven.ecx, 1u << 11);
}
#elif defined(MSD_ARM64)
// NEON itself every such processor has.
bool has_neon_dotprod() {
#if defined(_WIN32)
  constexpr DWORD kDotprod = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE, which older headers lack
  return IsProcessorFeaturePresent(kDotprod) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#elif defined(__linux__)
  constexpr unsigned long kDotprod = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotprod) != 0;
#else
  return false;
#endif
}
#endif

}  // namespace

bool machine_has(Isa isa) {
  // Kept, for it is asked at every call of an op, and slow on a virtual machine.
  switch (isa) {
    case Isa::kScalar:
      return true;
#if defined(MSD_X86)
    case Isa::kAvx2: {
      static const bool has = has_avx2_f16c_and_fma();
      return has;
    }
    case Isa::kAvxVnni: {
      static const bool has = has_avx_vnni();
      return has;
    }
    case Isa::kAvx512Vnni: {
      static const bool has = has_avx512_vnni();
      return has;
    }
#elif defined(MSD_ARM64)
    case Isa::kNeonDotprod: {
      static const bool has = has_neon_dotprod();
      return has;
    }
#endif
    default:
      return false;
  }
}

}  // namespace msd
