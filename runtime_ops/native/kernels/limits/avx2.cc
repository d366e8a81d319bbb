#include "../avx2.h"
#include "loop.h"

namespace msd::limits {
namespace {

__m256i start(int number) { return _mm256_set1_epi32(number); }

int32_t number_of(__m256i sum) { return _mm_cvtsi128_si32(_mm256_castsi256_si128(sum)); }

}  // namespace

int32_t float32_avx2(int64_t rounds) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return in_turns(
      rounds, [](int number) { return _mm256_set1_ps(static_cast<float>(number)); },
      [&](__m256& sum) { sum = _mm256_fmadd_ps(one, one, sum); },
      [](__m256 sum) { return number_of(_mm256_castps_si256(sum)); });
}

// The sum itself is multiplied: a product of constants would be taken out of the loop.
int32_t int16_avx2(int64_t rounds) {
  const __m256i w = _mm256_set1_epi16(3);
  return in_turns(rounds, start, [&](__m256i& sum) { MSD_ADD_TO(sum, _mm256_madd_epi16(sum, w)); }, number_of);
}

int32_t int8_avx2(int64_t rounds) {
  const __m256i w = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  const auto step = [&](__m256i& sum) { MSD_ADD_TO(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(sum, w), ones)); };
  return in_turns(rounds, start, step, number_of);
}

}  // namespace msd::limits
