#include <arm_neon.h>

#include "loop.h"

namespace msd::limits {
namespace {

int32x4_t start(int number) { return vdupq_n_s32(number); }

int32_t number_of(int32x4_t sum) { return vgetq_lane_s32(sum, 0); }

}  // namespace

int32_t float32_neondotprod(int64_t rounds) {
  const float32x4_t one = vdupq_n_f32(1.0f);
  return in_turns(
      rounds, [](int number) { return vdupq_n_f32(static_cast<float>(number)); },
      [&](float32x4_t& sum) { sum = vfmaq_f32(sum, one, one); },
      [](float32x4_t sum) { return number_of(vreinterpretq_s32_f32(sum)); });
}

int32_t int16_neondotprod(int64_t rounds) {
  const int16x4_t w = vdup_n_s16(3);
  return in_turns(rounds, start, [&](int32x4_t& sum) { sum = vmlal_s16(sum, w, w); }, number_of);
}

int32_t int8_neondotprod(int64_t rounds) {
  const int8x16_t w = vdupq_n_s8(3);
  return in_turns(rounds, start, [&](int32x4_t& sum) { sum = vdotq_s32(sum, w, w); }, number_of);
}

}  // namespace msd::limits
