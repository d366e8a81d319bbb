// NEON with dot products: int16 codes as two bytes each times weight codes through SDOT and UDOT, 16 columns of 1 or 2
// rows at a time.
//
// A vector of a weight line is one quad of K of four columns, which a dot product multiplies by a quad of codes. The
// digits of a code are its own bytes, high signed and low unsigned, for they must cover all of int16. Weights of up to
// 4 bits are both as well; those of 8 are taken as they are for the low digits and less 128 for the high ones:
//
//   sum of w * Q = 256 * sum of (w - 128) * high + sum of w * low + 32768 * sum of high
//
// The last sum, a row's own, is known from the start: a panel's `sums` hold those of the digits, 65536 * sum of high +
// sum of low, from which R follows. A group's low digits add up to at most 256 * 255 < 65536.

#include "../neondotprod.h"
#include "kernel.h"

namespace msd::matmul {
namespace {

// ---- Codes ---------------------------------------------------------------------------------------------------------

// Largest |x| as float bits, which order like the magnitudes with Inf and NaN on top.
template <Real kType>
uint32_t peak_bits(const void* a, int64_t begin, int64_t count) {
  uint32x4_t peak = vdupq_n_u32(0);
  for (int64_t i = 0; i < count; i += 4) {
    peak = vmaxq_u32(peak, magnitude_bits(load_up_to_4<kType>(a, begin + i, count - i)));
  }
  return vmaxvq_u32(peak);
}

// The digits of a row's group as they are written, and their sums.
struct Digits {
  explicit Digits(int16_t* codes) : to(codes) {}

  void store(const int16x8_t (&codes)[2]) {
    const int8x16_t high_digits = high_bytes(codes);
    const uint8x16_t low_digits = vreinterpretq_u8_s8(low_bytes(codes));
    high = vdotq_s32(high, high_digits, vdupq_n_s8(1));
    low = vdotq_u32(low, low_digits, vdupq_n_u8(1));
    vst1q_s8(reinterpret_cast<int8_t*>(to), high_digits);
    vst1q_u8(reinterpret_cast<uint8_t*>(to + kCodes / 2), low_digits);
    to += kCodes;
  }

  void store_zeros_to(const int16_t* end) {
    for (; to < end; to += 8) vst1q_s16(to, vdupq_n_s16(0));
  }

  int32_t sums() const { return vaddvq_s32(high) * 65536 + static_cast<int32_t>(vaddvq_u32(low)); }

  int16_t* to;
  int32x4_t high = vdupq_n_s32(0);
  uint32x4_t low = vdupq_n_u32(0);
};

// R, from the sums of the digits.
MSD_INLINE int32_t code_sum(int32_t sums) { return (sums >> 16) * 256 + (sums & 0xffff); }

// rint(x * inverse), as int32.
MSD_INLINE int32x4_t codes_of(float32x4_t x, float inverse) { return vcvtnq_s32_f32(vmulq_n_f32(x, inverse)); }

MSD_INLINE int32x4_t codes_of(float32x4_t x, double inverse) {
  const int64x2_t low = vcvtnq_s64_f64(vmulq_n_f64(vcvt_f64_f32(vget_low_f32(x)), inverse));
  const int64x2_t high = vcvtnq_s64_f64(vmulq_n_f64(vcvt_high_f64_f32(x), inverse));
  return vuzp1q_s32(vreinterpretq_s32_s64(low), vreinterpretq_s32_s64(high));
}

// `T` is the type of scales: float, or double for codes in two planes.
template <Real kType, typename T>
void decompose_group(const Plan& plan, const void* a, int64_t begin, int64_t count, uint32_t peak, const Panel& panel,
                     int64_t at) {
  constexpr bool kIsWide = sizeof(T) == sizeof(double);
  const int64_t plane = plan.groups * panel.rows;
  int16_t* const to = panel.codes + at * plan.stride;
  Digits high(to), low(to + plane * plan.stride);
  T scale = peak >= kInfinity ? static_cast<T>(float_of(0x7fc00000u)) : 0;
  if (peak >= kSmallestPeak && peak < kInfinity) {
    const T limit = plan.terms == 1 ? T(127) : plan.terms == 2 ? T(32258) : T(8193532);
    const T largest = static_cast<T>(float_of(peak)), inverse = limit / largest;
    scale = largest / limit;
    for (int64_t i = 0; i < count; i += kCodes) {
      int32x4_t codes[4];
      for (int64_t j = 0; j < 4; ++j) {
        codes[j] = codes_of(load_up_to_4<kType>(a, begin + i + 4 * j, count - i - 4 * j), inverse);
      }
      int16x8_t narrowed[2];
      if constexpr (kIsWide) {
        int32x4_t low_codes[4];
        for (int j = 0; j < 4; ++j) {
          low_codes[j] = vandq_s32(codes[j], vdupq_n_s32(255));
          codes[j] = vshrq_n_s32(codes[j], 8);
        }
        narrow(low_codes, narrowed);
        low.store(narrowed);
      }
      narrow(codes, narrowed);
      high.store(narrowed);
    }
  }
  high.store_zeros_to(to + plan.stride);
  panel.sums[at] = high.sums();
  if constexpr (kIsWide) {
    low.store_zeros_to(to + (plane + 1) * plan.stride);
    panel.sums[plane + at] = low.sums();
    panel.scales64[at] = scale;
  } else {
    panel.scales[at] = scale;
  }
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
      const int64_t at = g * panel.rows + row;
      if (plan.terms == 3) {
        decompose_group<kType, double>(plan, a, begin, count, peak, panel, at);
      } else {
        decompose_group<kType, float>(plan, a, begin, count, peak, panel, at);
      }
    }
  }
}

// Sixteen given codes less the center, which fit int16 and may therefore be taken modulo 65536.
template <typename Code>
void load_16(const Code* from, int16x8_t center, int16x8_t (&codes)[2]) {
  if constexpr (sizeof(Code) == 1) {
    const int8x16_t bytes = vld1q_s8(reinterpret_cast<const int8_t*>(from));
    if constexpr (static_cast<Code>(-1) < 0) {
      codes[0] = vmovl_s8(vget_low_s8(bytes));
      codes[1] = vmovl_high_s8(bytes);
    } else {
      codes[0] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(vreinterpretq_u8_s8(bytes))));
      codes[1] = vreinterpretq_s16_u16(vmovl_high_u8(vreinterpretq_u8_s8(bytes)));
    }
  } else {
    codes[0] = vld1q_s16(reinterpret_cast<const int16_t*>(from));
    codes[1] = vld1q_s16(reinterpret_cast<const int16_t*>(from) + 8);
  }
  for (int i = 0; i < 2; ++i) codes[i] = vsubq_s16(codes[i], center);
}

template <typename Code>
void load_rows(const Plan& plan, const Codes& codes, const Panel& panel, int64_t first, int64_t last) {
  const Code* base = static_cast<const Code*>(codes.base);
  const int16x8_t center = vdupq_n_s16(static_cast<int16_t>(codes.center));
  for (int64_t row = first; row < last; ++row) {
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t begin = g * plan.block_size, left = plan.k - begin;
      const int64_t count = left < plan.block_size ? left : plan.block_size;
      const int64_t at = g * panel.rows + row;
      const Code* from = base + row * plan.k + begin;
      int16_t* const to = panel.codes + at * plan.stride;
      Digits digits(to);
      int16x8_t sixteen[2];
      int64_t i = 0;
      for (; i + kCodes <= count; i += kCodes) {
        load_16(from + i, center, sixteen);
        digits.store(sixteen);
      }
      if (i < count) {
        int16_t tail[kCodes] = {};
        for (int64_t j = i; j < count; ++j) tail[j - i] = static_cast<int16_t>(from[j] - codes.center);
        for (int j = 0; j < 2; ++j) sixteen[j] = vld1q_s16(tail + 8 * j);
        digits.store(sixteen);
      }
      digits.store_zeros_to(to + plan.stride);
      panel.sums[at] = digits.sums();
    }
  }
}

// ---- Products ------------------------------------------------------------------------------------------------------

constexpr int kParts = kTile / 4;  // vectors of four columns; of 2 rows' sums there are 16

// Sixteen codes of a row.
struct RowDigits {
  int8x16_t high;
  uint8x16_t low;
};

// Sums of products of four columns.
struct Sums {
  int32x4_t high;
  uint32x4_t low;
};

// Adds quad number kQuad of the codes times a tile's weights.
template <bool kIsWide, int kQuad, int kRows>
MSD_INLINE void add_quad(const uint8x16_t (&w)[kParts], const RowDigits (&q)[kRows], Sums (&sums)[kRows][kParts]) {
  MSD_UNROLL for (int i = 0; i < kParts; ++i) {
    const uint8x16_t centered = kIsWide ? veorq_u8(w[i], vdupq_n_u8(128)) : w[i];
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      sums[r][i].high = vdotq_laneq_s32(sums[r][i].high, vreinterpretq_s8_u8(centered), q[r].high, kQuad);
      sums[r][i].low = vdotq_laneq_u32(sums[r][i].low, w[i], q[r].low, kQuad);
    }
  }
}

// Adds the quads of a line from bit kShift of its bytes on; kQuad is the first one's number.
template <Coding kCoding, int kShift, int kQuad, int kRows>
MSD_INLINE void add_line(const uint8x16_t (&line)[kParts], const RowDigits (&q)[kRows], Sums (&sums)[kRows][kParts]) {
  constexpr int kBits = code_bits(kCoding);
  uint8x16_t w[kParts];
  MSD_UNROLL for (int i = 0; i < kParts; ++i) {
    w[i] = line[i];
    if constexpr (kShift != 0) w[i] = vshrq_n_u8(w[i], kShift);
    if constexpr (kShift + kBits < 8) w[i] = vandq_u8(w[i], vdupq_n_u8((1 << kBits) - 1));
    if constexpr (kCoding == Coding::kE2m1) w[i] = vqtbl1q_u8(vld1q_u8(kE2m1Numbers), w[i]);
  }
  add_quad<kBits == 8, kQuad>(w, q, sums);
  if constexpr (kShift + kBits < 8) add_line<kCoding, kShift + kBits, kQuad + 1>(line, q, sums);
}

// Adds up to `count` lines, as many as meet sixteen codes; kQuad as above.
template <Coding kCoding, int kQuad, int kRows>
MSD_INLINE void add_lines(const uint8_t* lines, int64_t count, const RowDigits (&q)[kRows],
                          Sums (&sums)[kRows][kParts]) {
  constexpr int kNext = kQuad + 8 / code_bits(kCoding);
  uint8x16_t line[kParts];
  MSD_UNROLL for (int i = 0; i < kParts; ++i) line[i] = vld1q_u8(lines + 16 * i);
  add_line<kCoding, 0, kQuad>(line, q, sums);
  if constexpr (kNext < 4) {
    if (count > 1) add_lines<kCoding, kNext>(lines + kLine, count - 1, q, sums);
  }
}

// Sums of w * Q over a group, zero points not taken off, of kRows rows: to[r * kParts + i]. `code_sums`: of the rows'
// digits.
template <Coding kCoding, int kRows>
MSD_INNER void products_of_lines(const uint8_t* lines, int64_t count, const int16_t* codes, int64_t stride,
                                 const int32_t* code_sums, int32x4_t* to) {
  constexpr int kBits = code_bits(kCoding);
  constexpr int kLinesAtOnce = kCodes / (kQuad * (8 / kBits));
  Sums sums[kRows][kParts];
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    const uint32_t of_128 = kBits == 8 ? static_cast<uint32_t>(code_sums[r] >> 16) << 15 : 0;
    MSD_UNROLL for (int i = 0; i < kParts; ++i) sums[r][i] = {vdupq_n_s32(0), vdupq_n_u32(of_128)};
  }
  for (; count > 0; count -= kLinesAtOnce, lines += kLinesAtOnce * kLine, codes += kCodes) {
    RowDigits q[kRows];
    MSD_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto* digits = reinterpret_cast<const uint8_t*>(codes + r * stride);
      q[r] = {vreinterpretq_s8_u8(vld1q_u8(digits)), vld1q_u8(digits + kCodes)};
    }
    add_lines<kCoding, 0>(lines, count, q, sums);
  }
  MSD_UNROLL for (int r = 0; r < kRows; ++r) {
    MSD_UNROLL for (int i = 0; i < kParts; ++i) {
      to[r * kParts + i] = vaddq_s32(vshlq_n_s32(sums[r][i].high, 8), vreinterpretq_s32_u32(sums[r][i].low));
    }
  }
}

// What a tile's group holds once per column.
struct Group {
  const uint8_t* lines;
  int32x4_t zero_points[kParts];
  float32x4_t scales[kParts];
  float32x4_t offsets[kParts];
  int32x4_t shifts[kParts];  // what the shift of given codes adds to C
  int32_t code_shift;        // and to R
};

void load_columns(const Columns<float>& columns, int64_t tile, int64_t group, float32x4_t (&to)[kParts]) {
  const float* at = columns.base + (columns.single ? 0 : tile * columns.per_tile + group * columns.per_group);
  for (int i = 0; i < kParts; ++i) to[i] = columns.single ? vdupq_n_f32(*at) : vld1q_f32(at + 4 * i);
}

void load_columns(const Columns<uint8_t>& columns, int64_t tile, int64_t group, int32x4_t (&to)[kParts]) {
  const uint8_t* at = columns.base + (columns.single ? 0 : tile * columns.per_tile + group * columns.per_group);
  const uint8x16_t bytes = columns.single ? vdupq_n_u8(*at) : vld1q_u8(at);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  to[0] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low)));
  to[1] = vreinterpretq_s32_u32(vmovl_high_u16(low));
  to[2] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high)));
  to[3] = vreinterpretq_s32_u32(vmovl_high_u16(high));
}

// C of kRows rows. In between it may exceed int32, in the end it does not: right modulo 2^32.
template <Coding kCoding, int kRows>
void products(const Plan& plan, const Group& group, const int16_t* codes, const int32_t* sums, int32x4_t* to) {
  products_of_lines<kCoding, kRows>(group.lines, plan.lines, codes, plan.stride, sums, to);
  for (int r = 0; r < kRows; ++r) {
    const int32x4_t sum = vdupq_n_s32(code_sum(sums[r]));
    for (int i = 0; i < kParts; ++i) to[r * kParts + i] = vmlsq_s32(to[r * kParts + i], group.zero_points[i], sum);
  }
}

// The shift's part of C and R, into the group.
template <Coding kCoding>
void add_shift(const Plan& plan, const Panel& panel, int64_t g, Group& group) {
  int32x4_t column_sums[kParts];
  products<kCoding, 1>(plan, group, panel.ones + g * plan.stride, panel.ones_sums + g, column_sums);
  for (int i = 0; i < kParts; ++i) group.shifts[i] = vmulq_n_s32(column_sums[i], panel.shift);
  group.code_shift = panel.shift * code_sum(panel.ones_sums[g]);
}

// Two vectors of two numbers in double.
struct Doubles {
  MSD_INLINE static Doubles of(int32x4_t x) {
    return {vcvtq_f64_s64(vmovl_s32(vget_low_s32(x))), vcvtq_f64_s64(vmovl_high_s32(x))};
  }
  MSD_INLINE static Doubles of(float32x4_t x) { return {vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x)}; }
  MSD_INLINE static Doubles of(double x) { return {vdupq_n_f64(x), vdupq_n_f64(x)}; }
  MSD_INLINE static Doubles at(const double* from) { return {vld1q_f64(from), vld1q_f64(from + 2)}; }
  MSD_INLINE void store(double* to) const {
    vst1q_f64(to, low);
    vst1q_f64(to + 2, high);
  }
  MSD_INLINE Doubles operator+(Doubles b) const { return {vaddq_f64(low, b.low), vaddq_f64(high, b.high)}; }
  MSD_INLINE Doubles operator-(Doubles b) const { return {vsubq_f64(low, b.low), vsubq_f64(high, b.high)}; }
  MSD_INLINE Doubles operator*(Doubles b) const { return {vmulq_f64(low, b.low), vmulq_f64(high, b.high)}; }
  MSD_INLINE float32x4_t rounded() const { return vcvt_high_f32_f64(vcvt_f32_f64(low), high); }
  float64x2_t low, high;
};

// Adds a group to the totals of kRows rows. `at` numbers the first row's cell, group * rows + row.
template <Coding kCoding, int kRows>
void add_group(const Plan& plan, const Weight& weight, const Panel& panel, const Group& group, int64_t at,
               float* totals) {
  int32x4_t c[kRows * kParts];
  products<kCoding, kRows>(plan, group, panel.codes + at * plan.stride, panel.sums + at, c);
  for (int r = 0; r < kRows; ++r) {
    const auto sum = static_cast<float>(code_sum(panel.sums[at + r]) + group.code_shift);
    for (int i = 0; i < kParts; ++i) {
      float32x4_t v = vcvtq_f32_s32(vaddq_s32(c[r * kParts + i], group.shifts[i]));
      if (weight.has_offsets) v = vsubq_f32(v, vmulq_n_f32(group.offsets[i], sum));
      const float32x4_t p = vmulq_n_f32(group.scales[i], panel.scales[at + r]);
      float* total = totals + r * kTile + 4 * i;
      vst1q_f32(total, vaddq_f32(vld1q_f32(total), vmulq_f32(v, p)));
    }
  }
}

// The same in double: for codes in two planes, and of one exact sum C alone.
template <Coding kCoding, int kRows>
void add_group(const Plan& plan, const Weight& weight, const Panel& panel, const Group& group, int64_t at,
               double* totals) {
  int32x4_t high[kRows * kParts], low[kRows * kParts];
  products<kCoding, kRows>(plan, group, panel.codes + at * plan.stride, panel.sums + at, high);
  if (plan.is_one_sum) {
    for (int i = 0; i < kRows * kParts; ++i) {
      const Doubles sum = Doubles::of(vaddq_s32(high[i], group.shifts[i % kParts]));
      (Doubles::at(totals + 4 * i) + sum).store(totals + 4 * i);
    }
    return;
  }
  const int64_t plane = plan.groups * panel.rows;
  const int32_t* low_sums = panel.sums + plane + at;
  products<kCoding, kRows>(plan, group, panel.codes + (plane + at) * plan.stride, low_sums, low);
  for (int r = 0; r < kRows; ++r) {
    const Doubles s_x = Doubles::of(panel.scales64[at + r]);
    const Doubles sum = Doubles::of(256.0 * code_sum(panel.sums[at + r]) + code_sum(low_sums[r]));
    for (int i = 0; i < kParts; ++i) {
      // Exact: below 2^53.
      Doubles v = Doubles::of(high[r * kParts + i]) * Doubles::of(256.0) + Doubles::of(low[r * kParts + i]);
      if (weight.has_offsets) v = v - Doubles::of(group.offsets[i]) * sum;
      double* total = totals + r * kTile + 4 * i;
      (Doubles::at(total) + v * (s_x * Doubles::of(group.scales[i]))).store(total);
    }
  }
}

// A row of a tile: total + bias, as float.
void finish(const float* totals, const float* bias, float32x4_t (&y)[kParts]) {
  for (int i = 0; i < kParts; ++i) y[i] = vaddq_f32(vld1q_f32(totals + 4 * i), vld1q_f32(bias + 4 * i));
}

void finish(const double* totals, const float* bias, float32x4_t (&y)[kParts]) {
  for (int i = 0; i < kParts; ++i) {
    y[i] = (Doubles::at(totals + 4 * i) + Doubles::of(vld1q_f32(bias + 4 * i))).rounded();
  }
}

// One exact sum: float(total) * (s_x * s_w) + bias.
void finish_sum(const double* totals, const float* bias, float s_x, const float32x4_t (&scales)[kParts],
                float32x4_t (&y)[kParts]) {
  for (int i = 0; i < kParts; ++i) {
    const float32x4_t product = vmulq_f32(Doubles::at(totals + 4 * i).rounded(), vmulq_n_f32(scales[i], s_x));
    y[i] = vaddq_f32(product, vld1q_f32(bias + 4 * i));
  }
}

void store_tile(const float32x4_t (&y)[kParts], int64_t columns, const Output& output, int64_t index) {
  if (columns == kTile && output.type == Real::kFloat && output.precision == Real::kFloat) {
    for (int i = 0; i < kParts; ++i) vst1q_f32(static_cast<float*>(output.y) + index + 4 * i, y[i]);
  } else if (columns == kTile && output.type == Real::kHalf) {
    for (int i = 0; i < kParts; ++i) {
      const uint16x4_t rounded = vreinterpret_u16_f16(vcvt_f16_f32(y[i]));
      vst1_u16(static_cast<uint16_t*>(output.y) + index + 4 * i, rounded);
    }
  } else {
    float values[kTile];
    for (int i = 0; i < kParts; ++i) vst1q_f32(values + 4 * i, y[i]);
    for (int64_t c = 0; c < columns; ++c) store_real(output, index + c, values[c]);
  }
}

// `Total` is the type that sums are held in.
template <Coding kCoding, typename Total>
void multiply_tiles(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                    const Output& output) {
  alignas(64) Total totals[kMostRows * kTile];
  for (int64_t tile = first; tile < last; ++tile) {
    for (int64_t i = 0; i < panel.rows * kTile; ++i) totals[i] = 0;
    for (int64_t g = 0; g < plan.groups; ++g) {
      Group group;
      group.lines = weight.b + (tile * plan.groups + g) * plan.lines * kLine;
      load_columns(weight.zero_points, tile, g, group.zero_points);
      load_columns(weight.scales, tile, g, group.scales);
      load_columns(weight.offsets, tile, g, group.offsets);
      for (int i = 0; i < kParts; ++i) group.shifts[i] = vdupq_n_s32(0);
      group.code_shift = 0;
      if (panel.shift != 0) add_shift<kCoding>(plan, panel, g, group);
      const int64_t cell = g * panel.rows;
      int64_t row = 0;
      for (; row + 2 <= panel.rows; row += 2) {
        add_group<kCoding, 2>(plan, weight, panel, group, cell + row, totals + row * kTile);
      }
      if (row < panel.rows) add_group<kCoding, 1>(plan, weight, panel, group, cell + row, totals + row * kTile);
    }

    const int64_t column = tile * kTile, left = weight.n - column, columns = left < kTile ? left : kTile;
    float bias[kTile] = {};
    for (int64_t c = 0; c < columns; ++c) bias[c] = weight.bias[column + c];
    for (int64_t row = 0; row < panel.rows; ++row) {
      const Total* total = totals + row * kTile;
      float32x4_t y[kParts];
      if constexpr (sizeof(Total) == sizeof(double)) {
        if (plan.is_one_sum) {
          float32x4_t scales[kParts];
          load_columns(weight.scales, tile, 0, scales);
          finish_sum(total, bias, panel.scales[row], scales, y);
          store_tile(y, columns, output, row * weight.n + column);
          continue;
        }
      }
      finish(total, bias, y);
      store_tile(y, columns, output, row * weight.n + column);
    }
  }
}

template <Coding kCoding>
void multiply_coding(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                   const Output& output) {
  if (plan.terms == 3 || plan.is_one_sum) {
    multiply_tiles<kCoding, double>(plan, weight, panel, first, last, output);
  } else {
    multiply_tiles<kCoding, float>(plan, weight, panel, first, last, output);
  }
}

}  // namespace

void decompose_neondotprod(const Plan& plan, const void* a, Real type, const Panel& panel, int64_t first,
                           int64_t last) {
  pick_real(type, [&](auto real) { decompose_rows<real()>(plan, a, panel, first, last); });
}

void load_codes_neondotprod(const Plan& plan, const Codes& codes, const Panel& panel, int64_t first, int64_t last) {
  pick_code(codes.type, [&](auto code) { load_rows<decltype(code)>(plan, codes, panel, first, last); });
}

void multiply_neondotprod(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                          const Output& output) {
  pick_coding(plan, [&](auto coding) { multiply_coding<coding()>(plan, weight, panel, first, last, output); });
}

}  // namespace msd::matmul
