// The two products on 256-bit vectors, for avx2.cc and avxvnni.cc: int16 codes of queries and probabilities times int8
// codes of the cache.
//
// Few rows: the cache is widened in registers as it is read. A key's columns lie side by side, so each row and token
// has an accumulator, and eight of them are summed across at once; two tokens' values are interleaved, so that a pair
// meets a pair of probabilities. Many rows: a tile is widened and put into pairs once, in `spare`, and both products
// are the same loop over pairs, 4 rows by 16 tokens or columns at a time. The sums are the same integers.
//
// The file that includes this says how 16 products join 8 sums: MSD_ADD_PRODUCTS_TO. All of it is in an unnamed
// namespace: each file has its own, for its own instruction set.
#pragma once

#include <immintrin.h>

#include "../avx2.h"
#include "kernel.h"
#include "transpose.h"

namespace msd::attention {
namespace {

constexpr int64_t kFewRowsHere = 8;  // up to here widening for every four rows costs less than a buffer
constexpr int kBlock = 64;           // tokens whose values stay in the first cache while all columns are summed

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
        MSD_UNROLL for (int i = 0; i < kTokens; ++i) MSD_ADD_PRODUCTS_TO(acc[r * kTokens + i], q, k[i]);
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
      MSD_ADD_PRODUCTS_TO(acc[r][0], w[0], q);
      MSD_ADD_PRODUCTS_TO(acc[r][1], w[1], q);
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

void logits_256(const int16_t* query, int64_t rows, const Tokens& keys, int16_t* spare, int32_t* products) {
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
        MSD_ADD_PRODUCTS_TO(acc[r][2 * part], v[0], w);
        MSD_ADD_PRODUCTS_TO(acc[r][2 * part + 1], v[1], w);
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

void mix_256(const int16_t* weights, int64_t rows, const Tokens& values, int16_t* spare, int32_t* sums) {
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

}  // namespace
}  // namespace msd::attention
