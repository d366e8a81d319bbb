// AVX-512: probabilities from products, 16 tokens at a time. The steps are those of avx2.cc, and so are the bits.

#include <immintrin.h>

#include "../inner.h"
#include "exp.h"
#include "kernel.h"

namespace msd::attention {
namespace {

constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// exp_of on 16 numbers, none of them positive; NaN stays NaN.
inline __m512 exp_16(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2E)), kToNearest);
  __m512 r = _mm512_sub_ps(x, _mm512_mul_ps(n, _mm512_set1_ps(kLn2High)));
  r = _mm512_sub_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(kLn2Low)));
  __m512 series = _mm512_set1_ps(kExpSeries[0]);
  MSD_UNROLL for (int i = 1; i < 5; ++i) {
    series = _mm512_add_ps(_mm512_mul_ps(series, r), _mm512_set1_ps(kExpSeries[i]));
  }
  __m512 y = _mm512_add_ps(_mm512_mul_ps(series, _mm512_mul_ps(r, r)), r);
  y = _mm512_add_ps(y, _mm512_set1_ps(1));
  const __m512i power = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kExpBelow), _CMP_NLT_UQ);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(counts, _mm512_castps_si512(y), power));
}

inline __m512 soft_cap_16(__m512 s, __m512 cap, __m512 inverse) {
  const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1);
  const __m512 x = _mm512_mul_ps(s, inverse);
  const __m512 e = exp_16(_mm512_mul_ps(_mm512_set1_ps(-2), _mm512_andnot_ps(sign, x)));
  const __m512 t = _mm512_mul_ps(cap, _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e)));
  return _mm512_or_ps(t, _mm512_and_ps(sign, x));
}

inline __mmask16 lanes_below(int count) {
  return static_cast<__mmask16>(count <= 0 ? 0u : count >= 16 ? 0xffffu : (1u << count) - 1);
}

// Sixteen of an array that ends before `end`, 0 beyond.
inline __m512 load_until(const float* from, int t, int end) {
  return _mm512_maskz_loadu_ps(lanes_below(end - t), from + t);
}

// kExtras: a soft cap or a mask.
template <bool kDynamic, bool kExtras>
Share soften_row(const Softmax& s, int32_t* products, int16_t* weights) {
  const __m512 hidden = _mm512_set1_ps(float_of(0xff800000u)), infinity = _mm512_set1_ps(float_of(kInfinity));
  const __m512 factor = _mm512_set1_ps(s.factor);
  const __m512 cap = _mm512_set1_ps(s.cap), inverse_cap = _mm512_set1_ps(s.cap != 0 ? 1.0f / s.cap : 0);
  const int padded = (s.end + kStep - 1) / kStep * kStep;
  auto* logits = reinterpret_cast<float*>(products);  // each in its product's place
  __m512 maximum = hidden;
  __mmask16 unsound = 0;
  __m512i peak = _mm512_setzero_si512();
  for (int t = s.begin; t < padded; t += 16) {
    __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(products + t)), factor);
    if constexpr (kDynamic) x = _mm512_mul_ps(x, load_until(s.key_scales, t, s.end));
    if constexpr (kExtras) {
      if (s.cap != 0) x = soft_cap_16(x, cap, inverse_cap);
      if (s.mask != nullptr) {
        const __m512 added = s.mask_step == 0 ? _mm512_set1_ps(s.mask[0]) : load_until(s.mask, t, s.end);
        x = _mm512_mask_mov_ps(_mm512_add_ps(x, added), _mm512_cmp_ps_mask(added, hidden, _CMP_EQ_OQ), hidden);
      }
    }
    const auto may_see = static_cast<__mmask16>(lanes_below(s.last - t) & ~lanes_below(s.first - t));
    x = _mm512_mask_mov_ps(hidden, may_see, x);
    maximum = _mm512_max_ps(maximum, x);
    unsound = static_cast<__mmask16>(unsound | _mm512_cmp_ps_mask(x, infinity, _CMP_NLT_UQ));
    if constexpr (kDynamic) {
      const __mmask16 seen = _mm512_cmp_ps_mask(x, hidden, _CMP_NEQ_UQ);
      const __m512i magnitude = _mm512_castps_si512(_mm512_abs_ps(load_until(s.value_scales, t, s.end)));
      peak = _mm512_mask_max_epi32(peak, seen, peak, magnitude);
    }
    _mm512_storeu_ps(logits + t, x);
  }

  const auto largest = kDynamic ? static_cast<uint32_t>(_mm512_reduce_max_epi32(peak)) : 0u;
  Share share{_mm512_reduce_max_ps(maximum), 0, kDynamic ? float_of(largest) : 1};
  const bool is_sound = unsound == 0 && largest < kInfinity;
  if (!is_sound) share = {0, float_of(kNan), 1};
  if (!is_sound || share.maximum == float_of(0xff800000u)) {
    memset(weights + s.begin, 0, sizeof(int16_t) * static_cast<size_t>(padded - s.begin));
    return share;
  }

  const __m512 limit = _mm512_set1_ps(kLimit), top = _mm512_set1_ps(share.maximum);
  const __m512 inverse = _mm512_set1_ps(largest >= kSmallestPeak ? kLimit / float_of(largest) : 0);
  __m512i sum = _mm512_setzero_si512();
  for (int t = s.begin; t < padded; t += 16) {
    const __m512 x = _mm512_loadu_ps(logits + t);
    const __m512 p = exp_16(_mm512_sub_ps(x, top));
    __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(p, limit));
    sum = _mm512_add_epi32(sum, codes);
    if constexpr (kDynamic) {
      const __mmask16 seen = _mm512_cmp_ps_mask(x, hidden, _CMP_NEQ_UQ);
      const __m512 scale = _mm512_maskz_mov_ps(seen, load_until(s.value_scales, t, s.end));
      codes = _mm512_cvtps_epi32(_mm512_mul_ps(p, _mm512_mul_ps(scale, inverse)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + t), _mm512_cvtsepi32_epi16(codes));
  }
  share.sum = static_cast<float>(_mm512_reduce_add_epi32(sum));
  return share;
}

}  // namespace

Share soften_avx512(const Softmax& softmax, int32_t* products, int16_t* weights) {
  const bool has_extras = softmax.cap != 0 || softmax.mask != nullptr;
  if (softmax.is_dynamic) {
    return has_extras ? soften_row<true, true>(softmax, products, weights)
                      : soften_row<true, false>(softmax, products, weights);
  }
  return has_extras ? soften_row<false, true>(softmax, products, weights)
                    : soften_row<false, false>(softmax, products, weights);
}

}  // namespace msd::attention
