// AVX-512 with VNNI: the two products, int16 codes of queries and probabilities times int8 codes of the cache through
// vpdpwssd. Codes are made by avx2.cc.
//
// Few rows: the cache is widened in registers as it is read. A key's columns lie side by side, so each row and token
// has an accumulator, and sixteen of them are summed across at once; two tokens' values are interleaved, so that a pair
// meets a pair of probabilities. Many rows: a tile is widened and put into pairs once, in `spare`, and both products
// are the same loop over pairs, 8 rows by 32 tokens or columns at a time. The sums are the same integers.

#include <immintrin.h>

#include "../avx512vnni.h"
#include "kernel.h"
#include "transpose.h"

namespace msd::attention {
namespace {

constexpr int64_t kFewRowsHere = 8;  // up to here widening for every four rows costs less than a buffer
constexpr int kBlock = 64;           // tokens whose values stay in the first cache while all columns are summed

inline __m128i load_16(const int8_t* codes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)); }
inline __m256i load_32(const int8_t* codes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)); }

// As in avx2.cc: each line once, and spread as evenly as the work.
inline void fetch(const uint8_t* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1); }

// ---- Many rows: both products ---------------------------------------------------------------------------------------

// Products of kRows rows of codes and 16 * kParts of what is packed in pairs, [part][pair][16].
template <int kRows, int kParts>
MSD_INNER void multiply_pairs(const __m512i* packed, int64_t pairs, const int16_t* codes, int64_t stride, int32_t* to,
                              int64_t to_stride) {
  __m512i acc[kRows][kParts];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int i = 0; i < kParts; ++i) acc[r][i] = _mm512_setzero_si512();
  }
  for (const __m512i* end = packed + pairs; packed != end; ++packed, codes += 2) {
    __m512i w[kParts];
    MSD_UNROLL for (int i = 0; i < kParts; ++i) w[i] = _mm512_load_si512(packed + i * pairs);
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512i q = broadcast_pair(codes + r * stride);
      MSD_UNROLL for (int i = 0; i < kParts; ++i) MSD_ADD_PRODUCTS_TO(acc[r][i], w[i], q);
    }
  }
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int i = 0; i < kParts; ++i) _mm512_storeu_si512(to + r * to_stride + 16 * i, acc[r][i]);
  }
}

// All rows, kRows at a time; what is left over in halves.
template <int kRows, int kParts>
void multiply_rows(const __m512i* packed, int64_t pairs, const int16_t* codes, int64_t rows, int64_t stride,
                   int32_t* to, int64_t to_stride) {
  for (; rows >= kRows; rows -= kRows, codes += kRows * stride, to += kRows * to_stride) {
    multiply_pairs<kRows, kParts>(packed, pairs, codes, stride, to, to_stride);
  }
  if constexpr (kRows > 1) {
    if (rows > 0) multiply_rows<kRows / 2, kParts>(packed, pairs, codes, rows, stride, to, to_stride);
  }
}

void multiply_parts(const __m512i* packed, int64_t parts, int64_t pairs, const int16_t* codes, int64_t rows,
                    int64_t stride, int32_t* to, int64_t to_stride) {
  for (; parts >= 2; parts -= 2, packed += 2 * pairs, to += 32) {
    multiply_rows<8, 2>(packed, pairs, codes, rows, stride, to, to_stride);
  }
  if (parts == 1) multiply_rows<8, 1>(packed, pairs, codes, rows, stride, to, to_stride);
}

// 16 tokens from `t` on: pairs of columns, [pair][token]. Beyond the last token the last one is repeated.
void pack_keys(const Tokens& keys, int t, __m512i* to) {
  const int8_t* key[16];
  for (int i = 0; i < 16; ++i) key[i] = keys.codes + (t + i < keys.end ? t + i : keys.end - 1) * keys.stride;
  for (int64_t c = 0; c < keys.columns; c += 16, to += 8) {
    __m256i pairs[8];
    transpose_pairs(key, c, pairs);
    for (int i = 0; i < 8; ++i) _mm512_store_si512(to + i, _mm512_cvtepi8_epi16(pairs[i]));
  }
}

// 16 columns of all tokens: pairs of tokens, [pair][column]. An odd last token is paired with itself.
void pack_values(const Tokens& values, int64_t column, __m512i* to) {
  for (int t = values.begin; t < values.end; t += 2, ++to) {
    const int8_t* at = values.codes + t * values.stride + column;
    const __m128i a = load_16(at), b = t + 1 < values.end ? load_16(at + values.stride) : a;
    _mm512_store_si512(to, _mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b))));
  }
}

// ---- Few rows: queries and keys -------------------------------------------------------------------------------------

// Sixteen accumulators, each summed across.
inline __m512i sums_across(const __m512i (&acc)[16]) {
  __m512i four[4];  // of four accumulators, in each quarter a part of the sums
  MSD_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512i a = acc[4 * i], b = acc[4 * i + 1], c = acc[4 * i + 2], d = acc[4 * i + 3];
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  const auto halved = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  return halved(halved(four[0], four[1]), halved(four[2], four[3]));
}

// kRows rows, kTokens tokens at a time; beyond the last token the last one is repeated.
template <int kRows, int kTokens>
MSD_INNER void dot_rows(const int16_t* query, const Tokens& keys, int32_t* products) {
  static_assert(kRows * kTokens <= 16 && kTile % kTokens == 0);
  const int64_t columns = keys.columns, stride = keys.stride, ahead_stride = keys.ahead_stride;
  const int end = keys.end;
  const uint8_t* ahead = keys.ahead + keys.begin * ahead_stride;
  const int8_t* first = keys.codes + keys.begin * stride;
  for (int t = keys.begin; t < end; t += kTokens, first += kTokens * stride) {
    const int8_t* key[kTokens];
    key[0] = first;
    MSD_UNROLL for (int i = 1; i < kTokens; ++i) key[i] = t + i < end ? key[i - 1] + stride : key[i - 1];
    for (const uint8_t* row_end = ahead + kTokens * ahead_stride; ahead < row_end; ahead += 64) fetch(ahead);
    __m512i acc[16];
    MSD_UNROLL for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_si512();
    int64_t c = 0;
    for (; c + 32 <= columns; c += 32) {
      __m512i k[kTokens];
      MSD_UNROLL for (int i = 0; i < kTokens; ++i) k[i] = _mm512_cvtepi8_epi16(load_32(key[i] + c));
      MSD_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m512i q = _mm512_loadu_si512(query + r * columns + c);
        MSD_UNROLL for (int i = 0; i < kTokens; ++i) MSD_ADD_PRODUCTS_TO(acc[r * kTokens + i], q, k[i]);
      }
    }
    if (c < columns) {
      MSD_UNROLL for (int r = 0; r < kRows; ++r) {
        const auto* at = reinterpret_cast<const __m256i*>(query + r * columns + c);
        const __m512i q = _mm512_zextsi256_si512(_mm256_loadu_si256(at));
        MSD_UNROLL for (int i = 0; i < kTokens; ++i) {
          const __m512i k = _mm512_zextsi256_si512(_mm256_cvtepi8_epi16(load_16(key[i] + c)));
          MSD_ADD_PRODUCTS_TO(acc[r * kTokens + i], q, k);
        }
      }
    }
    alignas(64) int32_t sums[16];
    _mm512_store_si512(sums, sums_across(acc));
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      memcpy(products + r * kTile + t, sums + r * kTokens, sizeof(int32_t) * kTokens);
    }
  }
}

// ---- Few rows: probabilities and values -----------------------------------------------------------------------------

// 32 columns as two vectors, [0..7, 16..23] and [8..15, 24..31], as interleaving leaves them: there and back.
inline void regroup(__m512i& a, __m512i& b) {
  const __m512i low = _mm512_shuffle_i64x2(a, b, 0x44);
  b = _mm512_shuffle_i64x2(a, b, 0xee);
  a = low;
}

// Adds tokens [begin, end) to the sums of kRows rows in 32 * kParts columns, or begins with them if `is_first`. An odd
// last token is paired with itself: the second weight is 0.
template <int kRows, int kParts>
MSD_INNER void mix_columns(const int16_t* weights, const Tokens& values, int begin, int end, int64_t column,
                           bool is_first, int32_t* sums) {
  __m512i acc[kRows][kParts][2];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int i = 0; i < kParts; ++i) {
      const int32_t* from = sums + r * values.columns + column + 32 * i;
      acc[r][i][0] = is_first ? _mm512_setzero_si512() : _mm512_loadu_si512(from);
      acc[r][i][1] = is_first ? _mm512_setzero_si512() : _mm512_loadu_si512(from + 16);
      regroup(acc[r][i][0], acc[r][i][1]);
    }
  }
  const int8_t* at = values.codes + begin * values.stride + column;
  for (int t = begin; t < end; t += 2, at += 2 * values.stride) {
    const int8_t* next = t + 1 < values.end ? at + values.stride : at;
    __m512i v[kParts][2];
    MSD_UNROLL for (int i = 0; i < kParts; ++i) {
      const int64_t c = column + 32 * i;
      if (c < values.ahead_stride) fetch(values.ahead + t * values.ahead_stride + 2 * c);  // two tokens' lines
      const __m256i a = load_32(at + 32 * i), b = load_32(next + 32 * i);
      v[i][0] = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a, b));
      v[i][1] = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a, b));
    }
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512i w = broadcast_pair(weights + r * kTile + t);
      MSD_UNROLL for (int i = 0; i < kParts; ++i) {
        MSD_ADD_PRODUCTS_TO(acc[r][i][0], v[i][0], w);
        MSD_ADD_PRODUCTS_TO(acc[r][i][1], v[i][1], w);
      }
    }
  }
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int i = 0; i < kParts; ++i) {
      int32_t* to = sums + r * values.columns + column + 32 * i;
      regroup(acc[r][i][0], acc[r][i][1]);
      _mm512_storeu_si512(to, acc[r][i][0]);
      _mm512_storeu_si512(to + 16, acc[r][i][1]);
    }
  }
}

// The last 16 columns, where there is an odd number of them.
template <int kRows>
MSD_INNER void mix_last_columns(const int16_t* weights, const Tokens& values, int32_t* sums) {
  const int64_t column = values.columns - 16;
  __m512i acc[kRows];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_si512();
  for (int t = values.begin; t < values.end; t += 2) {
    const int8_t* at = values.codes + t * values.stride + column;
    const __m128i a = load_16(at), b = t + 1 < values.end ? load_16(at + values.stride) : a;
    const __m512i v = _mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
    MSD_UNROLL for (int r = 0; r < kRows; ++r) MSD_ADD_PRODUCTS_TO(acc[r], v, broadcast_pair(weights + r * kTile + t));
  }
  MSD_UNROLL for (int r = 0; r < kRows; ++r) _mm512_storeu_si512(sums + r * values.columns + column, acc[r]);
}

template <int kRows, int kParts>
void mix_rows(const int16_t* weights, const Tokens& values, int32_t* sums) {
  for (int begin = values.begin; begin < values.end; begin += kBlock) {
    const int end = begin + kBlock < values.end ? begin + kBlock : values.end;
    const bool is_first = begin == values.begin;
    int64_t column = 0;
    for (; column + 32 * kParts <= values.columns; column += 32 * kParts) {
      mix_columns<kRows, kParts>(weights, values, begin, end, column, is_first, sums);
    }
    for (; column + 32 <= values.columns; column += 32) {
      mix_columns<kRows, 1>(weights, values, begin, end, column, is_first, sums);
    }
  }
  if (values.columns % 32 != 0) mix_last_columns<kRows>(weights, values, sums);
}

}  // namespace

void logits_avx512vnni(const int16_t* query, int64_t rows, const Tokens& keys, int16_t* spare, int32_t* products) {
  if (rows > kFewRowsHere) {
    auto* packed = reinterpret_cast<__m512i*>(spare);
    const int64_t pairs = keys.columns / 2;
    int64_t parts = 0;
    for (int t = keys.begin; t < keys.end; t += 16, ++parts) pack_keys(keys, t, packed + parts * pairs);
    return multiply_parts(packed, parts, pairs, query, rows, keys.columns, products + keys.begin, kTile);
  }
  for (; rows >= 4; rows -= 4, query += 4 * keys.columns, products += 4 * kTile) {
    dot_rows<4, 4>(query, keys, products);
  }
  if (rows == 3) dot_rows<3, 4>(query, keys, products);
  if (rows == 2) dot_rows<2, 8>(query, keys, products);
  if (rows == 1) dot_rows<1, 8>(query, keys, products);
}

void mix_avx512vnni(const int16_t* weights, int64_t rows, const Tokens& values, int16_t* spare, int32_t* sums) {
  if (rows > kFewRowsHere) {
    auto* packed = reinterpret_cast<__m512i*>(spare);
    const int64_t pairs = (values.end - values.begin + 1) / 2, parts = values.columns / 16;
    for (int64_t part = 0; part < parts; ++part) pack_values(values, 16 * part, packed + part * pairs);
    return multiply_parts(packed, parts, pairs, weights + values.begin, rows, kTile, sums, values.columns);
  }
  for (; rows >= 4; rows -= 4, weights += 4 * kTile, sums += 4 * values.columns) {
    mix_rows<4, 2>(weights, values, sums);
  }
  if (rows == 3) mix_rows<3, 2>(weights, values, sums);
  if (rows == 2) mix_rows<2, 2>(weights, values, sums);
  if (rows == 1) mix_rows<1, 4>(weights, values, sums);
}

}  // namespace msd::attention
