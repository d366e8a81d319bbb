// The arithmetic of msd.Attention; reference.py in ../../../attention says what it means, layout.py how the cache is
// stored.
//
// A variant does the work on one tile of a cache; sequence.cc, the same for all variants, walks the tiles. Sums of
// codes are exact; every other operation is float and rounds on its own, one after the other per row and token or
// column. That is why the same row has the same bits at every batch size, thread count and variant: no FMA, no
// reordered sum.
//
// Columns of a tile's codes are padded with zeros to a multiple of 16, so that kernels have no tails along them.
//
// Files here that are compiled for one instruction set include nothing but intrinsics and headers whose functions are
// local to a file (see ../matmul/kernel.h).
#pragma once

#include <stdint.h>

#include "../pick.h"
#include "../real.h"
#include "../variant.h"

namespace msd::attention {

constexpr int kTile = 256;         // tokens
constexpr int kStep = 16;          // columns are padded, and tokens of a tile skipped, by multiples of it
constexpr int kLongestHead = 512;  // columns: 512 products of 32258 and 128 fit int32
constexpr float kLimit = 32258;    // code of the largest |query| of a row, and of the probability 1

// Peaks are kept as float bits: they order like the magnitudes, Inf and NaN on top.
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kSmallestPeak = 27u << 23;  // 2^-100: below it a row counts as zero
constexpr uint32_t kNan = 0x7fc00000u;

// `count` values of type `type`, and their scales: scales[i * scale_step], or none if null.
struct Vector {
  const void* x;
  Real type;
  int64_t count;
  const float* scales;
  int64_t scale_step;
};

// Codes of x * scale as 16 bits, `padded` of them, the last ones 0. Returns the value of a code. Here and in weights
// each 16 codes have 32 bytes, which are in the variant's own order.
using Decompose = float (*)(const Vector& x, int64_t padded, int16_t* codes);

// Codes of x by its scales, in [-largest - 1, largest]; without scales by its own peak, in [-largest, largest].
// Returns the value of a code in the second case, else 0.
using Quantize = float (*)(const Vector& x, int largest, int8_t* codes);

// 4-bit codes as bytes, `count` even.
using Unpack = void (*)(const uint8_t* packed, int64_t count, int8_t* codes);

// Codes of a tile's tokens, at codes + token * stride, of which [begin, end) are wanted. `begin` is a multiple of 16.
struct Tokens {
  const int8_t* codes;
  int64_t stride;
  int64_t columns;  // a multiple of 16
  int begin, end;
  const uint8_t* ahead;  // what is read next, `ahead_stride` bytes for each token: worth asking memory for now
  int64_t ahead_stride;  // 0: nothing is, and `ahead` is any address
};

// products[row * 256 + token] = sum over columns of query * key; what stands at other tokens may change.
// query: [rows, columns]. spare: 256 * columns codes.
using Logits = void (*)(const int16_t* query, int64_t rows, const Tokens& keys, int16_t* spare, int32_t* products);

// sums[row * columns + column] = sum over tokens of weight * value. weights: [rows, 256], 0 from `end` to the next
// multiple of 16. spare as above.
using Mix = void (*)(const int16_t* weights, int64_t rows, const Tokens& values, int16_t* spare, int32_t* sums);

// What turns a row's products into probabilities. Arrays have a tile's tokens; all may be null but for a mask's row.
struct Softmax {
  float factor;         // of all products
  float cap;            // 0: none
  bool is_dynamic;      // key_scales and value_scales count
  const float* key_scales;
  const float* value_scales;
  const float* mask;    // null: none
  int64_t mask_step;    // 0: one value for all tokens
  int begin, end;       // tokens of the tile that have a product; begin is a multiple of 16
  int first, last;      // tokens that the row may see, within [begin, end]
};

// What a row gets of a tile: its maximum (-Inf if it sees nothing), the sum of its probabilities in codes (NaN if a
// logit or a scale it sees is not finite) and the value of a weight's 32258.
struct Share {
  float maximum, sum, largest;
};

// Writes weights [begin, end rounded up to 16), 0 for what is hidden. Changes the products.
using Soften = Share (*)(const Softmax& softmax, int32_t* products, int16_t* weights);

struct Kernel {
  Decompose decompose;
  Quantize quantize;
  Unpack unpack;
  Logits logits;
  Soften soften;
  Mix mix;
};

float decompose_scalar(const Vector&, int64_t, int16_t*);
float quantize_scalar(const Vector&, int, int8_t*);
void unpack_scalar(const uint8_t*, int64_t, int8_t*);
void logits_scalar(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);
Share soften_scalar(const Softmax&, int32_t*, int16_t*);
void mix_scalar(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);

float decompose_avx2(const Vector&, int64_t, int16_t*);
float quantize_avx2(const Vector&, int, int8_t*);
void unpack_avx2(const uint8_t*, int64_t, int8_t*);
void logits_avx2(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);
Share soften_avx2(const Softmax&, int32_t*, int16_t*);
void mix_avx2(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);

void logits_avxvnni(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);
void mix_avxvnni(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);

void logits_avx512vnni(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);
Share soften_avx512(const Softmax&, int32_t*, int16_t*);
void mix_avx512vnni(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);

float decompose_neondotprod(const Vector&, int64_t, int16_t*);
float quantize_neondotprod(const Vector&, int, int8_t*);
void unpack_neondotprod(const uint8_t*, int64_t, int8_t*);
void logits_neondotprod(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);
Share soften_neondotprod(const Softmax&, int32_t*, int16_t*);
void mix_neondotprod(const int16_t*, int64_t, const Tokens&, int16_t*, int32_t*);

inline constexpr Variant<Kernel> kVariants[] = {
#if defined(MSD_AVX512_VNNI)
    {Isa::kAvx512Vnni,
     {decompose_avx2, quantize_avx2, unpack_avx2, logits_avx512vnni, soften_avx512, mix_avx512vnni}},
#endif
#if defined(MSD_AVX_VNNI)
    {Isa::kAvxVnni, {decompose_avx2, quantize_avx2, unpack_avx2, logits_avxvnni, soften_avx2, mix_avxvnni}},
#endif
#if defined(MSD_X86)
    {Isa::kAvx2, {decompose_avx2, quantize_avx2, unpack_avx2, logits_avx2, soften_avx2, mix_avx2}},
#endif
#if defined(MSD_NEON_DOTPROD)
    {Isa::kNeonDotprod,
     {decompose_neondotprod, quantize_neondotprod, unpack_neondotprod, logits_neondotprod, soften_neondotprod,
      mix_neondotprod}},
#endif
    {Isa::kScalar, {decompose_scalar, quantize_scalar, unpack_scalar, logits_scalar, soften_scalar, mix_scalar}},
};

}  // namespace msd::attention
