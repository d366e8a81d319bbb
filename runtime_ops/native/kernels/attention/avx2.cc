// AVX2 with F16C: int16 codes of queries and probabilities times int8 codes of the cache through vpmaddwd.
//
// Few rows: the cache is widened in registers as it is read. A key's columns lie side by side, so each row and token
// has an accumulator, and eight of them are summed across at once; two tokens' values are interleaved, so that a pair
// meets a pair of probabilities. Many rows: a tile is widened and put into pairs once, in `spare`, and both products
// are the same loop over pairs, 4 rows by 16 tokens or columns at a time. The sums are the same integers.

#include <immintrin.h>

#include "../avx2.h"
#include "exp.h"
#include "kernel.h"
#include "transpose.h"

namespace msd::attention {
namespace {

constexpr int64_t kFewRowsHere = 8;  // up to here widening for every four rows costs less than a buffer
constexpr int kBlock = 64;           // tokens whose values stay in the first cache while all columns are summed

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

// ---- Products of queries and keys ----------------------------------------------------------------------------------

inline __m256i widen(const int8_t* codes) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

// Asks memory for a line of what is read after these tokens: the processor's own prefetching stops at pages and at the
// tile's end. Each line once, and spread as evenly as the work: a request too many costs as much as it saves.
inline void fetch(const uint8_t* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1); }

// Eight accumulators, each summed across.
inline __m256i sums_across(const __m256i (&acc)[8]) {
  const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(acc[0], acc[1]), _mm256_hadd_epi32(acc[2], acc[3]));
  const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(acc[4], acc[5]), _mm256_hadd_epi32(acc[6], acc[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

// kRows rows, kTokens tokens at a time; beyond the last token the last one is repeated.
template <int kRows, int kTokens>
MSD_INNER void dot_rows(const int16_t* query, const Tokens& keys, int32_t* products) {
  static_assert(kRows * kTokens <= 8 && kTile % kTokens == 0);
  const int64_t columns = keys.columns, stride = keys.stride, ahead_stride = keys.ahead_stride;
  const int end = keys.end;
  const uint8_t* ahead = keys.ahead + keys.begin * ahead_stride;
  const int8_t* first = keys.codes + keys.begin * stride;
  for (int t = keys.begin; t < end; t += kTokens, first += kTokens * stride) {
    const int8_t* key[kTokens];
    key[0] = first;
    MSD_UNROLL for (int i = 1; i < kTokens; ++i) key[i] = t + i < end ? key[i - 1] + stride : key[i - 1];
    for (const uint8_t* row_end = ahead + kTokens * ahead_stride; ahead < row_end; ahead += 64) fetch(ahead);
    __m256i acc[8];
    MSD_UNROLL for (int i = 0; i < 8; ++i) acc[i] = _mm256_setzero_si256();
    for (const int16_t* at = query; at != query + columns; at += 16) {
      __m256i k[kTokens];
      MSD_UNROLL for (int i = 0; i < kTokens; ++i) {
        k[i] = widen(key[i]);
        key[i] += 16;
      }
      MSD_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + r * columns));
        MSD_UNROLL for (int i = 0; i < kTokens; ++i) MSD_ADD_TO(acc[r * kTokens + i], _mm256_madd_epi16(q, k[i]));
      }
    }
    alignas(32) int32_t sums[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), sums_across(acc));
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      memcpy(products + r * kTile + t, sums + r * kTokens, sizeof(int32_t) * kTokens);
    }
  }
}

// Products of kRows rows of codes and 16 of what is packed in pairs, [pairs][2 vectors].
template <int kRows>
MSD_INNER void multiply_pairs(const int16_t* packed, int64_t pairs, const int16_t* codes, int64_t stride, int32_t* to,
                              int64_t to_stride) {
  __m256i acc[kRows][2];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  const auto* at = reinterpret_cast<const __m256i*>(packed);
  for (const __m256i* end = at + 2 * pairs; at != end; at += 2, codes += 2) {
    const __m256i w[2] = {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m256i q = broadcast_pair(codes + r * stride);
      MSD_ADD_TO(acc[r][0], _mm256_madd_epi16(w[0], q));
      MSD_ADD_TO(acc[r][1], _mm256_madd_epi16(w[1], q));
    }
  }
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * to_stride), acc[r][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * to_stride + 8), acc[r][1]);
  }
}

void multiply_all_rows(const int16_t* packed, int64_t pairs, const int16_t* codes, int64_t rows, int64_t stride,
                       int32_t* to, int64_t to_stride) {
  for (; rows >= 4; rows -= 4, codes += 4 * stride, to += 4 * to_stride) {
    multiply_pairs<4>(packed, pairs, codes, stride, to, to_stride);
  }
  if (rows == 3) multiply_pairs<3>(packed, pairs, codes, stride, to, to_stride);
  if (rows == 2) multiply_pairs<2>(packed, pairs, codes, stride, to, to_stride);
  if (rows == 1) multiply_pairs<1>(packed, pairs, codes, stride, to, to_stride);
}

// 16 tokens from `t` on: pairs of columns, [pair][token]. Beyond the last token the last one is repeated.
void pack_keys(const Tokens& keys, int t, __m256i* to) {
  const int8_t* key[16];
  for (int i = 0; i < 16; ++i) key[i] = keys.codes + (t + i < keys.end ? t + i : keys.end - 1) * keys.stride;
  for (int64_t c = 0; c < keys.columns; c += 16, to += 16) {
    __m256i pairs[8];
    transpose_pairs(key, c, pairs);
    for (int i = 0; i < 8; ++i) {
      _mm256_store_si256(to + 2 * i, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(pairs[i])));
      _mm256_store_si256(to + 2 * i + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(pairs[i], 1)));
    }
  }
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

// ---- Products of probabilities and values --------------------------------------------------------------------------

// Values of two tokens in 16 columns, as pairs: [columns 0..7 | 8..15].
inline void widen_pair(const int8_t* first, const int8_t* second, __m256i (&v)[2]) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
  v[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
  v[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
}

// Adds tokens [begin, end) to the sums of kRows rows in 16 * kParts columns, or begins with them if `is_first`. An odd
// last token is paired with itself: the second weight is 0.
template <int kRows, int kParts>
MSD_INNER void mix_columns(const int16_t* weights, const Tokens& values, int begin, int end, int64_t column,
                           bool is_first, int32_t* sums) {
  __m256i acc[kRows][2 * kParts];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int i = 0; i < 2 * kParts; ++i) {
      const auto* from = reinterpret_cast<const __m256i*>(sums + r * values.columns + column) + i;
      acc[r][i] = is_first ? _mm256_setzero_si256() : _mm256_loadu_si256(from);
    }
  }
  const int8_t* at = values.codes + begin * values.stride + column;
  const bool fetches = 2 * column % 64 == 0 && column < values.ahead_stride;  // two tokens' lines, once each
  for (int t = begin; t < end; t += 2, at += 2 * values.stride) {
    const int8_t* next = t + 1 < values.end ? at + values.stride : at;
    if (fetches) fetch(values.ahead + t * values.ahead_stride + 2 * column);
    MSD_UNROLL for (int part = 0; part < kParts; ++part) {
      __m256i v[2];
      widen_pair(at + 16 * part, next + 16 * part, v);
      MSD_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m256i w = broadcast_pair(weights + r * kTile + t);
        MSD_ADD_TO(acc[r][2 * part], _mm256_madd_epi16(v[0], w));
        MSD_ADD_TO(acc[r][2 * part + 1], _mm256_madd_epi16(v[1], w));
      }
    }
  }
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int i = 0; i < 2 * kParts; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * values.columns + column) + i, acc[r][i]);
    }
  }
}

template <int kRows, int kParts>
void mix_rows(const int16_t* weights, const Tokens& values, int32_t* sums) {
  for (int begin = values.begin; begin < values.end; begin += kBlock) {
    const int end = begin + kBlock < values.end ? begin + kBlock : values.end;
    const bool is_first = begin == values.begin;
    int64_t column = 0;
    for (; column + 16 * kParts <= values.columns; column += 16 * kParts) {
      mix_columns<kRows, kParts>(weights, values, begin, end, column, is_first, sums);
    }
    for (; column < values.columns; column += 16) {
      mix_columns<kRows, 1>(weights, values, begin, end, column, is_first, sums);
    }
  }
}

}  // namespace

float decompose_avx2(const Vector& x, int64_t padded, int16_t* codes) {
  switch (x.type) {
    case Real::kHalf:
      return decompose_row<Real::kHalf>(x, padded, codes);
    case Real::kBfloat16:
      return decompose_row<Real::kBfloat16>(x, padded, codes);
    default:
      return decompose_row<Real::kFloat>(x, padded, codes);
  }
}

float quantize_avx2(const Vector& x, int largest, int8_t* codes) {
  switch (x.type) {
    case Real::kHalf:
      return quantize_token<Real::kHalf>(x, largest, codes);
    case Real::kBfloat16:
      return quantize_token<Real::kBfloat16>(x, largest, codes);
    default:
      return quantize_token<Real::kFloat>(x, largest, codes);
  }
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
  if (rows > kFewRowsHere) {
    auto* packed = reinterpret_cast<__m256i*>(spare);
    for (int t = keys.begin; t < keys.end; t += 16) {
      pack_keys(keys, t, packed);
      multiply_all_rows(spare, keys.columns / 2, query, rows, keys.columns, products + t, kTile);
    }
    return;
  }
  for (; rows >= 4; rows -= 4, query += 4 * keys.columns, products += 4 * kTile) {
    dot_rows<4, 2>(query, keys, products);
  }
  if (rows == 3) dot_rows<3, 2>(query, keys, products);
  if (rows == 2) dot_rows<2, 4>(query, keys, products);
  if (rows == 1) dot_rows<1, 8>(query, keys, products);
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
  if (rows > kFewRowsHere) {
    const int64_t pairs = (values.end - values.begin + 1) / 2;
    for (int64_t column = 0; column < values.columns; column += 16) {
      auto* to = reinterpret_cast<__m256i*>(spare);
      for (int t = values.begin; t < values.end; t += 2, to += 2) {
        const int8_t* at = values.codes + t * values.stride + column;
        __m256i v[2];
        widen_pair(at, t + 1 < values.end ? at + values.stride : at, v);
        _mm256_store_si256(to, v[0]);
        _mm256_store_si256(to + 1, v[1]);
      }
      multiply_all_rows(spare, pairs, weights + values.begin, rows, kTile, sums + column, values.columns);
    }
    return;
  }
  for (; rows >= 4; rows -= 4, weights += 4 * kTile, sums += 4 * values.columns) {
    mix_rows<4, 1>(weights, values, sums);
  }
  if (rows == 3) mix_rows<3, 1>(weights, values, sums);
  if (rows == 2) mix_rows<2, 2>(weights, values, sums);
  if (rows == 1) mix_rows<1, 4>(weights, values, sums);
}

}  // namespace msd::attention
