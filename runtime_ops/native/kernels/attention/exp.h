// e^x for x <= 0 as every variant computes it: x = n ln 2 + r, e^x = 2^n (1 + r + r^2 series(r)), to 1 ULP.
#pragma once

namespace msd::attention {

constexpr float kExpBelow = -87;  // of a smaller argument the result is 0: no subnormal arises
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first has 9 bits: its multiples are exact
constexpr float kExpSeries[5] = {0.0013814598f, 0.008368717f, 0.04166839f, 0.16666521f, 0.49999994f};

}  // namespace msd::attention
