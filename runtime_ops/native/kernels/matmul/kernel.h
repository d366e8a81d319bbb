// The arithmetic of msd.MatMul and msd.MatMulIntegerToFloat; reference.py of ../../../matmul and
// ../../../matmul_integer_to_float says what they mean, matmul/layout.py how the weight is stored.
//
//   y[m, n] = bias[n] + sum over groups g, ascending, of  v * p
//   v = float(C) - offset[g, n] * float(R)     p = s_x[m, g] * s_w[g, n]
//   C = sum over k in g of (w[k, n] - z[g, n]) * Q[m, k]     R = sum over k in g of Q[m, k]
//
// w are codes of the weight as stored, or the numbers that its codebook has for them (`Codebook`).
//
// Q are the codes of a decomposed activation, or given codes less their zero point: those need 17 bits, so they are kept
// as int16 codes to which a shift, one number for all, is added; and where a column has one scale, the groups are one.
//
// C and R are exact; every other operation rounds on its own, one accumulator per output. That is why the same row
// has the same bits at every batch size, thread count and variant: no FMA, no splitting of K, no reordered sum.
// With 3 terms "float" is double, for the codes need 24 bits.
//
// Files here that are compiled for one instruction set include nothing but intrinsics and headers whose functions are
// local to a file: an inline function of external linkage would be compiled for it too, and the linker may keep that
// copy for everybody.
#pragma once

#include <stdint.h>

#include "../pick.h"
#include "../real.h"
#include "../variant.h"

namespace msd::matmul {

constexpr int kTile = 16;           // output columns of a line
constexpr int kQuad = 4;            // consecutive k of one column in a line
constexpr int kLine = 64;           // bytes
constexpr int kLongestGroup = 256;  // K-steps: 256 products of a code and |w - z| <= 255 fit int32
constexpr int kMostRows = 128;      // of a panel
constexpr int kTilesTogether = 4;   // kernels are fastest with so many at a time, or a multiple

// Peaks, the largest |x| of a group or row, are kept as float bits: they order like the magnitudes, Inf and NaN on top.
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kSmallestPeak = 27u << 23;  // 2^-100: below it a group counts as zero

// What a weight's codes stand for; numbers of the plan.
enum class Codebook : int { kInteger = 0, kE2m1 = 1 };

// Twice the values of E2M1 raised by 12, by code; the last code is not used.
inline constexpr uint8_t kE2m1Numbers[16] = {0, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 24, 24};

// How a group of the activation becomes codes; numbers of the plan. INT8 terms: `Decompose`; the others: mx.h.
enum class ActivationFormat : int {
  kInt8 = 0,
  kMxfp4E1m2Twice = 1,
  kMxfp4E1m2 = 2,
  kMxfp4E2m1Twice = 3,
  kMxfp4E2m1 = 4,
  kMxfp8 = 5,
};

struct Plan {
  int64_t k;
  int64_t groups;
  int bits;
  Codebook codebook;
  ActivationFormat activation;
  int block_size;
  int terms;
  bool per_row;
  int lines;   // of a tile and group
  int stride;  // int16 codes reserved for a row's group: covers the lines' k, a multiple of 16
  // Of given codes whose weight has one scale and zero point per column: all groups are one exact sum, scaled once.
  bool is_one_sum;
};

// Value of a column: base[tile * per_tile + group * per_group + c], or base[0] for all if `single`.
template <typename T>
struct Columns {
  const T* base;
  int64_t per_tile;
  int64_t per_group;
  bool single;
};

struct Weight {
  const uint8_t* b;
  Columns<float> scales;
  Columns<uint8_t> zero_points;
  Columns<float> offsets;
  bool has_offsets;  // false: offsets are the one value 0, and 0 * R changes nothing
  const float* bias;
  int64_t n;
};

// Some rows of A, decomposed. A code is an int16 in plane 0; with 3 terms it is 256 * plane 0 + plane 1.
struct Panel {
  int64_t rows;
  int16_t* codes;   // [planes, groups, rows, stride]; the order within a row's group is the variant's own, tail 0
  int32_t* sums;    // [planes, groups, rows], R, or what the variant gets R and more from
  float* scales;    // [groups, rows], s_x; terms 1 and 2
  double* scales64;  // likewise for 3 terms

  // Of given codes: Q = code + shift. The shift's part of C is that of a row of ones, the sum of w - z over the group.
  int32_t shift;
  const int16_t* ones;       // [groups, stride], in the variant's order; tail 0
  const int32_t* ones_sums;  // [groups]: K-steps of the group, as `sums` has them
};

// What kernels tell weights apart by: bits and codebook.
enum class Coding { kInt2, kInt4, kInt8, kE2m1 };

static constexpr int code_bits(Coding coding) {
  return coding == Coding::kInt2 ? 2 : coding == Coding::kInt8 ? 8 : 4;
}

template <typename Run>
static inline void pick_coding(const Plan& plan, const Run& run) {
  if (plan.codebook == Codebook::kE2m1) return run(Constant<Coding::kE2m1>{});
  switch (plan.bits) {
    case 2:
      return run(Constant<Coding::kInt2>{});
    case 4:
      return run(Constant<Coding::kInt4>{});
    default:
      return run(Constant<Coding::kInt8>{});
  }
}

// Types that given codes have.
enum class CodeType : int { kUint8 = 2, kInt8 = 3, kUint16 = 4, kInt16 = 5 };

// Codes as a model gives them: stored values less `center` fit int16.
struct Codes {
  const void* base;
  CodeType type;
  int32_t center;
};

// `run` gets a code of that type.
template <typename Run>
static inline void pick_code(CodeType type, const Run& run) {
  switch (type) {
    case CodeType::kUint8:
      return run(uint8_t{});
    case CodeType::kInt8:
      return run(int8_t{});
    case CodeType::kUint16:
      return run(uint16_t{});
    case CodeType::kInt16:
      return run(int16_t{});
  }
}

// Writes rows [first, last) of the panel from `a`, row 0 of the panel, [rows, k] of type `type`.
using Decompose = void (*)(const Plan& plan, const void* a, Real type, const Panel& panel, int64_t first, int64_t last);

// The same from given codes, [rows, k]: codes and sums of one plane, no scales.
using LoadCodes = void (*)(const Plan& plan, const Codes& codes, const Panel& panel, int64_t first, int64_t last);

// Writes columns of tiles [first, last) for all rows of the panel.
using Multiply = void (*)(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                          const Output& output);

// The three belong together: they share the order of the codes.
struct Kernel {
  Decompose decompose;
  LoadCodes load_codes;
  Multiply multiply;
};

void decompose_scalar(const Plan&, const void*, Real, const Panel&, int64_t, int64_t);
void load_codes_scalar(const Plan&, const Codes&, const Panel&, int64_t, int64_t);
void multiply_scalar(const Plan&, const Weight&, const Panel&, int64_t, int64_t, const Output&);
void decompose_avx2(const Plan&, const void*, Real, const Panel&, int64_t, int64_t);
void load_codes_avx2(const Plan&, const Codes&, const Panel&, int64_t, int64_t);
void multiply_avx2(const Plan&, const Weight&, const Panel&, int64_t, int64_t, const Output&);
void multiply_avxvnni(const Plan&, const Weight&, const Panel&, int64_t, int64_t, const Output&);
void multiply_avx512vnni(const Plan&, const Weight&, const Panel&, int64_t, int64_t, const Output&);
void decompose_neondotprod(const Plan&, const void*, Real, const Panel&, int64_t, int64_t);
void load_codes_neondotprod(const Plan&, const Codes&, const Panel&, int64_t, int64_t);
void multiply_neondotprod(const Plan&, const Weight&, const Panel&, int64_t, int64_t, const Output&);

// The sets with VNNI keep AVX2's order of codes, and with it what writes them.
inline constexpr Variant<Kernel> kVariants[] = {
#if defined(MSD_AVX512_VNNI)
    {Isa::kAvx512Vnni, {decompose_avx2, load_codes_avx2, multiply_avx512vnni}},
#endif
#if defined(MSD_AVX_VNNI)
    {Isa::kAvxVnni, {decompose_avx2, load_codes_avx2, multiply_avxvnni}},
#endif
#if defined(MSD_X86)
    {Isa::kAvx2, {decompose_avx2, load_codes_avx2, multiply_avx2}},
#endif
#if defined(MSD_NEON_DOTPROD)
    {Isa::kNeonDotprod, {decompose_neondotprod, load_codes_neondotprod, multiply_neondotprod}},
#endif
    {Isa::kScalar, {decompose_scalar, load_codes_scalar, multiply_scalar}},
};

}  // namespace msd::matmul
