// SPDX-License-Identifier: Apache-2.0
// Loads and stores of kWidth consecutive elements as floats: 16 bytes at once where the layout
// allows it (kWidth = 16 / sizeof(T)), one element otherwise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sidechain/dtype.h"

namespace sidechain::cuda {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Elements of one thread, moved as few transactions of at most 16 bytes.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Pack {
  T item[kWidth];
};

template <class T, int kWidth>
__device__ inline void load(const T* p, float (&out)[kWidth]) {
  const Pack<T, kWidth> pack = *reinterpret_cast<const Pack<T, kWidth>*>(p);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = to_float(pack.item[i]);
}

template <class T, int kWidth>
__device__ inline void store(T* p, const float (&in)[kWidth]) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.item[i] = from_float<T>(in[i]);
  *reinterpret_cast<Pack<T, kWidth>*>(p) = pack;
}

// The same for arrays whose alignment is known only at run time.
template <class T, int kWidth>
__device__ inline void load(const T* p, bool aligned, float (&out)[kWidth]) {
  if (aligned) return load(p, out);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = to_float(p[i]);
}

template <int kWidth>
__device__ inline void load_as(const void* p, Dtype dtype, int64_t offset, bool aligned,
                               float (&out)[kWidth]) {
  switch (dtype) {
    case Dtype::kFloat32:
      return load(static_cast<const float*>(p) + offset, aligned, out);
    case Dtype::kFloat16:
      return load(static_cast<const __half*>(p) + offset, aligned, out);
    case Dtype::kBFloat16:
      return load(static_cast<const __nv_bfloat16*>(p) + offset, aligned, out);
  }
}

template <class T, int kWidth>
__device__ inline void store(T* p, bool aligned, const float (&in)[kWidth]) {
  if (aligned) return store(p, in);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<T>(in[i]);
}

template <int kWidth>
__device__ inline void store_as(void* p, Dtype dtype, int64_t offset, bool aligned,
                                const float (&in)[kWidth]) {
  switch (dtype) {
    case Dtype::kFloat32:
      return store(static_cast<float*>(p) + offset, aligned, in);
    case Dtype::kFloat16:
      return store(static_cast<__half*>(p) + offset, aligned, in);
    case Dtype::kBFloat16:
      return store(static_cast<__nv_bfloat16*>(p) + offset, aligned, in);
  }
}

// Whether rows of a matrix can be read as packs of kWidth elements of `size` bytes.
inline bool packs(const void* data, int64_t row, int64_t size, int64_t width) {
  const int64_t bytes = width * size < 16 ? width * size : 16;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && row * size % bytes == 0;
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace sidechain::cuda
