// Bare loops of multiply-adds on registers: the rate that a kernel would reach if nothing else took time.
//
// Files here that are compiled for one instruction set include nothing but intrinsics and headers whose functions are
// local to a file; see ../matmul/kernel.h.
#pragma once

#include <stdint.h>

#include "../variant.h"

namespace msd::limits {

constexpr int kSums = 12;  // in turn, so that none waits for itself: latency times multiply-adds a cycle is 12 at most

// Makes `rounds` rounds and returns a number to which all of them contribute, so that none can be left out.
using Loop = int32_t (*)(int64_t rounds);

struct Counted {
  Loop loop;       // null: this set has none
  int operations;  // of a round; a multiply-add is two
};

// By what is multiplied. int16: the pairs of vpmaddwd and the like; int8: unsigned by signed or both signed, in fours.
struct Loops {
  Counted float32;
  Counted int16;
  Counted int8;
};

constexpr int operations(int multiply_adds) { return 2 * kSums * multiply_adds; }

int32_t float32_avx2(int64_t rounds);
int32_t int16_avx2(int64_t rounds);
int32_t int8_avx2(int64_t rounds);
int32_t int16_avxvnni(int64_t rounds);
int32_t int8_avxvnni(int64_t rounds);
int32_t float32_avx512vnni(int64_t rounds);
int32_t int16_avx512vnni(int64_t rounds);
int32_t int8_avx512vnni(int64_t rounds);
int32_t float32_neondotprod(int64_t rounds);
int32_t int16_neondotprod(int64_t rounds);
int32_t int8_neondotprod(int64_t rounds);

inline constexpr Variant<Loops> kVariants[] = {
#if defined(MSD_AVX512_VNNI)
    {Isa::kAvx512Vnni,
     {{float32_avx512vnni, operations(16)}, {int16_avx512vnni, operations(32)}, {int8_avx512vnni, operations(64)}}},
#endif
#if defined(MSD_AVX_VNNI)
    {Isa::kAvxVnni, {{float32_avx2, operations(8)}, {int16_avxvnni, operations(16)}, {int8_avxvnni, operations(32)}}},
#endif
#if defined(MSD_X86)
    {Isa::kAvx2, {{float32_avx2, operations(8)}, {int16_avx2, operations(16)}, {int8_avx2, operations(32)}}},
#endif
#if defined(MSD_NEON_DOTPROD)
    {Isa::kNeonDotprod,
     {{float32_neondotprod, operations(4)}, {int16_neondotprod, operations(4)}, {int8_neondotprod, operations(16)}}},
#endif
    {Isa::kScalar, {}},
};

}  // namespace msd::limits
