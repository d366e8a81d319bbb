// e^x for x <= 0: the constants that every variant uses, and the function on one number.
//
// x = n ln 2 + r, e^x = 2^n (1 + r + r^2 series(r)); to 1 ULP. `static`: see ../real.h.
#pragma once

#include <math.h>

#include "../real.h"

namespace msd::attention {

constexpr float kExpBelow = -87;  // of a smaller argument the result is 0: no subnormal arises
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first has 9 bits: its multiples are exact
constexpr float kExpSeries[5] = {0.0013814598f, 0.008368717f, 0.04166839f, 0.16666521f, 0.49999994f};

static inline float exp_of(float x) {
  if (x < kExpBelow) return 0;
  if (!(x <= 0)) return x;  // NaN
  const float n = rintf(x * kLog2E);
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float series = kExpSeries[0];
  for (int i = 1; i < 5; ++i) series = series * r + kExpSeries[i];
  const float y = (series * (r * r) + r) + 1.0f;
  return float_of(bits_of(y) + (static_cast<uint32_t>(static_cast<int32_t>(n)) << 23));
}

}  // namespace msd::attention
