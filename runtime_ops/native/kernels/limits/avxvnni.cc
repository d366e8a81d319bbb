#include <immintrin.h>

#include "loop.h"

namespace msd::limits {
namespace {

__m256i start(int number) { return _mm256_set1_epi32(number); }

int32_t number_of(__m256i sum) { return _mm_cvtsi128_si32(_mm256_castsi256_si128(sum)); }

}  // namespace

int32_t int16_avxvnni(int64_t rounds) {
  const __m256i w = _mm256_set1_epi16(3);
  return in_turns(rounds, start, [&](__m256i& sum) { sum = _mm256_dpwssd_avx_epi32(sum, w, w); }, number_of);
}

int32_t int8_avxvnni(int64_t rounds) {
  const __m256i w = _mm256_set1_epi8(3);
  return in_turns(rounds, start, [&](__m256i& sum) { sum = _mm256_dpbusd_avx_epi32(sum, w, w); }, number_of);
}

}  // namespace msd::limits
