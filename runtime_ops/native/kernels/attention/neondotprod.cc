// NEON with dot products: 16-bit codes of queries and probabilities as two bytes each times int8 codes of the cache
// through SDOT, 1 or 2 rows at a time.
//
// No code is beyond 32258, so both digits are signed bytes, as the cache's codes are. A key's columns lie side by side:
// each row and token has an accumulator for each digit, and those of four tokens are summed across at once. Of values a
// dot product needs four tokens of a column side by side: 16 columns of a tile are interleaved in `spare`, where all
// rows find them in the first cache.

#include "../neondotprod.h"
#include "exp.h"
#include "kernel.h"

namespace msd::attention {
namespace {

// ---- Codes of queries, of probabilities and of new tokens ----------------------------------------------------------

// Ones in the lanes below `count`.
MSD_INLINE uint32x4_t lanes_below(int count) {
  const int32_t numbers[4] = {0, 1, 2, 3};
  return vcltq_s32(vld1q_s32(numbers), vdupq_n_s32(count));
}

MSD_INLINE float32x4_t masked(float32x4_t x, uint32x4_t mask) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), mask));
}

// Sixteen codes as digits, the high ones first.
MSD_INLINE void store_digits(const int32x4_t (&codes)[4], int16_t* to) {
  int16x8_t narrowed[2], above[2];  // the low byte is signed: from 128 on it takes 256 from the high one
  narrow(codes, narrowed);
  for (int i = 0; i < 2; ++i) above[i] = vaddq_s16(narrowed[i], vdupq_n_s16(128));
  auto* digits = reinterpret_cast<int8_t*>(to);
  vst1q_s8(digits, high_bytes(above));
  vst1q_s8(digits + kCodes, low_bytes(narrowed));
}

// Four scales from `i` on, 1 beyond the last.
float32x4_t scales_at(const Vector& v, int64_t i) {
  if (v.scale_step == 0) return vdupq_n_f32(v.scales[0]);
  if (i + 4 <= v.count) return vld1q_f32(v.scales + i);
  float scales[4] = {1, 1, 1, 1};
  for (int64_t j = i; j < v.count; ++j) scales[j - i] = v.scales[j];
  return vld1q_f32(scales);
}

// Four values from `i` on, times their scales. Beyond the last 0, or NaN where one scale makes all of them Inf or NaN.
template <Real kType>
float32x4_t scaled_at(const Vector& v, int64_t i) {
  const float32x4_t x = load_up_to_4<kType>(v.x, i, v.count - i);
  return v.scales == nullptr ? x : vmulq_f32(x, scales_at(v, i));
}

template <Real kType>
uint32_t peak_bits(const Vector& v) {
  uint32x4_t peak = vdupq_n_u32(0);
  for (int64_t i = 0; i < v.count; i += 4) peak = vmaxq_u32(peak, magnitude_bits(scaled_at<kType>(v, i)));
  return vmaxvq_u32(peak);
}

// What a row's peak says of its codes.
struct ByPeak {
  ByPeak(uint32_t peak, float limit) {
    const bool is_live = peak >= kSmallestPeak && peak < kInfinity;
    inverse = is_live ? limit / float_of(peak) : 0;
    scale = is_live ? float_of(peak) / limit : float_of(peak >= kInfinity ? kNan : 0);
    mask = vdupq_n_s32(is_live ? -1 : 0);
  }
  int32x4_t codes(float32x4_t x) const { return vandq_s32(vcvtnq_s32_f32(vmulq_n_f32(x, inverse)), mask); }
  float inverse, scale;
  int32x4_t mask;
};

template <Real kType>
float decompose_row(const Vector& v, int64_t padded, int16_t* codes) {
  const ByPeak by(peak_bits<kType>(v), kLimit);
  for (int64_t i = 0; i < padded; i += kCodes) {
    int32x4_t sixteen[4];
    for (int64_t j = 0; j < 4; ++j) {
      sixteen[j] = i + 4 * j < v.count ? by.codes(scaled_at<kType>(v, i + 4 * j)) : vdupq_n_s32(0);
    }
    store_digits(sixteen, codes + i);
  }
  return by.scale;
}

void store_bytes(int32x4_t codes, int64_t count, int8_t* to) {
  int32_t four[4];
  vst1q_s32(four, codes);
  for (int64_t i = 0; i < 4 && i < count; ++i) to[i] = static_cast<int8_t>(four[i]);
}

template <Real kType>
float quantize_token(const Vector& v, int largest, int8_t* codes) {
  const auto most = static_cast<float>(largest);
  if (v.scales == nullptr) {
    const ByPeak by(peak_bits<kType>(v), most);
    for (int64_t i = 0; i < v.count; i += 4) store_bytes(by.codes(scaled_at<kType>(v, i)), v.count - i, codes + i);
    return by.scale;
  }
  const float32x4_t one = vdupq_n_f32(1), high = vdupq_n_f32(most), low = vdupq_n_f32(-most - 1);
  for (int64_t i = 0; i < v.count; i += 4) {
    const float32x4_t x = load_up_to_4<kType>(v.x, i, v.count - i);
    float32x4_t steps = vmulq_f32(x, vdivq_f32(one, scales_at(v, i)));
    steps = masked(steps, vceqq_f32(steps, steps));  // NaN becomes 0
    steps = vminq_f32(vmaxq_f32(steps, low), high);
    store_bytes(vcvtnq_s32_f32(steps), v.count - i, codes + i);
  }
  return 0;
}

// ---- Products of queries and keys ----------------------------------------------------------------------------------

// kRows rows, four tokens at a time; beyond the last token the last one is repeated.
template <int kRows>
MSD_INNER void dot_rows(const int16_t* query, const Tokens& keys, int32_t* products) {
  const int64_t columns = keys.columns;
  for (int t = keys.begin; t < keys.end; t += 4) {
    const int8_t* key[4];
    for (int i = 0; i < 4; ++i) key[i] = keys.codes + (t + i < keys.end ? t + i : keys.end - 1) * keys.stride;
    int32x4_t high[kRows][4], low[kRows][4];
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      MSD_UNROLL for (int i = 0; i < 4; ++i) high[r][i] = low[r][i] = vdupq_n_s32(0);
    }
    for (int64_t c = 0; c < columns; c += kCodes) {
      int8x16_t k[4];
      MSD_UNROLL for (int i = 0; i < 4; ++i) k[i] = vld1q_s8(key[i] + c);
      MSD_UNROLL for (int r = 0; r < kRows; ++r) {
        const auto* digits = reinterpret_cast<const int8_t*>(query + r * columns + c);
        const int8x16_t q_high = vld1q_s8(digits), q_low = vld1q_s8(digits + kCodes);
        MSD_UNROLL for (int i = 0; i < 4; ++i) {
          high[r][i] = vdotq_s32(high[r][i], k[i], q_high);
          low[r][i] = vdotq_s32(low[r][i], k[i], q_low);
        }
      }
    }
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      int32x4_t sum[4];
      MSD_UNROLL for (int i = 0; i < 4; ++i) sum[i] = vaddq_s32(vshlq_n_s32(high[r][i], 8), low[r][i]);
      const int32x4_t across = vpaddq_s32(vpaddq_s32(sum[0], sum[1]), vpaddq_s32(sum[2], sum[3]));
      vst1q_s32(products + r * kTile + t, across);
    }
  }
}

// ---- Probabilities -------------------------------------------------------------------------------------------------

// exp_of on four numbers, none of them positive; NaN stays NaN.
MSD_INLINE float32x4_t exp_4(float32x4_t x) {
  const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, kLog2E));
  float32x4_t r = vsubq_f32(x, vmulq_n_f32(n, kLn2High));
  r = vsubq_f32(r, vmulq_n_f32(n, kLn2Low));
  float32x4_t series = vdupq_n_f32(kExpSeries[0]);
  MSD_UNROLL for (int i = 1; i < 5; ++i) series = vaddq_f32(vmulq_f32(series, r), vdupq_n_f32(kExpSeries[i]));
  float32x4_t y = vaddq_f32(vmulq_f32(series, vmulq_f32(r, r)), r);
  y = vaddq_f32(y, vdupq_n_f32(1));
  const int32x4_t power = vshlq_n_s32(vcvtnq_s32_f32(n), 23);
  const int32x4_t scaled = vaddq_s32(vreinterpretq_s32_f32(y), power);
  const uint32x4_t is_small = vcltq_f32(x, vdupq_n_f32(kExpBelow));
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(scaled), is_small));
}

MSD_INLINE float32x4_t soft_cap_4(float32x4_t s, float cap, float inverse) {
  const float32x4_t one = vdupq_n_f32(1), x = vmulq_n_f32(s, inverse);
  const float32x4_t e = exp_4(vmulq_n_f32(vabsq_f32(x), -2));
  const float32x4_t t = vmulq_n_f32(vdivq_f32(vsubq_f32(one, e), vaddq_f32(one, e)), cap);
  return vbslq_f32(vdupq_n_u32(0x80000000u), x, t);
}

// Four of an array that ends before `end`, 0 beyond.
MSD_INLINE float32x4_t load_until(const float* from, int t, int end) {
  return load_up_to_4<Real::kFloat>(from, t, end - t);
}

// kExtras: a soft cap or a mask.
template <bool kDynamic, bool kExtras>
Share soften_row(const Softmax& s, int32_t* products, int16_t* weights) {
  const float32x4_t hidden = vdupq_n_f32(float_of(0xff800000u)), infinity = vdupq_n_f32(float_of(kInfinity));
  const float inverse_cap = s.cap != 0 ? 1.0f / s.cap : 0;
  const int padded = (s.end + kStep - 1) / kStep * kStep;
  auto* logits = reinterpret_cast<float*>(products);  // each in its product's place
  float32x4_t maximum = hidden;
  uint32x4_t sound = vdupq_n_u32(~0u), peak = vdupq_n_u32(0);
  for (int t = s.begin; t < padded; t += 4) {
    float32x4_t x = vmulq_n_f32(vcvtq_f32_s32(vld1q_s32(products + t)), s.factor);
    if constexpr (kDynamic) x = vmulq_f32(x, load_until(s.key_scales, t, s.end));
    if constexpr (kExtras) {
      if (s.cap != 0) x = soft_cap_4(x, s.cap, inverse_cap);
      if (s.mask != nullptr) {
        const float32x4_t added = s.mask_step == 0 ? vdupq_n_f32(s.mask[0]) : load_until(s.mask, t, s.end);
        x = vbslq_f32(vceqq_f32(added, hidden), hidden, vaddq_f32(x, added));
      }
    }
    if (t < s.first || t + 4 > s.last) {
      x = vbslq_f32(vbicq_u32(lanes_below(s.last - t), lanes_below(s.first - t)), x, hidden);
    }
    maximum = vmaxq_f32(maximum, x);
    sound = vandq_u32(sound, vcltq_f32(x, infinity));
    if constexpr (kDynamic) {
      const uint32x4_t magnitude = magnitude_bits(load_until(s.value_scales, t, s.end));
      peak = vmaxq_u32(peak, vbicq_u32(magnitude, vceqq_f32(x, hidden)));
    }
    vst1q_f32(logits + t, x);
  }

  const uint32_t largest = vmaxvq_u32(peak);
  Share share{vmaxvq_f32(maximum), 0, kDynamic ? float_of(largest) : 1};
  const bool is_sound = vminvq_u32(sound) != 0 && largest < kInfinity;
  if (!is_sound) share = {0, float_of(kNan), 1};
  if (!is_sound || share.maximum == float_of(0xff800000u)) {
    for (int t = s.begin; t < padded; t += 8) vst1q_s16(weights + t, vdupq_n_s16(0));
    return share;
  }

  const float32x4_t top = vdupq_n_f32(share.maximum);
  const float inverse = largest >= kSmallestPeak ? kLimit / float_of(largest) : 0;
  int32x4_t sum = vdupq_n_s32(0);
  for (int t = s.begin; t < padded; t += kCodes) {
    int32x4_t codes[4];
    MSD_UNROLL for (int i = 0; i < 4; ++i) {
      const float32x4_t x = vld1q_f32(logits + t + 4 * i), p = exp_4(vsubq_f32(x, top));
      codes[i] = vcvtnq_s32_f32(vmulq_n_f32(p, kLimit));
      sum = vaddq_s32(sum, codes[i]);
      if constexpr (kDynamic) {
        const uint32x4_t seen = vmvnq_u32(vceqq_f32(x, hidden));
        const float32x4_t scale = masked(load_until(s.value_scales, t + 4 * i, s.end), seen);
        codes[i] = vcvtnq_s32_f32(vmulq_f32(p, vmulq_n_f32(scale, inverse)));
      }
    }
    store_digits(codes, weights + t);
  }
  share.sum = static_cast<float>(vaddvq_s32(sum));
  return share;
}

// ---- Products of probabilities and values --------------------------------------------------------------------------

// 16 columns of all tokens, [four tokens][column][token]; up to a multiple of 16 tokens, whose weights are 0, the last
// token is repeated.
void interleave(const Tokens& values, int64_t column, int8_t* to) {
  for (int t = values.begin; t < (values.end + kStep - 1) / kStep * kStep; t += 4, to += 64) {
    int8x16_t token[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t nearest = t + i < values.end ? t + i : values.end - 1;
      token[i] = vld1q_s8(values.codes + nearest * values.stride + column);
    }
    vst4q_s8(to, {{token[0], token[1], token[2], token[3]}});
  }
}

// Adds quad number kQuad of the weights, and those that follow, times the values of their tokens.
template <int kQuad, int kRows>
MSD_INLINE void add_quads(const int8_t* values, const int8x16_t (&w)[kRows][2], int32x4_t (&sums)[kRows][4][2]) {
  MSD_UNROLL for (int i = 0; i < 4; ++i) {
    const int8x16_t v = vld1q_s8(values + 16 * i);
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      sums[r][i][0] = vdotq_laneq_s32(sums[r][i][0], v, w[r][0], kQuad);
      sums[r][i][1] = vdotq_laneq_s32(sums[r][i][1], v, w[r][1], kQuad);
    }
  }
  if constexpr (kQuad < 3) add_quads<kQuad + 1>(values + 64, w, sums);
}

// Sums of kRows rows in 16 columns.
template <int kRows>
MSD_INNER void mix_columns(const int16_t* weights, const int8_t* values, int tokens, int32_t* to, int64_t to_stride) {
  int32x4_t sums[kRows][4][2];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int i = 0; i < 4; ++i) sums[r][i][0] = sums[r][i][1] = vdupq_n_s32(0);
  }
  for (; tokens > 0; tokens -= kCodes, weights += kCodes, values += 16 * kCodes) {
    int8x16_t w[kRows][2];
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto* digits = reinterpret_cast<const int8_t*>(weights + r * kTile);
      w[r][0] = vld1q_s8(digits);
      w[r][1] = vld1q_s8(digits + kCodes);
    }
    add_quads<0>(values, w, sums);
  }
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int i = 0; i < 4; ++i) {
      vst1q_s32(to + r * to_stride + 4 * i, vaddq_s32(vshlq_n_s32(sums[r][i][0], 8), sums[r][i][1]));
    }
  }
}

}  // namespace

float decompose_neondotprod(const Vector& x, int64_t padded, int16_t* codes) {
  return pick_real(x.type, [&](auto real) { return decompose_row<real()>(x, padded, codes); });
}

float quantize_neondotprod(const Vector& x, int largest, int8_t* codes) {
  return pick_real(x.type, [&](auto real) { return quantize_token<real()>(x, largest, codes); });
}

void unpack_neondotprod(const uint8_t* packed, int64_t count, int8_t* codes) {
  const uint8x16_t eight = vdupq_n_u8(8);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const uint8x16_t bytes = vld1q_u8(packed + i / 2);
    const uint8x16_t even = vsubq_u8(vandq_u8(bytes, vdupq_n_u8(15)), eight);
    const uint8x16_t odd = vsubq_u8(vshrq_n_u8(bytes, 4), eight);
    vst2q_s8(codes + i, {{vreinterpretq_s8_u8(even), vreinterpretq_s8_u8(odd)}});
  }
  unpack_scalar(packed + i / 2, count - i, codes + i);
}

void logits_neondotprod(const int16_t* query, int64_t rows, const Tokens& keys, int16_t*, int32_t* products) {
  for (; rows >= 2; rows -= 2, query += 2 * keys.columns, products += 2 * kTile) dot_rows<2>(query, keys, products);
  if (rows == 1) dot_rows<1>(query, keys, products);
}

Share soften_neondotprod(const Softmax& softmax, int32_t* products, int16_t* weights) {
  const bool has_extras = softmax.cap != 0 || softmax.mask != nullptr;
  if (softmax.is_dynamic) {
    return has_extras ? soften_row<true, true>(softmax, products, weights)
                      : soften_row<true, false>(softmax, products, weights);
  }
  return has_extras ? soften_row<false, true>(softmax, products, weights)
                    : soften_row<false, false>(softmax, products, weights);
}

void mix_neondotprod(const int16_t* weights, int64_t rows, const Tokens& values, int16_t* spare, int32_t* sums) {
  auto* quads = reinterpret_cast<int8_t*>(spare);
  const int tokens = values.end - values.begin;
  const int64_t columns = values.columns;
  for (int64_t column = 0; column < columns; column += 16) {
    interleave(values, column, quads);
    const int16_t* w = weights + values.begin;
    int32_t* to = sums + column;
    int64_t left = rows;
    for (; left >= 2; left -= 2, w += 2 * kTile, to += 2 * columns) mix_columns<2>(w, quads, tokens, to, columns);
    if (left == 1) mix_columns<1>(w, quads, tokens, to, columns);
  }
}

}  // namespace msd::attention
