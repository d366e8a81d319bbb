// exp.h's function of one number, for files that are compiled for every machine.
#pragma once

#include <math.h>

#include "../real.h"
#include "exp.h"

namespace msd::attention {

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
