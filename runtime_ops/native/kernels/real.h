// float16 and bfloat16 from and to float, where there is no instruction for it. Rounds half to even; a NaN stays one.
//
// `static`, so that each file has its own copy (see matmul/kernel.h on inline functions).
#pragma once

#include <stdint.h>
#include <string.h>

namespace msd {

// Numbers of TensorProto.DataType.
enum class Real : int { kFloat = 1, kHalf = 10, kBfloat16 = 16 };

// Where an op's results go: y[index] of type `type`, holding values of `precision`, the op's output type. They differ
// where the runtime has a float16 node run in float.
struct Output {
  void* y;
  Real type;
  Real precision;
};

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, fraction = h & 1023u;
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
  return float_of(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

static inline uint16_t to_half(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, a = bits_of(x) & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u;
  } else if (a >= 0x477ff000u) {  // 65520, halfway from the largest half to the next power
    h = 0x7c00u;
  } else if (a >= 0x38800000u) {
    h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  } else if (a > 0x33000000u) {  // subnormal half: units of 2^-24
    const uint32_t shift = 126u - (a >> 23), fraction = (a & 0x7fffffu) | 0x800000u;
    const uint32_t below = fraction & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    h = fraction >> shift;
    h += (below > half || (below == half && (h & 1u) != 0)) ? 1u : 0u;
  } else {
    h = 0;
  }
  return static_cast<uint16_t>(sign | h);
}

static inline float from_bfloat16(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }

static inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float load_real(const void* base, int64_t index, Real type) {
  if (type == Real::kFloat) return static_cast<const float*>(base)[index];
  const uint16_t raw = static_cast<const uint16_t*>(base)[index];
  return type == Real::kHalf ? from_half(raw) : from_bfloat16(raw);
}

static inline void store_real(const Output& output, int64_t index, float x) {
  if (output.type == Real::kHalf) {
    static_cast<uint16_t*>(output.y)[index] = to_half(x);
  } else if (output.type == Real::kBfloat16) {
    static_cast<uint16_t*>(output.y)[index] = to_bfloat16(x);
  } else {
    if (output.precision == Real::kHalf) x = from_half(to_half(x));
    if (output.precision == Real::kBfloat16) x = from_bfloat16(to_bfloat16(x));
    static_cast<float*>(output.y)[index] = x;
  }
}

}  // namespace msd
