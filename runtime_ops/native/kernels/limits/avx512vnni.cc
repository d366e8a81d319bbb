#include <immintrin.h>

#include "loop.h"

namespace msd::limits {
namespace {

__m512i start(int number) { return _mm512_set1_epi32(number); }

int32_t number_of(__m512i sum) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(sum)); }

}  // namespace

int32_t float32_avx512vnni(int64_t rounds) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return in_turns(
      rounds, [](int number) { return _mm512_set1_ps(static_cast<float>(number)); },
      [&](__m512& sum) { sum = _mm512_fmadd_ps(one, one, sum); },
      [](__m512 sum) { return number_of(_mm512_castps_si512(sum)); });
}

int32_t int16_avx512vnni(int64_t rounds) {
  const __m512i w = _mm512_set1_epi16(3);
  return in_turns(rounds, start, [&](__m512i& sum) { sum = _mm512_dpwssd_epi32(sum, w, w); }, number_of);
}

int32_t int8_avx512vnni(int64_t rounds) {
  const __m512i w = _mm512_set1_epi8(3);
  return in_turns(rounds, start, [&](__m512i& sum) { sum = _mm512_dpbusd_epi32(sum, w, w); }, number_of);
}

}  // namespace msd::limits
