// The plain loops: what every other variant must equal, and what runs where there is no other.

#include <math.h>

#include "kernel.h"

namespace msd::matmul {
namespace {

// Largest |x| of [begin, end) as float bits: they order like the magnitudes, Inf and NaN above all numbers.
uint32_t peak_bits(const void* a, Real type, int64_t begin, int64_t end) {
  uint32_t peak = 0;
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t magnitude = bits_of(load_real(a, i, type)) & 0x7fffffffu;
    peak = magnitude > peak ? magnitude : peak;
  }
  return peak;
}

// Codes of one group of one row, at most `plan.block_size` of them; the rest of the stride becomes 0.
template <typename T>
void decompose_group(const Plan& plan, const void* a, Real type, int64_t begin, int64_t count, uint32_t peak,
                     const Panel& panel, int64_t at) {
  const int planes = plan.terms == 3 ? 2 : 1;
  const int64_t plane = plan.groups * panel.rows;
  int16_t* high = panel.codes + at * plan.stride;
  int16_t* low = high + plane * plan.stride;
  memset(high, 0, sizeof(int16_t) * static_cast<size_t>(plan.stride));
  if (planes == 2) memset(low, 0, sizeof(int16_t) * static_cast<size_t>(plan.stride));

  const T limit = plan.terms == 1 ? T(127) : plan.terms == 2 ? T(32258) : T(8193532);
  T scale = T(0);
  int32_t sum_high = 0, sum_low = 0;
  if (peak >= kInfinity) {
    scale = static_cast<T>(NAN);
  } else if (peak >= kSmallestPeak) {
    const T largest = static_cast<T>(float_of(peak));
    const T inverse = limit / largest;
    scale = largest / limit;
    for (int64_t i = 0; i < count; ++i) {
      const T x = static_cast<T>(load_real(a, begin + i, type)) * inverse;
      const int32_t code = static_cast<int32_t>(rint(static_cast<double>(x)));
      if (planes == 1) {
        high[i] = static_cast<int16_t>(code);
        sum_high += code;
      } else {
        const int32_t rest = code & 255;
        high[i] = static_cast<int16_t>((code - rest) / 256);
        low[i] = static_cast<int16_t>(rest);
        sum_high += high[i];
        sum_low += rest;
      }
    }
  }
  panel.sums[at] = sum_high;
  if (planes == 2) {
    panel.sums[plane + at] = sum_low;
    panel.scales64[at] = static_cast<double>(scale);
  } else {
    panel.scales[at] = static_cast<float>(scale);
  }
}

template <typename Code>
void load_rows(const Plan& plan, const Codes& codes, const Panel& panel, int64_t first, int64_t last) {
  const Code* base = static_cast<const Code*>(codes.base);
  for (int64_t row = first; row < last; ++row) {
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t begin = g * plan.block_size, left = plan.k - begin;
      const int64_t count = left < plan.block_size ? left : plan.block_size;
      const int64_t at = g * panel.rows + row;
      int16_t* to = panel.codes + at * plan.stride;
      int32_t sum = 0;
      for (int64_t i = 0; i < plan.stride; ++i) {
        to[i] = i < count ? static_cast<int16_t>(base[row * plan.k + begin + i] - codes.center) : int16_t{0};
        sum += to[i];
      }
      panel.sums[at] = sum;
    }
  }
}

template <typename T>
T column(const Columns<T>& columns, int64_t tile, int64_t group, int c) {
  return columns.single ? columns.base[0] : columns.base[tile * columns.per_tile + group * columns.per_group + c];
}

// The numbers of a tile's group as w[k][c].
void unpack_group(const Plan& plan, const uint8_t* lines, int16_t (&w)[kLongestGroup][kTile]) {
  const int per_byte = 8 / plan.bits, mask = (1 << plan.bits) - 1;
  for (int line = 0; line < plan.lines; ++line, lines += kLine) {
    for (int u = 0; u < per_byte; ++u) {
      int16_t(*const quad)[kTile] = w + (line * per_byte + u) * kQuad;
      for (int c = 0; c < kTile; ++c) {
        for (int i = 0; i < kQuad; ++i) {
          const int code = (lines[kQuad * c + i] >> (u * plan.bits)) & mask;
          quad[i][c] = static_cast<int16_t>(plan.codebook == Codebook::kE2m1 ? kE2m1Numbers[code] : code);
        }
      }
    }
  }
}

// products[c] = sum of w * Q over a group. At most 256 * 255 * 32768 < 2^31.
void group_products(int count, const int16_t (&w)[kLongestGroup][kTile], const int16_t* codes,
                    int32_t (&products)[kTile]) {
  int32_t sums[kTile] = {};
  for (int k = 0; k < count; ++k) {
    const int16_t code = codes[k];
    for (int c = 0; c < kTile; ++c) sums[c] += w[k][c] * code;
  }
  memcpy(products, sums, sizeof sums);
}

// `T` is the type that sums are held in; one exact sum, below 2^53, is held in double.
template <typename T>
void multiply_tile(const Plan& plan, const Weight& weight, const Panel& panel, int64_t tile, const Output& output) {
  const int planes = plan.terms == 3 ? 2 : 1;
  const int64_t plane = plan.groups * panel.rows;
  T totals[kMostRows][kTile] = {};
  int16_t w[kLongestGroup][kTile];
  for (int64_t g = 0; g < plan.groups; ++g) {
    unpack_group(plan, weight.b + (tile * plan.groups + g) * plan.lines * kLine, w);
    int32_t column_sums[kTile] = {};
    if (panel.shift != 0) group_products(plan.block_size, w, panel.ones + g * plan.stride, column_sums);
    for (int64_t row = 0; row < panel.rows; ++row) {
      const int64_t at = g * panel.rows + row;
      int32_t products[2][kTile];
      for (int p = 0; p < planes; ++p) {
        group_products(plan.block_size, w, panel.codes + (p * plane + at) * plan.stride, products[p]);
      }
      int64_t code_sum = panel.sums[at];
      if (planes == 2) code_sum = 256 * code_sum + panel.sums[plane + at];
      if (panel.shift != 0) code_sum += int64_t{panel.shift} * panel.ones_sums[g];
      const T s_x = planes == 2 ? static_cast<T>(panel.scales64[at]) : static_cast<T>(panel.scales[at]);
      for (int c = 0; c < kTile; ++c) {
        int64_t product = products[0][c];
        if (planes == 2) product = 256 * product + products[1][c];
        product += int64_t{panel.shift} * column_sums[c];
        T v = static_cast<T>(product - column(weight.zero_points, tile, g, c) * code_sum);
        if (weight.has_offsets) v -= static_cast<T>(column(weight.offsets, tile, g, c)) * static_cast<T>(code_sum);
        const T p = s_x * static_cast<T>(column(weight.scales, tile, g, c));
        totals[row][c] += plan.is_one_sum ? v : v * p;
      }
    }
  }
  const int64_t first = tile * kTile;
  for (int64_t row = 0; row < panel.rows; ++row) {
    for (int64_t n = first; n < first + kTile && n < weight.n; ++n) {
      const int64_t index = row * weight.n + n;
      const T total = totals[row][n - first];
      if (plan.is_one_sum) {
        const float scale = panel.scales[row] * column(weight.scales, tile, 0, static_cast<int>(n - first));
        const float product = static_cast<float>(total) * scale;
        store_real(output, index, product + weight.bias[n]);
      } else {
        store_real(output, index, static_cast<float>(total + static_cast<T>(weight.bias[n])));
      }
    }
  }
}

}  // namespace

void decompose_scalar(const Plan& plan, const void* a, Real type, const Panel& panel, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * plan.k;
    const uint32_t row_peak = plan.per_row ? peak_bits(a, type, start, start + plan.k) : 0;
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t begin = start + g * plan.block_size;
      const int64_t left = plan.k - g * plan.block_size;
      const int64_t count = left < plan.block_size ? left : plan.block_size;
      const uint32_t peak = plan.per_row ? row_peak : peak_bits(a, type, begin, begin + count);
      const int64_t at = g * panel.rows + row;
      if (plan.terms == 3) {
        decompose_group<double>(plan, a, type, begin, count, peak, panel, at);
      } else {
        decompose_group<float>(plan, a, type, begin, count, peak, panel, at);
      }
    }
  }
}

void load_codes_scalar(const Plan& plan, const Codes& codes, const Panel& panel, int64_t first, int64_t last) {
  pick_code(codes.type, [&](auto code) { load_rows<decltype(code)>(plan, codes, panel, first, last); });
}

void multiply_scalar(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                     const Output& output) {
  for (int64_t tile = first; tile < last; ++tile) {
    if (plan.terms == 3 || plan.is_one_sum) {
      multiply_tile<double>(plan, weight, panel, tile, output);
    } else {
      multiply_tile<float>(plan, weight, panel, tile, output);
    }
  }
}

}  // namespace msd::matmul
