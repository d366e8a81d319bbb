// AVX2 with F16C: codes of queries and of new tokens, and probabilities, 8 numbers at a time. The products of codes
// through vpmaddwd are in product256.h.

#include <immintrin.h>

#include "../avx2.h"
#include "exp.h"
#include "kernel.h"

#define MSD_ADD_PRODUCTS_TO(sum, w, q) MSD_ADD_TO(sum, _mm256_madd_epi16(w, q))
#include "product256.h"

namespace msd::attention {
namespace {

// ---- Codes of queries and of new tokens ----------------------------------------------------------------------------

inline __m256i lanes_below(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Eight values from `i` on, 0 beyond the last.
template <Real kType>
__m256 values_at(const Vector& v, int64_t i) {
  if (i + 8 <= v.count) return load_8<kType>(v.x, i);
  return load_tail<kType>(v.x, i, v.count - i);
}

// Their scales, 1 beyond the last.
__m256 scales_at(const Vector& v, int64_t i) {
  if (v.scale_step == 0) return _mm256_set1_ps(v.scales[0]);
  if (i + 8 <= v.count) return _mm256_loadu_ps(v.scales + i);
  float scales[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  for (int64_t j = i; j < v.count; ++j) scales[j - i] = v.scales[j];
  return _mm256_loadu_ps(scales);
}

template <Real kType>
__m256 scaled_at(const Vector& v, int64_t i) {
  const __m256 x = values_at<kType>(v, i);
  if (v.scales == nullptr) return x;
  // A product with the padding's 0 must stay 0 also where the one scale is Inf or NaN.
  const __m256 product = _mm256_mul_ps(x, scales_at(v, i));
  if (i + 8 <= v.count) return product;
  return _mm256_and_ps(product, _mm256_castsi256_ps(lanes_below(static_cast<int>(v.count - i))));
}

template <Real kType>
uint32_t peak_bits(const Vector& v) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i peak = _mm256_setzero_si256();
  for (int64_t i = 0; i < v.count; i += 8) {
    peak = _mm256_max_epi32(peak, _mm256_and_si256(_mm256_castps_si256(scaled_at<kType>(v, i)), magnitude));
  }
  return largest_lane(peak);
}

__m128i to_int16(__m256i codes) {
  return _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
}

void store_bytes(__m256i codes, int64_t count, int8_t* to) {
  const __m128i bytes = _mm_packs_epi16(to_int16(codes), _mm_setzero_si128());
  if (count >= 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
  int8_t all[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(all), bytes);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

// What a row's peak says of its codes.
struct ByPeak {
  ByPeak(uint32_t peak, float limit) {
    const bool is_live = peak >= kSmallestPeak && peak < kInfinity;
    inverse = is_live ? limit / float_of(peak) : 0;
    scale = is_live ? float_of(peak) / limit : float_of(peak >= kInfinity ? kNan : 0);
    mask = _mm256_set1_epi32(is_live ? -1 : 0);
  }
  __m256i codes(__m256 x) const {
    return _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(inverse))), mask);
  }
  float inverse, scale;
  __m256i mask;
};

template <Real kType>
float decompose_row(const Vector& v, int64_t padded, int16_t* codes) {
  const ByPeak by(peak_bits<kType>(v), kLimit);
  int64_t i = 0;
  for (; i < v.count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), to_int16(by.codes(scaled_at<kType>(v, i))));
  }
  for (; i < padded; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm_setzero_si128());
  return by.scale;
}

template <Real kType>
float quantize_token(const Vector& v, int largest, int8_t* codes) {
  const auto most = static_cast<float>(largest);
  if (v.scales == nullptr) {
    const ByPeak by(peak_bits<kType>(v), most);
    for (int64_t i = 0; i < v.count; i += 8) store_bytes(by.codes(values_at<kType>(v, i)), v.count - i, codes + i);
    return by.scale;
  }
  const __m256 one = _mm256_set1_ps(1), high = _mm256_set1_ps(most), low = _mm256_set1_ps(-most - 1);
  for (int64_t i = 0; i < v.count; i += 8) {
    __m256 steps = _mm256_mul_ps(values_at<kType>(v, i), _mm256_div_ps(one, scales_at(v, i)));
    steps = _mm256_and_ps(steps, _mm256_cmp_ps(steps, steps, _CMP_ORD_Q));
    steps = _mm256_min_ps(_mm256_max_ps(steps, low), high);
    store_bytes(_mm256_cvtps_epi32(steps), v.count - i, codes + i);
  }
  return 0;
}

// ---- Probabilities -------------------------------------------------------------------------------------------------

// exp_of on 8 numbers, none of them positive; NaN stays NaN.
inline __m256 exp_8(__m256 x) {
  const __m256 turns = _mm256_mul_ps(x, _mm256_set1_ps(kLog2E));
  const __m256 n = _mm256_round_ps(turns, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_sub_ps(x, _mm256_mul_ps(n, _mm256_set1_ps(kLn2High)));
  r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(kLn2Low)));
  __m256 series = _mm256_set1_ps(kExpSeries[0]);
  MSD_UNROLL for (int i = 1; i < 5; ++i) {
    series = _mm256_add_ps(_mm256_mul_ps(series, r), _mm256_set1_ps(kExpSeries[i]));
  }
  __m256 y = _mm256_add_ps(_mm256_mul_ps(series, _mm256_mul_ps(r, r)), r);
  y = _mm256_add_ps(y, _mm256_set1_ps(1));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(kExpBelow), _CMP_LT_OQ), y);
}

inline __m256 soft_cap_8(__m256 s, __m256 cap, __m256 inverse) {
  const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1);
  const __m256 x = _mm256_mul_ps(s, inverse);
  const __m256 e = exp_8(_mm256_mul_ps(_mm256_set1_ps(-2), _mm256_andnot_ps(sign, x)));
  const __m256 t = _mm256_mul_ps(cap, _mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e)));
  return _mm256_or_ps(t, _mm256_and_ps(sign, x));
}

// Eight of an array that ends before `end`.
inline __m256 load_until(const float* from, int t, int end) {
  if (t + 8 <= end) return _mm256_loadu_ps(from + t);
  return _mm256_maskload_ps(from + t, lanes_below(end - t));
}

// kExtras: a soft cap or a mask.
template <bool kDynamic, bool kExtras>
Share soften_row(const Softmax& s, int32_t* products, int16_t* weights) {
  const __m256 hidden = _mm256_set1_ps(float_of(0xff800000u)), infinity = _mm256_set1_ps(float_of(kInfinity));
  const __m256 factor = _mm256_set1_ps(s.factor);
  const __m256 cap = _mm256_set1_ps(s.cap), inverse_cap = _mm256_set1_ps(s.cap != 0 ? 1.0f / s.cap : 0);
  const int padded = (s.end + kStep - 1) / kStep * kStep;
  auto* logits = reinterpret_cast<float*>(products);  // each in its product's place
  __m256 maximum = hidden, unsound = _mm256_setzero_ps();
  __m256i peak = _mm256_setzero_si256();
  for (int t = s.begin; t < padded; t += 8) {
    const __m256i product = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(products + t));
    __m256 x = _mm256_mul_ps(_mm256_cvtepi32_ps(product), factor);
    if constexpr (kDynamic) x = _mm256_mul_ps(x, load_until(s.key_scales, t, s.end));
    if constexpr (kExtras) {
      if (s.cap != 0) x = soft_cap_8(x, cap, inverse_cap);
      if (s.mask != nullptr) {
        const __m256 added = s.mask_step == 0 ? _mm256_set1_ps(s.mask[0]) : load_until(s.mask, t, s.end);
        x = _mm256_blendv_ps(_mm256_add_ps(x, added), hidden, _mm256_cmp_ps(added, hidden, _CMP_EQ_OQ));
      }
    }
    if (t < s.first || t + 8 > s.last) {
      const __m256i may_see = _mm256_andnot_si256(lanes_below(s.first - t), lanes_below(s.last - t));
      x = _mm256_blendv_ps(hidden, x, _mm256_castsi256_ps(may_see));
    }
    maximum = _mm256_max_ps(maximum, x);
    unsound = _mm256_or_ps(unsound, _mm256_cmp_ps(x, infinity, _CMP_NLT_UQ));
    if constexpr (kDynamic) {
      const __m256 seen = _mm256_cmp_ps(x, hidden, _CMP_NEQ_UQ);
      const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), load_until(s.value_scales, t, s.end));
      peak = _mm256_max_epi32(peak, _mm256_castps_si256(_mm256_and_ps(magnitude, seen)));
    }
    _mm256_storeu_ps(logits + t, x);
  }

  __m128 most = _mm_max_ps(_mm256_castps256_ps128(maximum), _mm256_extractf128_ps(maximum, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  most = _mm_max_ss(most, _mm_movehdup_ps(most));
  const uint32_t largest = kDynamic ? largest_lane(peak) : 0;
  Share share{_mm_cvtss_f32(most), 0, kDynamic ? float_of(largest) : 1};
  const bool is_sound = _mm256_movemask_ps(unsound) == 0 && largest < kInfinity;
  if (!is_sound) share = {0, float_of(kNan), 1};
  if (!is_sound || share.maximum == float_of(0xff800000u)) {
    for (int t = s.begin; t < padded; t += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(weights + t), _mm_setzero_si128());
    }
    return share;
  }

  const __m256 limit = _mm256_set1_ps(kLimit), top = _mm256_set1_ps(share.maximum);
  const __m256 inverse = _mm256_set1_ps(largest >= kSmallestPeak ? kLimit / float_of(largest) : 0);
  __m256i sum = _mm256_setzero_si256();
  for (int t = s.begin; t < padded; t += 16) {
    __m256i codes[2];
    MSD_UNROLL for (int half = 0; half < 2; ++half) {
      const __m256 x = _mm256_loadu_ps(logits + t + 8 * half);
      const __m256 p = exp_8(_mm256_sub_ps(x, top));
      codes[half] = _mm256_cvtps_epi32(_mm256_mul_ps(p, limit));
      sum = _mm256_add_epi32(sum, codes[half]);
      if constexpr (kDynamic) {
        const __m256 seen = _mm256_cmp_ps(x, hidden, _CMP_NEQ_UQ);
        const __m256 scale = _mm256_and_ps(load_until(s.value_scales, t + 8 * half, s.end), seen);
        codes[half] = _mm256_cvtps_epi32(_mm256_mul_ps(p, _mm256_mul_ps(scale, inverse)));
      }
    }
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes[0], codes[1]), _MM_SHUFFLE(3, 1, 2, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + t), packed);
  }
  share.sum = static_cast<float>(sum_of_lanes(sum));
  return share;
}

}  // namespace

float decompose_avx2(const Vector& x, int64_t padded, int16_t* codes) {
  return pick_real(x.type, [&](auto real) { return decompose_row<real()>(x, padded, codes); });
}

float quantize_avx2(const Vector& x, int largest, int8_t* codes) {
  return pick_real(x.type, [&](auto real) { return quantize_token<real()>(x, largest, codes); });
}

void unpack_avx2(const uint8_t* packed, int64_t count, int8_t* codes) {
  const __m256i low = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i / 2));
    const __m256i even = _mm256_sub_epi8(_mm256_and_si256(bytes, low), eight);
    const __m256i odd = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), eight);
    const __m256i first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpackhi_epi8(even, odd);
    auto* to = reinterpret_cast<__m256i*>(codes + i);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
  }
  unpack_scalar(packed + i / 2, count - i, codes + i);
}

void logits_avx2(const int16_t* query, int64_t rows, const Tokens& keys, int16_t* spare, int32_t* products) {
  logits_256(query, rows, keys, spare, products);
}

Share soften_avx2(const Softmax& softmax, int32_t* products, int16_t* weights) {
  const bool has_extras = softmax.cap != 0 || softmax.mask != nullptr;
  if (softmax.is_dynamic) {
    return has_extras ? soften_row<true, true>(softmax, products, weights)
                      : soften_row<true, false>(softmax, products, weights);
  }
  return has_extras ? soften_row<false, true>(softmax, products, weights)
                    : soften_row<false, false>(softmax, products, weights);
}

void mix_avx2(const int16_t* weights, int64_t rows, const Tokens& values, int16_t* spare, int32_t* sums) {
  mix_256(weights, rows, values, spare, sums);
}

}  // namespace msd::attention
