// SPDX-License-Identifier: Apache-2.0
// half of the CUDA toolkit, the part the kernels use; conversions round to nearest even.
#pragma once

#include "emulation/math.h"
#include "emulation/types.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t exponent = v.bits >> 10 & 31u, mantissa = v.bits & 1023u;
  if (exponent == 31) {
    return emulation::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  }
  if (exponent == 0) {
    const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -tiny : tiny;
  }
  return emulation::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline __half __float2half_rn(float v) {
  const uint32_t bits = emulation::bit_cast<uint32_t>(v);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and up
  if (magnitude < 0x38800000u) {  // subnormal: 2^-24 is the unit
    const float units = std::nearbyint(emulation::bit_cast<float>(magnitude) * 0x1p24f);
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(units))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}
inline __half __float2half(float v) { return __float2half_rn(v); }

inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
