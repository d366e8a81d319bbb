// AVX-512 with VNNI: int16 codes times unsigned weight codes through vpdpwssd, which adds two products to a 32-bit sum.
// Codes are those of avx2.cc, in its order: a weight line is one vector, and a 32-bit lane of it one column's quad.
//
// Some rows of one or two tiles at a time go through all groups with their sums in registers; weights are widened on
// the fly, which is little beside the products of eight rows, and the zero point is taken off a group's sum.

#include <immintrin.h>

#include "../avx512vnni.h"
#include "kernel.h"

namespace msd::matmul {
namespace {

constexpr int kRowsAtOnce = 8;
constexpr int kTilesAtOnce = 2;
constexpr int kFewRows = 2, kTilesOfFewRows = 4;  // more tiles, for sums of few rows wait for each other
template <int kRows>
constexpr int kAhead = kRows == 1 ? 256 : 1024;  // bytes: how soon they are needed

// Number u of every byte of a line, of codes that a table decodes.
MSD_INLINE __m512i decoded(__m512i line, int u) {
  const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kE2m1Numbers));
  if (u != 0) line = _mm512_srli_epi16(line, 4);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(numbers), _mm512_and_si512(line, _mm512_set1_epi8(15)));
}

// A pair of k of 16 columns: number `pair` of a line's pairs. Pair 2u is the even bytes' code number u, pair 2u + 1 the
// odd bytes'.
template <Coding kCoding>
MSD_INLINE __m512i widened_pair(__m512i line, int pair) {
  if constexpr (kCoding == Coding::kE2m1) return widened_pair<Coding::kInt8>(decoded(line, pair / 2), pair % 2);
  constexpr int kBits = code_bits(kCoding);
  const int shift = pair % 2 * 8 + pair / 2 * kBits;
  if (shift != 0) line = _mm512_srli_epi16(line, shift);
  if (shift + kBits != 16) line = _mm512_and_si512(line, _mm512_set1_epi16((1 << kBits) - 1));
  return line;
}

// A group's codes as bytes, code = 256 * high + low, both signed: of each quad four high ones, then four low ones, in
// the order of k. Decomposed activations have such, for their codes end at 32258; given codes need not.
MSD_INLINE void split_codes(const int16_t* codes, int64_t count, int8_t* to) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 5, 3, 7, 0, 4, 2, 6, 9, 13, 11, 15, 8, 12, 10, 14));
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const __m256i high = _mm256_add_epi16(low, _mm256_set1_epi16(128));
    const __m256i bytes = _mm256_mask_blend_epi8(0xaaaaaaaau, low, high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i), _mm256_shuffle_epi8(bytes, order));
  }
}

// `add_products` of one row and weights that a table decodes: bytes times bytes. The table's two operations of a line
// are then paid by the four that would widen what it gives.
template <int kTiles>
MSD_INLINE void add_decoded_products(const uint8_t* lines, int64_t tile_step, int64_t count, const int16_t* codes,
                                     int64_t stride, __m512i (&acc)[1][kTiles]) {
  int8_t bytes[2 * kLongestGroup];
  split_codes(codes, stride, bytes);
  __m512i high[kTiles];
  MSD_UNROLL for (int t = 0; t < kTiles; ++t) high[t] = _mm512_setzero_si512();
  const int8_t* quad = bytes;
  for (const uint8_t* end = lines + count * kLine; lines != end; lines += kLine) {
    MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
      _mm_prefetch(reinterpret_cast<const char*>(lines + t * tile_step + kAhead<1>), _MM_HINT_T0);
    }
    MSD_UNROLL for (int u = 0; u < 2; ++u, quad += 8) {
      const __m512i q_high = broadcast_lane(quad), q_low = broadcast_lane(quad + 4);
      MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
        const __m512i w = decoded(_mm512_loadu_si512(lines + t * tile_step), u);
        MSD_ADD_BYTE_PRODUCTS_TO(high[t], w, q_high);
        MSD_ADD_BYTE_PRODUCTS_TO(acc[0][t], w, q_low);
      }
    }
  }
  MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
    acc[0][t] = _mm512_add_epi32(acc[0][t], _mm512_slli_epi32(high[t], 8));
  }
}

// Adds the products w * Q of a group, zero points not taken off, of kRows rows and kTiles tiles, whose lines lie
// `tile_step` apart.
template <Coding kCoding, int kRows, int kTiles>
MSD_INLINE void add_products(const uint8_t* lines, int64_t tile_step, int64_t count, const int16_t* codes,
                             int64_t stride, __m512i (&acc)[kRows][kTiles]) {
  if constexpr (kCoding == Coding::kE2m1 && kRows == 1) {
    return add_decoded_products(lines, tile_step, count, codes, stride, acc);
  }
  constexpr int kPairs = 16 / code_bits(kCoding);
  for (const uint8_t* end = lines + count * kLine; lines != end; lines += kLine, codes += 2 * kPairs) {
    __m512i line[kTiles];
    MSD_UNROLL for (int t = 0; t < kTiles; ++t) line[t] = _mm512_loadu_si512(lines + t * tile_step);
    // The processor's own prefetching stops at pages. Beyond the weight's end it asks in vain, which does no harm.
    MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
      _mm_prefetch(reinterpret_cast<const char*>(lines + t * tile_step + kAhead<kRows>), _MM_HINT_T0);
    }
    MSD_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
      __m512i w[kTiles];
      MSD_UNROLL for (int t = 0; t < kTiles; ++t) w[t] = widened_pair<kCoding>(line[t], pair);
      MSD_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m512i q = broadcast_pair(codes + r * stride + 2 * pair);
        MSD_UNROLL for (int t = 0; t < kTiles; ++t) MSD_ADD_PRODUCTS_TO(acc[r][t], w[t], q);
      }
    }
  }
}

MSD_INLINE __m512 load_columns(const Columns<float>& columns, int64_t tile, int64_t group) {
  if (columns.single) return _mm512_set1_ps(columns.base[0]);
  return _mm512_loadu_ps(columns.base + tile * columns.per_tile + group * columns.per_group);
}

MSD_INLINE __m512i load_columns(const Columns<uint8_t>& columns, int64_t tile, int64_t group) {
  if (columns.single) return _mm512_set1_epi32(columns.base[0]);
  const uint8_t* at = columns.base + tile * columns.per_tile + group * columns.per_group;
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// -z * R of a tile.
MSD_INLINE __m512i zero_point_part(const Weight& weight, int64_t tile, int64_t group, int32_t code_sum) {
  if (weight.zero_points.single) return _mm512_set1_epi32(-weight.zero_points.base[0] * code_sum);
  const __m512i zero_points = load_columns(weight.zero_points, tile, group);
  return _mm512_mullo_epi32(zero_points, _mm512_set1_epi32(-code_sum));
}

// What the shift of given codes adds to C: that many times the sum of w - z.
template <Coding kCoding>
MSD_INNER __m512i shift_part(const Plan& plan, const Weight& weight, const Panel& panel, const uint8_t* lines,
                             int64_t tile, int64_t g) {
  __m512i c[1][1] = {{zero_point_part(weight, tile, g, panel.ones_sums[g])}};
  add_products<kCoding, 1, 1>(lines, 0, plan.lines, panel.ones + g * plan.stride, plan.stride, c);
  return _mm512_mullo_epi32(c[0][0], _mm512_set1_epi32(panel.shift));
}

// C of a group. In between it may exceed int32, in the end it does not: right modulo 2^32.
template <Coding kCoding, int kRows, int kTiles>
MSD_INLINE void group_sums(const Plan& plan, const Weight& weight, const Panel& panel, int64_t tile, int64_t g,
                           int64_t at, __m512i (&c)[kRows][kTiles]) {
  const int64_t tile_step = plan.groups * plan.lines * kLine;
  const uint8_t* lines = weight.b + tile * tile_step + g * plan.lines * kLine;
  MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
    MSD_UNROLL for (int r = 0; r < kRows; ++r) c[r][t] = zero_point_part(weight, tile + t, g, panel.sums[at + r]);
  }
  add_products<kCoding>(lines, tile_step, plan.lines, panel.codes + at * plan.stride, plan.stride, c);
  if (panel.shift == 0) return;
  MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
    const __m512i shifted = shift_part<kCoding>(plan, weight, panel, lines + t * tile_step, tile + t, g);
    MSD_UNROLL for (int r = 0; r < kRows; ++r) c[r][t] = _mm512_add_epi32(c[r][t], shifted);
  }
}

void store_row(__m512 y, int64_t columns, const Output& output, int64_t index) {
  const auto mask = static_cast<__mmask16>((1u << columns) - 1);
  if (output.type == Real::kFloat && output.precision == Real::kFloat) {
    _mm512_mask_storeu_ps(static_cast<float*>(output.y) + index, mask, y);
  } else if (output.type == Real::kHalf) {
    const __m256i rounded = _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(output.y) + index, mask, rounded);
  } else {
    float values[kTile];
    _mm512_storeu_ps(values, y);
    for (int64_t c = 0; c < columns; ++c) store_real(output, index + c, values[c]);
  }
}

struct TileColumns {
  TileColumns(const Weight& weight, int64_t tile) : first(tile * kTile) {
    const int64_t left = weight.n - first;
    count = left < kTile ? left : kTile;
    bias = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), weight.bias + first);
  }
  int64_t first, count;
  __m512 bias;
};

// Rows [row, row + kRows) of the panel and tiles [tile, tile + kTiles): sums in float.
template <Coding kCoding, int kRows, int kTiles>
MSD_INNER void multiply_block(const Plan& plan, const Weight& weight, const Panel& panel, int64_t row, int64_t tile,
                              const Output& output) {
  __m512 totals[kRows][kTiles];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int t = 0; t < kTiles; ++t) totals[r][t] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < plan.groups; ++g) {
    const int64_t at = g * panel.rows + row;
    __m512i c[kRows][kTiles];
    group_sums<kCoding>(plan, weight, panel, tile, g, at, c);
    MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
      const __m512 scales = load_columns(weight.scales, tile + t, g);
      MSD_UNROLL for (int r = 0; r < kRows; ++r) {
        __m512 v = _mm512_cvtepi32_ps(c[r][t]);
        if (weight.has_offsets) {
          const int32_t code_sum = panel.sums[at + r] + (panel.shift != 0 ? panel.shift * panel.ones_sums[g] : 0);
          const __m512 offsets = load_columns(weight.offsets, tile + t, g);
          v = _mm512_sub_ps(v, _mm512_mul_ps(offsets, _mm512_set1_ps(static_cast<float>(code_sum))));
        }
        const __m512 p = _mm512_mul_ps(_mm512_set1_ps(panel.scales[at + r]), scales);
        totals[r][t] = _mm512_add_ps(totals[r][t], _mm512_mul_ps(v, p));
      }
    }
  }
  MSD_UNROLL for (int t = 0; t < kTiles; ++t) {
    const TileColumns columns(weight, tile + t);
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      store_row(_mm512_add_ps(totals[r][t], columns.bias), columns.count, output, (row + r) * weight.n + columns.first);
    }
  }
}

// Two vectors of eight columns in double.
struct Doubles {
  MSD_INLINE static Doubles of(__m512i x) {
    return {_mm512_cvtepi32_pd(_mm512_castsi512_si256(x)), _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(x, 1))};
  }
  MSD_INLINE static Doubles of(__m512 x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
  }
  MSD_INLINE static Doubles of(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
  MSD_INLINE Doubles operator+(Doubles b) const { return {_mm512_add_pd(low, b.low), _mm512_add_pd(high, b.high)}; }
  MSD_INLINE Doubles operator-(Doubles b) const { return {_mm512_sub_pd(low, b.low), _mm512_sub_pd(high, b.high)}; }
  MSD_INLINE Doubles operator*(Doubles b) const { return {_mm512_mul_pd(low, b.low), _mm512_mul_pd(high, b.high)}; }
  MSD_INLINE __m512 rounded() const {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
  }
  __m512d low, high;
};

// The same of codes in two planes: sums in double.
template <Coding kCoding, int kRows>
MSD_INNER void multiply_planes(const Plan& plan, const Weight& weight, const Panel& panel, int64_t row, int64_t tile,
                               const Output& output) {
  Doubles totals[kRows];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) totals[r] = Doubles::of(0.0);
  const int64_t plane = plan.groups * panel.rows;
  for (int64_t g = 0; g < plan.groups; ++g) {
    const int64_t at = g * panel.rows + row;
    __m512i high[kRows][1], low[kRows][1];
    group_sums<kCoding>(plan, weight, panel, tile, g, at, high);
    group_sums<kCoding>(plan, weight, panel, tile, g, plane + at, low);
    const Doubles scales = Doubles::of(load_columns(weight.scales, tile, g));
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      // Exact: below 2^53.
      Doubles v = Doubles::of(high[r][0]) * Doubles::of(256.0) + Doubles::of(low[r][0]);
      if (weight.has_offsets) {
        const double code_sum = 256.0 * panel.sums[at + r] + panel.sums[plane + at + r];
        v = v - Doubles::of(load_columns(weight.offsets, tile, g)) * Doubles::of(code_sum);
      }
      totals[r] = totals[r] + v * (Doubles::of(panel.scales64[at + r]) * scales);
    }
  }
  const TileColumns columns(weight, tile);
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    const __m512 y = (totals[r] + Doubles::of(columns.bias)).rounded();
    store_row(y, columns.count, output, (row + r) * weight.n + columns.first);
  }
}

// The same of given codes with one scale per column: one exact sum, held in double.
template <Coding kCoding, int kRows>
MSD_INNER void multiply_one_sum(const Plan& plan, const Weight& weight, const Panel& panel, int64_t row, int64_t tile,
                                const Output& output) {
  Doubles totals[kRows];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) totals[r] = Doubles::of(0.0);
  for (int64_t g = 0; g < plan.groups; ++g) {
    __m512i c[kRows][1];
    group_sums<kCoding>(plan, weight, panel, tile, g, g * panel.rows + row, c);
    MSD_UNROLL for (int r = 0; r < kRows; ++r) totals[r] = totals[r] + Doubles::of(c[r][0]);
  }
  const TileColumns columns(weight, tile);
  const __m512 scales = load_columns(weight.scales, tile, 0);
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(panel.scales[row + r]), scales);
    const __m512 y = _mm512_add_ps(_mm512_mul_ps(totals[r].rounded(), scale), columns.bias);
    store_row(y, columns.count, output, (row + r) * weight.n + columns.first);
  }
}

// All rows of the panel, kRows at a time; what is left over in halves.
template <Coding kCoding, int kRows, int kTiles>
void multiply_rows(const Plan& plan, const Weight& weight, const Panel& panel, int64_t row, int64_t tile,
                   const Output& output) {
  for (; row + kRows <= panel.rows; row += kRows) {
    if constexpr (kTiles > 1) {
      multiply_block<kCoding, kRows, kTiles>(plan, weight, panel, row, tile, output);
    } else if (plan.is_one_sum) {
      multiply_one_sum<kCoding, kRows>(plan, weight, panel, row, tile, output);
    } else if (plan.terms == 3) {
      multiply_planes<kCoding, kRows>(plan, weight, panel, row, tile, output);
    } else {
      multiply_block<kCoding, kRows, 1>(plan, weight, panel, row, tile, output);
    }
  }
  if constexpr (kRows > 1) {
    if (row < panel.rows) multiply_rows<kCoding, kRows / 2, kTiles>(plan, weight, panel, row, tile, output);
  }
}

template <Coding kCoding>
void multiply_coding(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                   const Output& output) {
  int64_t tile = first;
  if (plan.terms != 3 && !plan.is_one_sum) {
    if (panel.rows <= kFewRows) {
      for (; tile + kTilesOfFewRows <= last; tile += kTilesOfFewRows) {
        multiply_rows<kCoding, kFewRows, kTilesOfFewRows>(plan, weight, panel, 0, tile, output);
      }
    }
    for (; tile + kTilesAtOnce <= last; tile += kTilesAtOnce) {
      multiply_rows<kCoding, kRowsAtOnce, kTilesAtOnce>(plan, weight, panel, 0, tile, output);
    }
  }
  for (; tile < last; ++tile) multiply_rows<kCoding, kRowsAtOnce, 1>(plan, weight, panel, 0, tile, output);
}

}  // namespace

void multiply_avx512vnni(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                         const Output& output) {
  pick_coding(plan, [&](auto coding) { multiply_coding<coding()>(plan, weight, panel, first, last, output); });
}

}  // namespace msd::matmul
