// SPDX-License-Identifier: Apache-2.0
// bfloat16 of the CUDA toolkit, the part the kernels use; conversions round to nearest even.
#pragma once

#include "emulation/math.h"
#include "emulation/types.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  return emulation::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = emulation::bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }

inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
