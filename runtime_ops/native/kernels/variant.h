// Which instruction set a kernel runs on: each kernel lists its variants, the machine decides once.
#pragma once

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__) || defined(_M_IX86)
#define MSD_X86 1
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
#define MSD_ARM64 1
#endif

namespace msd {

enum class Isa { kScalar, kAvx2, kAvxVnni, kAvx512Vnni, kNeonDotprod };  // of a processor's, a later one is better

struct IsaName {
  Isa isa;
  const char* name;
};

// Best first. The build defines MSD_AVX512_VNNI, MSD_AVX_VNNI and MSD_NEON_DOTPROD where the compiler knows those
// instructions: what it does not know is in no table, and its name is not accepted.
inline constexpr IsaName kIsaNames[] = {
#if defined(MSD_AVX512_VNNI)
    {Isa::kAvx512Vnni, "avx512-vnni"},
#endif
#if defined(MSD_AVX_VNNI)
    {Isa::kAvxVnni, "avx-vnni"},
#endif
#if defined(MSD_X86)
    {Isa::kAvx2, "avx2"},
#endif
#if defined(MSD_NEON_DOTPROD)
    {Isa::kNeonDotprod, "neon-dotprod"},
#endif
    {Isa::kScalar, "scalar"},
};

// True if the processor has the instruction set and the operating system saves its registers.
bool machine_has(Isa isa);

// One row of a kernel's table. Tables are ordered fastest first; the last row runs everywhere.
template <typename Kernel>
struct Variant {
  Isa isa;
  Kernel kernel;
};

}  // namespace msd
