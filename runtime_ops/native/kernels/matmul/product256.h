// The product on 256-bit vectors, for avx2.cc and avxvnni.cc: 16 columns of 1 to 4 rows at a time.
//
// Few rows: weights widened on the fly, sums begin with the zero point's part, all groups of a tile in one loop. Many:
// widened once per group into a buffer, zero point taken off there. The sums are the same integers.
//
// The file that includes this says how 16 products join 8 sums: MSD_ADD_PRODUCTS_TO. All of it is in an unnamed
// namespace: each file has its own, for its own instruction set.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "../avx2.h"
#include "kernel.h"

namespace msd::matmul {
namespace {

constexpr int kRowsAtOnce = 4;
constexpr int kTilesOfOneRow = 4;
// Bytes that weights are asked for ahead. The processor's own prefetching stops at pages: one stream needs the next page,
// several keep it busy enough. Beyond the weight's end it asks in vain, which does no harm.
template <int kTiles>
constexpr int kAhead = kTiles == 1 ? 4096 : 256;
constexpr int64_t kFewRows = 8;  // up to here widening the weight for every four rows costs less than a buffer

// Number u of every byte of half a line, of codes that a table decodes.
inline __m256i decoded(__m256i bytes, int u) {
  const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kE2m1Numbers));
  if (u != 0) bytes = _mm256_srli_epi16(bytes, 4);
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(numbers), _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
}

// A pair of k of 16 columns, [columns 0..7 | 8..15]: number `pair` of a line's pairs, in the order that the codes have.
// Pair 2u is the even bytes' code number u, pair 2u + 1 the odd bytes'.
template <Coding kCoding>
inline void widen_pair(const __m256i (&line)[2], int pair, __m256i (&w)[2]) {
  if constexpr (kCoding == Coding::kE2m1) {
    const __m256i numbers[2] = {decoded(line[0], pair / 2), decoded(line[1], pair / 2)};
    return widen_pair<Coding::kInt8>(numbers, pair % 2, w);
  }
  constexpr int kBits = code_bits(kCoding);
  const __m256i mask = _mm256_set1_epi16((1 << kBits) - 1);
  const int shift = pair % 2 * 8 + pair / 2 * kBits;
  MSD_UNROLL for (int half = 0; half < 2; ++half) {
    w[half] = shift == 0 ? line[half] : _mm256_srli_epi16(line[half], shift);
    if (shift + kBits != 16) w[half] = _mm256_and_si256(w[half], mask);
  }
}

inline void load_line(const uint8_t* line, __m256i (&bytes)[2]) {
  bytes[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
  bytes[1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + 1);
}

// Adds the products w * Q of a group, zero points not taken off, of kRows rows and kTiles tiles, whose lines lie
// `tile_step` apart.
template <Coding kCoding, int kRows, int kTiles>
MSD_INLINE void add_products_of_lines(const uint8_t* lines, int64_t tile_step, int64_t count, const int16_t* codes,
                                      int64_t stride, __m256i (&acc)[kTiles][kRows][2]) {
  constexpr int kPairs = 16 / code_bits(kCoding);
  for (const uint8_t* end = lines + count * kLine; lines != end; lines += kLine, codes += 2 * kPairs) {
    MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
      __m256i line[2];
      load_line(lines + t * tile_step, line);
      _mm_prefetch(reinterpret_cast<const char*>(lines + t * tile_step + kAhead<kTiles>), _MM_HINT_T0);
      MSD_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
        __m256i w[2];
        widen_pair<kCoding>(line, pair, w);
        MSD_UNROLL for (int r = 0; r < kRows; ++r) {
          const __m256i q = broadcast_pair(codes + r * stride + 2 * pair);
          if constexpr (kRows == 1) {  // one row's sums would wait for each other where products and sum are one step
            MSD_ADD_TO(acc[t][r][0], _mm256_madd_epi16(w[0], q));
            MSD_ADD_TO(acc[t][r][1], _mm256_madd_epi16(w[1], q));
          } else {
            MSD_ADD_PRODUCTS_TO(acc[t][r][0], w[0], q);
            MSD_ADD_PRODUCTS_TO(acc[t][r][1], w[1], q);
          }
        }
      }
    }
  }
}

// Sums of w * Q over a group of kRows rows, weights from `widen_group`, which has taken the zero point off.
template <int kRows>
MSD_INNER void products_of_widened(const __m256i* widened, int64_t pairs, const int16_t* codes, int64_t stride,
                                   __m256i (&to)[kRows][2]) {
  __m256i acc[kRows][2];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (const __m256i* end = widened + 2 * pairs; widened != end; widened += 2, codes += 2) {
    const __m256i w[2] = {_mm256_load_si256(widened), _mm256_load_si256(widened + 1)};
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m256i q = broadcast_pair(codes + r * stride);
      MSD_ADD_PRODUCTS_TO(acc[r][0], w[0], q);
      MSD_ADD_PRODUCTS_TO(acc[r][1], w[1], q);
    }
  }
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    to[r][0] = acc[r][0];
    to[r][1] = acc[r][1];
  }
}

// -z * R. With the products it may exceed int32 in between, in the end it does not: right modulo 2^32.
MSD_INLINE void set_zero_point_part(const __m256i (&zero_points)[2], int32_t code_sum, __m256i (&acc)[2]) {
  const __m256i negative = _mm256_set1_epi32(-code_sum);
  for (int half = 0; half < 2; ++half) acc[half] = _mm256_mullo_epi32(zero_points[half], negative);
}

template <Coding kCoding, int kRows>
MSD_INNER void products_of_lines(const uint8_t* lines, int64_t count, const int16_t* codes, int64_t stride,
                                 __m256i (&to)[kRows][2]) {
  __m256i acc[1][kRows][2];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    acc[0][r][0] = to[r][0];
    acc[0][r][1] = to[r][1];
  }
  add_products_of_lines<kCoding>(lines, 0, count, codes, stride, acc);
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    to[r][0] = acc[0][r][0];
    to[r][1] = acc[0][r][1];
  }
}

// What a tile's group holds once per column, [columns 0..7 | 8..15].
struct Group {
  const uint8_t* lines;
  __m256i zero_points[2];
  __m256 scales[2];
  __m256 offsets[2];
  __m256i shifts[2];   // what the shift of given codes adds to C
  int32_t code_shift;  // and to R
};

__m256 load_columns(const Columns<float>& columns, int64_t tile, int64_t group, int half) {
  if (columns.single) return _mm256_set1_ps(columns.base[0]);
  return _mm256_loadu_ps(columns.base + tile * columns.per_tile + group * columns.per_group + 8 * half);
}

__m256i load_columns(const Columns<uint8_t>& columns, int64_t tile, int64_t group, int half) {
  if (columns.single) return _mm256_set1_epi32(columns.base[0]);
  const uint8_t* at = columns.base + tile * columns.per_tile + group * columns.per_group + 8 * half;
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}

template <Coding kCoding>
void widen_group(const Plan& plan, const Group& group, __m256i* to) {
  constexpr int kPairs = 16 / code_bits(kCoding);
  __m256i zero_pairs[2];
  for (int half = 0; half < 2; ++half) {
    zero_pairs[half] = _mm256_or_si256(group.zero_points[half], _mm256_slli_epi32(group.zero_points[half], 16));
  }
  for (int i = 0; i < plan.lines; ++i, to += 2 * kPairs) {
    __m256i line[2];
    load_line(group.lines + i * kLine, line);
    MSD_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
      __m256i w[2];
      widen_pair<kCoding>(line, pair, w);
      _mm256_store_si256(to + 2 * pair, _mm256_sub_epi16(w[0], zero_pairs[0]));
      _mm256_store_si256(to + 2 * pair + 1, _mm256_sub_epi16(w[1], zero_pairs[1]));
    }
  }
}

// C of kRows rows: from `widened` weights, or from the lines if it is null.
template <Coding kCoding, int kRows>
void products(const Plan& plan, const Group& group, const __m256i* widened, const int16_t* codes, const int32_t* sums,
              __m256i (&c)[kRows][2]) {
  if (widened != nullptr) {
    const int64_t pairs = (plan.block_size + kQuad - 1) / kQuad * 2;
    products_of_widened(widened, pairs, codes, plan.stride, c);
  } else {
    for (int r = 0; r < kRows; ++r) set_zero_point_part(group.zero_points, sums[r], c[r]);
    products_of_lines<kCoding>(group.lines, plan.lines, codes, plan.stride, c);
  }
}

// Adds a group to the totals of kRows rows. `at` numbers the first row's cell, group * rows + row.
template <Coding kCoding, int kRows>
void add_group(const Plan& plan, const Weight& weight, const Panel& panel, const Group& group, const __m256i* widened,
               int64_t at, float* totals) {
  __m256i c[kRows][2];
  products<kCoding>(plan, group, widened, panel.codes + at * plan.stride, panel.sums + at, c);
  for (int r = 0; r < kRows; ++r) {
    const __m256 s_x = _mm256_set1_ps(panel.scales[at + r]);
    for (int half = 0; half < 2; ++half) {
      __m256 v = _mm256_cvtepi32_ps(_mm256_add_epi32(c[r][half], group.shifts[half]));
      if (weight.has_offsets) {
        const __m256 sum = _mm256_set1_ps(static_cast<float>(panel.sums[at + r] + group.code_shift));
        v = _mm256_sub_ps(v, _mm256_mul_ps(group.offsets[half], sum));
      }
      const __m256 p = _mm256_mul_ps(s_x, group.scales[half]);
      float* total = totals + r * kTile + 8 * half;
      _mm256_store_ps(total, _mm256_add_ps(_mm256_load_ps(total), _mm256_mul_ps(v, p)));
    }
  }
}

// The shift's part of C and R, into the group.
template <Coding kCoding>
void add_shift(const Plan& plan, const Panel& panel, int64_t g, const __m256i* widened, Group& group) {
  __m256i column_sums[1][2];
  products<kCoding>(plan, group, widened, panel.ones + g * plan.stride, panel.ones_sums + g, column_sums);
  for (int half = 0; half < 2; ++half) {
    // Like C itself it may exceed int32 where the sum of both does not: right modulo 2^32.
    group.shifts[half] = _mm256_mullo_epi32(column_sums[0][half], _mm256_set1_epi32(panel.shift));
  }
  group.code_shift = panel.shift * panel.ones_sums[g];
}

// C alone, for one exact sum.
template <Coding kCoding, int kRows>
void add_exactly(const Plan& plan, const Panel& panel, const Group& group, const __m256i* widened, int64_t at,
                 double* totals) {
  __m256i c[kRows][2];
  products<kCoding>(plan, group, widened, panel.codes + at * plan.stride, panel.sums + at, c);
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      const __m256i sum = _mm256_add_epi32(c[r][half], group.shifts[half]);
      double* total = totals + r * kTile + 8 * half;
      const __m256d low = _mm256_cvtepi32_pd(_mm256_castsi256_si128(sum));
      const __m256d high = _mm256_cvtepi32_pd(_mm256_extracti128_si256(sum, 1));
      _mm256_store_pd(total, _mm256_add_pd(_mm256_load_pd(total), low));
      _mm256_store_pd(total + 4, _mm256_add_pd(_mm256_load_pd(total + 4), high));
    }
  }
}

// The same in double, for codes in two planes.
template <Coding kCoding, int kRows>
void add_group(const Plan& plan, const Weight& weight, const Panel& panel, const Group& group, const __m256i* widened,
               int64_t at, double* totals) {
  if (plan.is_one_sum) return add_exactly<kCoding, kRows>(plan, panel, group, widened, at, totals);
  const int64_t plane = plan.groups * panel.rows;
  __m256i high[kRows][2], low[kRows][2];
  products<kCoding>(plan, group, widened, panel.codes + at * plan.stride, panel.sums + at, high);
  products<kCoding>(plan, group, widened, panel.codes + (plane + at) * plan.stride, panel.sums + plane + at, low);
  const __m256d base = _mm256_set1_pd(256);
  for (int r = 0; r < kRows; ++r) {
    const __m256d s_x = _mm256_set1_pd(panel.scales64[at + r]);
    const __m256d sum = _mm256_set1_pd(256.0 * panel.sums[at + r] + panel.sums[plane + at + r]);
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int half = quarter / 2;
      const auto part_i = [quarter](__m256i x) {
        return quarter % 2 == 0 ? _mm256_castsi256_si128(x) : _mm256_extracti128_si256(x, 1);
      };
      const auto part_d = [quarter](__m256 x) {
        return _mm256_cvtps_pd(quarter % 2 == 0 ? _mm256_castps256_ps128(x) : _mm256_extractf128_ps(x, 1));
      };
      // Exact: below 2^53.
      __m256d v = _mm256_add_pd(_mm256_mul_pd(_mm256_cvtepi32_pd(part_i(high[r][half])), base),
                                _mm256_cvtepi32_pd(part_i(low[r][half])));
      if (weight.has_offsets) v = _mm256_sub_pd(v, _mm256_mul_pd(part_d(group.offsets[half]), sum));
      const __m256d p = _mm256_mul_pd(s_x, part_d(group.scales[half]));
      double* total = totals + r * kTile + 4 * quarter;
      _mm256_store_pd(total, _mm256_add_pd(_mm256_load_pd(total), _mm256_mul_pd(v, p)));
    }
  }
}

// Two vectors of 8 columns: total + bias, as float.
void finish(const float* totals, const float* bias, __m256 (&y)[2]) {
  for (int half = 0; half < 2; ++half) {
    y[half] = _mm256_add_ps(_mm256_load_ps(totals + 8 * half), _mm256_loadu_ps(bias + 8 * half));
  }
}

void finish(const double* totals, const float* bias, __m256 (&y)[2]) {
  for (int half = 0; half < 2; ++half) {
    __m128 parts[2];
    for (int i = 0; i < 2; ++i) {
      const __m256d b = _mm256_cvtps_pd(_mm_loadu_ps(bias + 8 * half + 4 * i));
      parts[i] = _mm256_cvtpd_ps(_mm256_add_pd(_mm256_load_pd(totals + 8 * half + 4 * i), b));
    }
    y[half] = _mm256_set_m128(parts[1], parts[0]);
  }
}

// One exact sum: float(total) * (s_x * s_w) + bias.
void finish_sum(const double* totals, const float* bias, float s_x, const __m256 (&scales)[2], __m256 (&y)[2]) {
  for (int half = 0; half < 2; ++half) {
    const __m128 low = _mm256_cvtpd_ps(_mm256_load_pd(totals + 8 * half));
    const __m128 high = _mm256_cvtpd_ps(_mm256_load_pd(totals + 8 * half + 4));
    const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(s_x), scales[half]);
    const __m256 product = _mm256_mul_ps(_mm256_set_m128(high, low), scale);
    y[half] = _mm256_add_ps(product, _mm256_loadu_ps(bias + 8 * half));
  }
}

void store_tile(const __m256 (&y)[2], int64_t columns, const Output& output, int64_t index) {
  if (columns == kTile && output.type == Real::kFloat && output.precision == Real::kFloat) {
    for (int half = 0; half < 2; ++half) _mm256_storeu_ps(static_cast<float*>(output.y) + index + 8 * half, y[half]);
  } else if (columns == kTile && output.type == Real::kHalf) {
    for (int half = 0; half < 2; ++half) {
      const __m128i rounded = _mm256_cvtps_ph(y[half], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(output.y) + index + 8 * half), rounded);
    }
  } else {
    float values[kTile];
    for (int half = 0; half < 2; ++half) _mm256_storeu_ps(values + 8 * half, y[half]);
    for (int64_t c = 0; c < columns; ++c) store_real(output, index + c, values[c]);
  }
}

struct TileColumns {
  TileColumns(const Weight& weight, int64_t tile) : first(tile * kTile), bias{} {
    const int64_t left = weight.n - first;
    count = left < kTile ? left : kTile;
    for (int64_t c = 0; c < count; ++c) bias[c] = weight.bias[first + c];
  }
  int64_t first, count;
  float bias[kTile];
};

// `Total` is the type that sums are held in.
template <Coding kCoding, typename Total>
void multiply_tiles(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                    const Output& output) {
  alignas(32) Total totals[kMostRows * kTile];
  __m256i buffer[kLongestGroup];  // 2 vectors for a pair of k
  const bool is_buffered = panel.rows > kFewRows;

  for (int64_t tile = first; tile < last; ++tile) {
    for (int64_t i = 0; i < panel.rows * kTile; ++i) totals[i] = 0;
    for (int64_t g = 0; g < plan.groups; ++g) {
      Group group;
      group.lines = weight.b + (tile * plan.groups + g) * plan.lines * kLine;
      for (int half = 0; half < 2; ++half) {
        group.zero_points[half] = load_columns(weight.zero_points, tile, g, half);
        group.scales[half] = load_columns(weight.scales, tile, g, half);
        group.offsets[half] = load_columns(weight.offsets, tile, g, half);
        group.shifts[half] = _mm256_setzero_si256();
      }
      group.code_shift = 0;
      if (is_buffered) widen_group<kCoding>(plan, group, buffer);
      const __m256i* widened = is_buffered ? buffer : nullptr;
      if (panel.shift != 0) add_shift<kCoding>(plan, panel, g, widened, group);
      const int64_t cell = g * panel.rows;
      int64_t row = 0;
      for (; row + kRowsAtOnce <= panel.rows; row += kRowsAtOnce) {
        add_group<kCoding, 4>(plan, weight, panel, group, widened, cell + row, totals + row * kTile);
      }
      switch (panel.rows - row) {
        case 3:
          add_group<kCoding, 3>(plan, weight, panel, group, widened, cell + row, totals + row * kTile);
          break;
        case 2:
          add_group<kCoding, 2>(plan, weight, panel, group, widened, cell + row, totals + row * kTile);
          break;
        case 1:
          add_group<kCoding, 1>(plan, weight, panel, group, widened, cell + row, totals + row * kTile);
          break;
        default:
          break;
      }
    }

    const TileColumns columns(weight, tile);
    for (int64_t row = 0; row < panel.rows; ++row) {
      __m256 result[2];
      if constexpr (std::is_same_v<Total, double>) {
        if (plan.is_one_sum) {
          const __m256 scales[2] = {load_columns(weight.scales, tile, 0, 0), load_columns(weight.scales, tile, 0, 1)};
          finish_sum(totals + row * kTile, columns.bias, panel.scales[row], scales, result);
          store_tile(result, columns.count, output, row * weight.n + columns.first);
          continue;
        }
      }
      finish(totals + row * kTile, columns.bias, result);
      store_tile(result, columns.count, output, row * weight.n + columns.first);
    }
  }
}

// Rows [row, row + kRows) of the panel and tiles [tile, tile + kTiles): weights widened on the fly, sums in registers.
template <Coding kCoding, int kRows, int kTiles>
MSD_INNER void multiply_few(const Plan& plan, const Weight& weight, const Panel& panel, int64_t row, int64_t tile,
                            const Output& output) {
  __m256 totals[kTiles][kRows][2];
  MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
    MSD_UNROLL for (int r = 0; r < kRows; ++r) totals[t][r][0] = totals[t][r][1] = _mm256_setzero_ps();
  }
  const int64_t tile_step = plan.groups * plan.lines * kLine;
  const uint8_t* lines = weight.b + tile * tile_step;
  for (int64_t g = 0; g < plan.groups; ++g, lines += plan.lines * kLine) {
    const int64_t at = g * panel.rows + row;
    __m256i c[kTiles][kRows][2];
    MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
      const __m256i zero_points[2] = {load_columns(weight.zero_points, tile + t, g, 0),
                                      load_columns(weight.zero_points, tile + t, g, 1)};
      MSD_UNROLL for (int r = 0; r < kRows; ++r) set_zero_point_part(zero_points, panel.sums[at + r], c[t][r]);
    }
    add_products_of_lines<kCoding>(lines, tile_step, plan.lines, panel.codes + at * plan.stride, plan.stride, c);
    MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
      MSD_UNROLL for (int half = 0; half < 2; ++half) {
        const __m256 scales = load_columns(weight.scales, tile + t, g, half);
        MSD_UNROLL for (int r = 0; r < kRows; ++r) {
          __m256 v = _mm256_cvtepi32_ps(c[t][r][half]);
          if (weight.has_offsets) {
            const __m256 offsets = load_columns(weight.offsets, tile + t, g, half);
            v = _mm256_sub_ps(v, _mm256_mul_ps(offsets, _mm256_set1_ps(static_cast<float>(panel.sums[at + r]))));
          }
          const __m256 p = _mm256_mul_ps(_mm256_set1_ps(panel.scales[at + r]), scales);
          totals[t][r][half] = _mm256_add_ps(totals[t][r][half], _mm256_mul_ps(v, p));
        }
      }
    }
  }
  MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
    const TileColumns columns(weight, tile + t);
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m256 y[2] = {_mm256_add_ps(totals[t][r][0], _mm256_loadu_ps(columns.bias)),
                           _mm256_add_ps(totals[t][r][1], _mm256_loadu_ps(columns.bias + 8))};
      store_tile(y, columns.count, output, (row + r) * weight.n + columns.first);
    }
  }
}

// All rows of the panel, kRows at a time; what is left over in halves.
template <Coding kCoding, int kRows, int kTiles>
void multiply_few_rows(const Plan& plan, const Weight& weight, const Panel& panel, int64_t row, int64_t tile,
                       const Output& output) {
  for (; row + kRows <= panel.rows; row += kRows) {
    multiply_few<kCoding, kRows, kTiles>(plan, weight, panel, row, tile, output);
  }
  if constexpr (kRows > 1) {
    if (row < panel.rows) multiply_few_rows<kCoding, kRows / 2, kTiles>(plan, weight, panel, row, tile, output);
  }
}

template <Coding kCoding>
void multiply_coding(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                   const Output& output) {
  if (plan.terms == 3 || plan.is_one_sum) {
    multiply_tiles<kCoding, double>(plan, weight, panel, first, last, output);
  } else if (panel.rows <= kFewRows && panel.shift == 0) {
    int64_t tile = first;
    if (panel.rows == 1) {
      for (; tile + kTilesOfOneRow <= last; tile += kTilesOfOneRow) {
        multiply_few<kCoding, 1, kTilesOfOneRow>(plan, weight, panel, 0, tile, output);
      }
    }
    for (; tile < last; ++tile) multiply_few_rows<kCoding, kRowsAtOnce, 1>(plan, weight, panel, 0, tile, output);
  } else {
    multiply_tiles<kCoding, float>(plan, weight, panel, first, last, output);
  }
}

void multiply_256(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                  const Output& output) {
  pick_coding(plan, [&](auto coding) { multiply_coding<coding()>(plan, weight, panel, first, last, output); });
}

}  // namespace
}  // namespace msd::matmul
