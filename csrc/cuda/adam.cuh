// SPDX-License-Identifier: Apache-2.0
// Adam on one row of a weight, as sae_update_ defines it (python/sidechain/ops/sae_update.py):
// numbers of a step, numbers of a row, and the step of one element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/vec.cuh"
#include "sidechain/sae_update.h"

namespace sidechain::cuda {

struct AdamStep {
  float beta2, rest1, rest2;  // rest = 1 - beta
  float decay;                // 1 - lr weight_decay
  float size;                 // lr / (1 - beta1^step)
  float correction;           // 1 / sqrt(1 - beta2^step)
  float eps, clip;
  int64_t step;
  uint32_t noise;  // of the step
};

__device__ inline double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

// `lowbias32`; the reference names its source.
__device__ inline uint32_t mix_bits(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

__device__ inline AdamStep adam_step(const SaeUpdateParams& p) {
  AdamStep a = {};
  a.step = *p.step;
  const double lr = *p.lr;
  a.beta2 = static_cast<float>(p.beta2);
  a.decay = static_cast<float>(1.0 - lr * p.weight_decay);
  a.rest1 = static_cast<float>(1.0 - p.beta1), a.rest2 = static_cast<float>(1.0 - p.beta2);
  a.size = static_cast<float>(lr / (1.0 - power(p.beta1, a.step)));
  a.correction = static_cast<float>(1.0 / sqrt(1.0 - power(p.beta2, a.step)));
  a.eps = static_cast<float>(p.eps);
  a.clip = p.clip_scale != nullptr ? *p.clip_scale : 1.0f;
  a.noise = mix_bits(static_cast<uint32_t>(a.step));
  return a;
}

// The numbers of a step live on the device, so a thread works them out there, once: their double
// divisions and roots would cost the update its registers.
__global__ void __launch_bounds__(32, 1)
    adam_step_kernel(const __grid_constant__ SaeUpdateParams p, AdamStep* step) {
  *step = adam_step(p);
}

// One element: returns the new weight and leaves the new statistics. A bias does not decay.
__device__ inline float adam_element(const AdamStep& a, float decay, float weight, float grad,
                                     float* mean, float* square) {
  *mean += (grad - *mean) * a.rest1;
  *square = a.beta2 * *square + grad * grad * a.rest2;
  const float denominator = sqrtf(*square) * a.correction + a.eps;
  return decay * weight - a.size * (*mean / denominator);
}

// Rounds to bfloat16 by adding 16 random bits below the last bit kept; infinities and NaN stay.
__device__ inline float round_by_noise(float value, uint32_t noise) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return __uint_as_float((bits + noise) & 0xffff0000u);
}

// Statistics of kWidth elements; `at` counts elements, `noise` is that of the row plus the column.
template <int kWidth>
__device__ inline void load_statistics(const void* p, Dtype dtype, int64_t at,
                                       float (&out)[kWidth]) {
  if (dtype == Dtype::kFloat32) return load(static_cast<const float*>(p) + at, out);
  load(static_cast<const __nv_bfloat16*>(p) + at, out);
}
template <int kWidth>
__device__ inline void store_statistics(void* p, Dtype dtype, int64_t at, const float (&in)[kWidth],
                                        uint32_t noise, int half) {
  if (dtype == Dtype::kFloat32) return store(static_cast<float*>(p) + at, in);
  float rounded[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t bits = mix_bits(noise + static_cast<uint32_t>(i));
    rounded[i] = round_by_noise(in[i], half == 0 ? bits & 0xffffu : bits >> 16);
  }
  store(static_cast<__nv_bfloat16*>(p) + at, rounded);
}

}  // namespace sidechain::cuda
