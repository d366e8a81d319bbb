// The plain loops: what every other variant must equal, and what runs where there is no other.

#include <math.h>

#include "exp_of.h"
#include "kernel.h"

namespace msd::attention {
namespace {

constexpr float kMinusInfinity = -INFINITY;

float scaled(const Vector& v, int64_t i) {
  const float x = load_real(v.x, i, v.type);
  return v.scales == nullptr ? x : x * v.scales[i * v.scale_step];
}

// Largest |x * scale| as float bits.
uint32_t peak_bits(const Vector& v) {
  uint32_t peak = 0;
  for (int64_t i = 0; i < v.count; ++i) {
    const uint32_t magnitude = bits_of(scaled(v, i)) & 0x7fffffffu;
    peak = magnitude > peak ? magnitude : peak;
  }
  return peak;
}

// Codes of a whole row by its peak; returns the value of a code.
template <typename Code>
float codes_of(const Vector& v, float limit, Code* codes) {
  const uint32_t peak = peak_bits(v);
  const bool is_live = peak >= kSmallestPeak && peak < kInfinity;
  const float inverse = is_live ? limit / float_of(peak) : 0;
  for (int64_t i = 0; i < v.count; ++i) {
    codes[i] = is_live ? static_cast<Code>(rintf(scaled(v, i) * inverse)) : Code{0};
  }
  return is_live ? float_of(peak) / limit : float_of(peak >= kInfinity ? kNan : 0);
}

float soft_cap(float s, float cap, float inverse) {
  const float x = s * inverse;
  const float e = exp_of(-2.0f * fabsf(x));
  return copysignf(cap * ((1.0f - e) / (1.0f + e)), x);
}

}  // namespace

float decompose_scalar(const Vector& x, int64_t padded, int16_t* codes) {
  for (int64_t i = x.count; i < padded; ++i) codes[i] = 0;
  return codes_of(x, kLimit, codes);
}

float quantize_scalar(const Vector& x, int largest, int8_t* codes) {
  const auto most = static_cast<float>(largest), least = -most - 1;
  if (x.scales == nullptr) return codes_of(x, most, codes);
  for (int64_t i = 0; i < x.count; ++i) {
    // In this order as onnxruntime does it: the reciprocal rounds.
    float steps = load_real(x.x, i, x.type) * (1.0f / x.scales[i * x.scale_step]);
    if (steps != steps) steps = 0;
    steps = steps < least ? least : steps > most ? most : steps;
    codes[i] = static_cast<int8_t>(rintf(steps));
  }
  return 0;
}

void unpack_scalar(const uint8_t* packed, int64_t count, int8_t* codes) {
  for (int64_t i = 0; i < count / 2; ++i) {
    codes[2 * i] = static_cast<int8_t>((packed[i] & 15) - 8);
    codes[2 * i + 1] = static_cast<int8_t>((packed[i] >> 4) - 8);
  }
}

void logits_scalar(const int16_t* query, int64_t rows, const Tokens& keys, int16_t*, int32_t* products) {
  for (int64_t row = 0; row < rows; ++row) {
    const int16_t* q = query + row * keys.columns;
    for (int t = keys.begin; t < keys.end; ++t) {
      const int8_t* key = keys.codes + t * keys.stride;
      int32_t sum = 0;
      for (int64_t i = 0; i < keys.columns; ++i) sum += q[i] * key[i];
      products[row * kTile + t] = sum;
    }
  }
}

Share soften_scalar(const Softmax& softmax, int32_t* products, int16_t* weights) {
  auto* logits = reinterpret_cast<char*>(products);  // each in its product's place
  const float inverse_cap = softmax.cap != 0 ? 1.0f / softmax.cap : 0;
  const int padded = (softmax.end + kStep - 1) / kStep * kStep;
  float maximum = kMinusInfinity;
  uint32_t peak = 0;
  bool is_sound = true;
  for (int t = softmax.begin; t < padded; ++t) {
    float s = kMinusInfinity;
    const bool may_see = t >= softmax.first && t < softmax.last;
    const float added = may_see && softmax.mask != nullptr ? softmax.mask[t * softmax.mask_step] : 0;
    if (may_see && added != kMinusInfinity) {
      s = static_cast<float>(products[t]) * softmax.factor;
      if (softmax.is_dynamic) s = s * softmax.key_scales[t];
      if (softmax.cap != 0) s = soft_cap(s, softmax.cap, inverse_cap);
      s = s + added;
      if (!(s < INFINITY)) is_sound = false;
      if (s > maximum) maximum = s;
    }
    if (softmax.is_dynamic && s != kMinusInfinity) {
      const uint32_t magnitude = bits_of(softmax.value_scales[t]) & 0x7fffffffu;
      peak = magnitude > peak ? magnitude : peak;
    }
    memcpy(logits + t * sizeof s, &s, sizeof s);
  }
  if (peak >= kInfinity) is_sound = false;

  Share share{maximum, 0, softmax.is_dynamic ? float_of(peak) : 1};
  if (!is_sound) share = {0, float_of(kNan), 1};
  const bool is_live = !softmax.is_dynamic || peak >= kSmallestPeak;
  const float inverse = softmax.is_dynamic && is_sound && is_live ? kLimit / float_of(peak) : 0;
  int32_t sum = 0;
  for (int t = softmax.begin; t < padded; ++t) {
    float s;
    memcpy(&s, logits + t * sizeof s, sizeof s);
    weights[t] = 0;
    if (!is_sound || s == kMinusInfinity) continue;
    const float p = exp_of(s - maximum);
    const auto code = static_cast<int16_t>(rintf(p * kLimit));
    sum += code;
    if (!softmax.is_dynamic) weights[t] = code;
    if (softmax.is_dynamic && is_live) {
      weights[t] = static_cast<int16_t>(rintf(p * (softmax.value_scales[t] * inverse)));
    }
  }
  if (is_sound) share.sum = static_cast<float>(sum);
  return share;
}

void mix_scalar(const int16_t* weights, int64_t rows, const Tokens& values, int16_t*, int32_t* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    int32_t* to = sums + row * values.columns;
    for (int64_t i = 0; i < values.columns; ++i) to[i] = 0;
    for (int t = values.begin; t < values.end; ++t) {
      const int32_t weight = weights[row * kTile + t];
      const int8_t* value = values.codes + t * values.stride;
      for (int64_t i = 0; i < values.columns; ++i) to[i] += weight * value[i];
    }
  }
}

}  // namespace msd::attention
