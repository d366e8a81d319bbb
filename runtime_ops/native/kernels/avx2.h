// What kernels for AVX2 with F16C share. Everything is in an unnamed namespace: each file has its own, for its own
// instruction set.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "inner.h"
#include "real.h"

// sum += x, written out as an instruction: GCC otherwise rotates accumulators through copies and spills one, which costs
// a third of the rate.
#if defined(__GNUC__)
#define MSD_ADD_TO(sum, x) __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x))
#else
#define MSD_ADD_TO(sum, x) (sum) = _mm256_add_epi32(sum, x)
#endif

namespace msd {
namespace {

// Eight values from `index` on, as float.
template <Real kType>
inline __m256 load_8(const void* base, int64_t index) {
  if constexpr (kType == Real::kFloat) {
    return _mm256_loadu_ps(static_cast<const float*>(base) + index);
  } else {
    const auto* raw = static_cast<const uint16_t*>(base) + index;
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(raw));
    if constexpr (kType == Real::kHalf) return _mm256_cvtph_ps(eight);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
  }
}

// `count` < 8 values, the rest 0.
template <Real kType>
inline __m256 load_tail(const void* base, int64_t index, int64_t count) {
  float values[8] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = load_real(base, index + i, kType);
  return _mm256_loadu_ps(values);
}

// Two neighbouring codes, in every lane.
inline __m256i broadcast_pair(const int16_t* codes) {
  int32_t pair;
  memcpy(&pair, codes, sizeof pair);
  return _mm256_set1_epi32(pair);
}

// The largest of eight numbers, none of them negative.
inline uint32_t largest_lane(__m256i x) {
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(1, 0, 3, 2)));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(2, 3, 0, 1)));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(most));
}

inline int32_t sum_of_lanes(__m256i x) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(1, 0, 3, 2)));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(sum);
}

}  // namespace
}  // namespace msd
