// A step of packing keys that all x86 kernels have alike. In an unnamed namespace: each file has its own, for its own
// instruction set.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace msd::attention {
namespace {

// 16 columns of 16 tokens' codes, from `column` on, as pairs of columns: pairs[i] has pair i of every token in order.
inline void transpose_pairs(const int8_t* const (&key)[16], int64_t column, __m256i (&pairs)[8]) {
  // A transposition of 8 tokens by 8 pairs in each half: tokens 0..7 and 8..15.
  __m256i a[8];
  for (int i = 0; i < 8; ++i) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(key[i] + column));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(key[i + 8] + column));
    a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      a[4 * i + 2 * j] = _mm256_unpacklo_epi32(pairs[4 * i + j], pairs[4 * i + 2 + j]);
      a[4 * i + 2 * j + 1] = _mm256_unpackhi_epi32(pairs[4 * i + j], pairs[4 * i + 2 + j]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_epi64(a[i], a[i + 4]);
    pairs[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 4]);
  }
}

}  // namespace
}  // namespace msd::attention
