// What kernels for NEON with dot products (SDOT, UDOT) share. Everything is in an unnamed namespace: each file has its
// own, for its own instruction set.
//
// A 16-bit code is two 8-bit digits, code = 256 * high + low, for a dot product takes bytes. Sixteen codes are 32 bytes
// in their own place: the high digits, then the low ones. A vector of them is four quads, four steps of the sum each,
// and a dot product takes any one of these against four quads of weights.
#pragma once

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "inner.h"
#include "real.h"

namespace msd {
namespace {

constexpr int kCodes = 16;  // of a vector of digits

// Four values from `index` on, as float.
template <Real kType>
MSD_INLINE float32x4_t load_4(const void* base, int64_t index) {
  if constexpr (kType == Real::kFloat) {
    return vld1q_f32(static_cast<const float*>(base) + index);
  } else {
    const uint16x4_t four = vld1_u16(static_cast<const uint16_t*>(base) + index);
    if constexpr (kType == Real::kHalf) return vcvt_f32_f16(vreinterpret_f16_u16(four));
    return vreinterpretq_f32_u32(vshll_n_u16(four, 16));
  }
}

// `count` values, no more than four; the rest 0.
template <Real kType>
inline float32x4_t load_up_to_4(const void* base, int64_t index, int64_t count) {
  if (count >= 4) return load_4<kType>(base, index);
  float values[4] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = load_real(base, index + i, kType);
  return vld1q_f32(values);
}

MSD_INLINE uint32x4_t magnitude_bits(float32x4_t x) { return vreinterpretq_u32_f32(vabsq_f32(x)); }

// Sixteen numbers that fit int16, four to a vector, as two vectors.
MSD_INLINE void narrow(const int32x4_t (&x)[4], int16x8_t (&to)[2]) {
  for (int i = 0; i < 2; ++i) {
    to[i] = vuzp1q_s16(vreinterpretq_s16_s32(x[2 * i]), vreinterpretq_s16_s32(x[2 * i + 1]));
  }
}

// The low bytes of sixteen int16, and the high ones.
MSD_INLINE int8x16_t low_bytes(const int16x8_t (&x)[2]) {
  return vuzp1q_s8(vreinterpretq_s8_s16(x[0]), vreinterpretq_s8_s16(x[1]));
}

MSD_INLINE int8x16_t high_bytes(const int16x8_t (&x)[2]) {
  return vuzp2q_s8(vreinterpretq_s8_s16(x[0]), vreinterpretq_s8_s16(x[1]));
}

}  // namespace
}  // namespace msd
