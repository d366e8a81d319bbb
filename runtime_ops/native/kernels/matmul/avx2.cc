// AVX2 with F16C: int16 codes times unsigned weight codes through vpmaddwd, 16 columns of 1 to 4 rows at a time.
//
// A 32-bit lane of half a line holds one column's k = 0, 1, 2, 3 as bytes. Its even bytes, masked, are the int16 pair
// (0, 2) and its odd bytes, shifted, the pair (1, 3): a weight line is widened without a shuffle, and the codes of a
// quad lie in memory as 0, 2, 1, 3 so that one 32-bit broadcast meets each pair. Narrower codes: the same with a shift.
//
// Here is what makes the codes; the product is in product256.h.

#include <immintrin.h>

#include "../avx2.h"
#include "kernel.h"

#define MSD_ADD_PRODUCTS_TO(sum, w, q) MSD_ADD_TO(sum, _mm256_madd_epi16(w, q))
#include "product256.h"

namespace msd::matmul {
namespace {

// ---- Decomposition -------------------------------------------------------------------------------------------------

// Largest |x| as float bits, which order like the magnitudes with Inf and NaN on top.
template <Real kType>
uint32_t peak_bits(const void* a, int64_t begin, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i peak = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    peak = _mm256_max_epi32(peak, _mm256_and_si256(_mm256_castps_si256(load_8<kType>(a, begin + i)), magnitude));
  }
  if (i < count) {
    const __m256 tail = load_tail<kType>(a, begin + i, count - i);
    peak = _mm256_max_epi32(peak, _mm256_and_si256(_mm256_castps_si256(tail), magnitude));
  }
  return largest_lane(peak);
}

// Two quads of codes, each in the order 0, 2, 1, 3.
void store_quads(int16_t* to, __m256i codes) {
  __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  packed = _mm_shufflelo_epi16(packed, _MM_SHUFFLE(3, 1, 2, 0));
  packed = _mm_shufflehi_epi16(packed, _MM_SHUFFLE(3, 1, 2, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}

void store_zeros(int16_t* to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
}

// rint(x * inverse) in double, as int32.
__m256i codes_of(__m256 x, __m256d inverse) {
  const __m256d low = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), inverse);
  const __m256d high = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)), inverse);
  return _mm256_set_m128i(_mm256_cvtpd_epi32(high), _mm256_cvtpd_epi32(low));
}

template <Real kType>
void decompose_group(const Plan& plan, const void* a, int64_t begin, int64_t count, uint32_t peak, const Panel& panel,
                     int64_t at) {
  const bool is_live = peak >= kSmallestPeak && peak < kInfinity;
  const bool is_wide = plan.terms == 3;
  const int64_t plane = plan.groups * panel.rows;
  int16_t* high = panel.codes + at * plan.stride;
  int16_t* low = high + plane * plan.stride;
  const int64_t zeros_from = is_live ? (count + 7) / 8 * 8 : 0;
  __m256i sum_high = _mm256_setzero_si256(), sum_low = _mm256_setzero_si256();

  if (is_wide) {
    constexpr double kLimit = 8193532;
    double scale = peak >= kInfinity ? static_cast<double>(float_of(0x7fc00000u)) : 0;
    if (is_live) {
      const double largest = static_cast<double>(float_of(peak));
      const __m256d inverse = _mm256_set1_pd(kLimit / largest);
      scale = largest / kLimit;
      for (int64_t i = 0; i < count; i += 8) {
        const __m256 x = i + 8 <= count ? load_8<kType>(a, begin + i) : load_tail<kType>(a, begin + i, count - i);
        const __m256i code = codes_of(x, inverse);
        const __m256i code_high = _mm256_srai_epi32(code, 8), code_low = _mm256_and_si256(code, _mm256_set1_epi32(255));
        sum_high = _mm256_add_epi32(sum_high, code_high);
        sum_low = _mm256_add_epi32(sum_low, code_low);
        store_quads(high + i, code_high);
        store_quads(low + i, code_low);
      }
    }
    store_zeros(low, zeros_from, plan.stride);
    panel.sums[plane + at] = sum_of_lanes(sum_low);
    panel.scales64[at] = scale;
  } else {
    const float limit = plan.terms == 1 ? 127.0f : 32258.0f;
    float scale = peak >= kInfinity ? float_of(0x7fc00000u) : 0;
    if (is_live) {
      const float largest = float_of(peak);
      const __m256 inverse = _mm256_set1_ps(limit / largest);
      scale = largest / limit;
      for (int64_t i = 0; i < count; i += 8) {
        const __m256 x = i + 8 <= count ? load_8<kType>(a, begin + i) : load_tail<kType>(a, begin + i, count - i);
        const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse));
        sum_high = _mm256_add_epi32(sum_high, code);
        store_quads(high + i, code);
      }
    }
    panel.scales[at] = scale;
  }
  store_zeros(high, zeros_from, plan.stride);
  panel.sums[at] = sum_of_lanes(sum_high);
}

template <Real kType>
void decompose_rows(const Plan& plan, const void* a, const Panel& panel, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * plan.k;
    const uint32_t row_peak = plan.per_row ? peak_bits<kType>(a, start, plan.k) : 0;
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t begin = start + g * plan.block_size, left = plan.k - g * plan.block_size;
      const int64_t count = left < plan.block_size ? left : plan.block_size;
      const uint32_t peak = plan.per_row ? row_peak : peak_bits<kType>(a, begin, count);
      decompose_group<kType>(plan, a, begin, count, peak, panel, g * panel.rows + row);
    }
  }
}

template <typename Code>
__m256i load_8_codes(const Code* from) {
  const auto* bytes = reinterpret_cast<const __m128i*>(from);
  if constexpr (sizeof(Code) == 1) {
    const __m128i eight = _mm_loadl_epi64(bytes);
    return static_cast<Code>(-1) < 0 ? _mm256_cvtepi8_epi32(eight) : _mm256_cvtepu8_epi32(eight);
  } else {
    const __m128i eight = _mm_loadu_si128(bytes);
    return static_cast<Code>(-1) < 0 ? _mm256_cvtepi16_epi32(eight) : _mm256_cvtepu16_epi32(eight);
  }
}

template <typename Code>
void load_rows(const Plan& plan, const Codes& codes, const Panel& panel, int64_t first, int64_t last) {
  const Code* base = static_cast<const Code*>(codes.base);
  const __m256i center = _mm256_set1_epi32(codes.center);
  for (int64_t row = first; row < last; ++row) {
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t begin = g * plan.block_size, left = plan.k - begin;
      const int64_t count = left < plan.block_size ? left : plan.block_size;
      const int64_t at = g * panel.rows + row;
      const Code* from = base + row * plan.k + begin;
      int16_t* to = panel.codes + at * plan.stride;
      __m256i sum = _mm256_setzero_si256();
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
        const __m256i code = _mm256_sub_epi32(load_8_codes(from + i), center);
        sum = _mm256_add_epi32(sum, code);
        store_quads(to + i, code);
      }
      if (i < count) {
        alignas(32) int32_t tail[8] = {};
        for (int64_t j = i; j < count; ++j) tail[j - i] = from[j] - codes.center;
        const __m256i code = _mm256_load_si256(reinterpret_cast<const __m256i*>(tail));
        sum = _mm256_add_epi32(sum, code);
        store_quads(to + i, code);
        i += 8;
      }
      store_zeros(to, i, plan.stride);
      panel.sums[at] = sum_of_lanes(sum);
    }
  }
}

}  // namespace

void decompose_avx2(const Plan& plan, const void* a, Real type, const Panel& panel, int64_t first, int64_t last) {
  pick_real(type, [&](auto real) { decompose_rows<real()>(plan, a, panel, first, last); });
}

void load_codes_avx2(const Plan& plan, const Codes& codes, const Panel& panel, int64_t first, int64_t last) {
  pick_code(codes.type, [&](auto code) { load_rows<decltype(code)>(plan, codes, panel, first, last); });
}

void multiply_avx2(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                   const Output& output) {
  multiply_256(plan, weight, panel, first, last, output);
}

}  // namespace msd::matmul
