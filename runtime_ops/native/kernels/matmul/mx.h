// Activations in microscaling (MX) formats, as integer codes; ../../../matmul/mx.py says what they mean.
//
// Every variant multiplies such codes as any others, so there is one plain loop, for the op's own file, which is
// compiled for every machine. It makes codes in the order of K; the variant's own `load_codes` puts them into its own.
#pragma once

#include <math.h>

#include "kernel.h"

namespace msd::matmul {
namespace {

// A grid, and how often a value is rounded to it. Units are those of the grid: its values are integers.
struct Format {
  int mantissa_bits;
  float largest;  // of the grid; what is beyond becomes it
  float peak;     // the largest magnitude of a group is at most this
  float radix;    // by how much finer the second pass is; 0: there is none
};

Format format_of(ActivationFormat activation) {
  switch (activation) {
    case ActivationFormat::kMxfp4E1m2Twice:
      return {2, 7, 7.4375f, 16};
    case ActivationFormat::kMxfp4E1m2:
      return {2, 7, 7.4375f, 0};
    case ActivationFormat::kMxfp4E2m1Twice:
      return {1, 12, 8, 8};
    case ActivationFormat::kMxfp4E2m1:
      return {1, 12, 8, 0};
    default:
      return {3, 448 * 512, 448 * 512, 0};
  }
}

// 2^exponent, of a normal number.
float power_of_2(int exponent) { return float_of(static_cast<uint32_t>(exponent + 127) << 23); }

// e of the smallest 2^e with peak * 2^e >= largest, which is a normal number.
int unit_exponent(uint32_t largest, float peak) {
  const uint32_t limit = bits_of(peak), mantissa = 0x7fffffu;
  const int exponent = static_cast<int>(largest >> 23) - static_cast<int>(limit >> 23);
  return exponent + ((largest & mantissa) > (limit & mantissa) ? 1 : 0);
}

// The nearest value of the grid, halves to even.
float on_grid(float t, const Format& format) {
  const int exponent = static_cast<int>((bits_of(t) >> 23) & 255u) - 127 - format.mantissa_bits;
  const int step = exponent > 0 ? exponent : 0;
  const float value = rintf(t * power_of_2(-step)) * power_of_2(step);
  return value > format.largest ? format.largest : value < -format.largest ? -format.largest : value;
}

// The code of t, in units of the last pass.
int32_t code_of(float t, const Format& format) {
  const float first = on_grid(t, format);
  if (format.radix == 0) return static_cast<int32_t>(first);
  return static_cast<int32_t>(format.radix * first + on_grid((t - first) * format.radix, format));
}

// Codes of a group, high digits to `high` and, of codes in two planes, low ones to `low`. Returns its scale.
float decompose_group(const void* a, Real type, int64_t begin, int64_t count, const Format& format, int16_t* high,
                      int16_t* low) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(load_real(a, begin + i, type)) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool is_live = largest >= kSmallestPeak && largest < kInfinity;
  const int exponent = is_live ? unit_exponent(largest, format.peak) : 0;
  const float inverse = power_of_2(-exponent);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t code = is_live ? code_of(load_real(a, begin + i, type) * inverse, format) : 0;
    if (low == nullptr) {
      high[i] = static_cast<int16_t>(code);
    } else {
      low[i] = static_cast<int16_t>(code & 255);
      high[i] = static_cast<int16_t>((code - low[i]) / 256);
    }
  }
  if (!is_live) return largest >= kInfinity ? NAN : 0;
  return power_of_2(exponent) / (format.radix == 0 ? 1 : format.radix);
}

int planes_of(const Plan& plan) { return plan.terms == 3 ? 2 : 1; }

// Codes of a row that `decompose_mx` needs room for: [planes, k]; 0 for activations in INT8 terms.
int64_t natural_codes(const Plan& plan) {
  return plan.activation == ActivationFormat::kInt8 ? 0 : planes_of(plan) * plan.k;
}

// As a variant's `decompose`, for a plan with an MX format. `natural`: room for the codes of all rows of the panel.
void decompose_mx(const Plan& plan, LoadCodes load_codes, const void* a, Real type, int16_t* natural,
                  const Panel& panel, int64_t first, int64_t last) {
  const Format format = format_of(plan.activation);
  const int planes = planes_of(plan);
  const int64_t plane = plan.groups * panel.rows;
  for (int64_t row = first; row < last; ++row) {
    int16_t* const high = natural + row * planes * plan.k;
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t begin = g * plan.block_size, left = plan.k - begin;
      const int64_t count = left < plan.block_size ? left : plan.block_size;
      int16_t* const low = planes == 2 ? high + plan.k + begin : nullptr;
      const float scale = decompose_group(a, type, row * plan.k + begin, count, format, high + begin, low);
      if (planes == 2) {
        panel.scales64[g * panel.rows + row] = scale;
      } else {
        panel.scales[g * panel.rows + row] = scale;
      }
    }
    for (int p = 0; p < planes; ++p) {
      Panel from_row = panel;
      from_row.codes += (p * plane + row) * plan.stride;
      from_row.sums += p * plane + row;
      load_codes(plan, {high + p * plan.k, CodeType::kInt16, 0}, from_row, 0, 1);
    }
  }
}

}  // namespace
}  // namespace msd::matmul
