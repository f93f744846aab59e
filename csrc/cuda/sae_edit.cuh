// SPDX-License-Identifier: Apache-2.0
// sae_edit_ on CUDA. Contract: csrc/include/sidechain/sae_edit.h; every pointer lies on the device.
//
// One block per row, threads own channels. Rows without a change are left after the codes have been
// read; else x is read and written once and the decoder rows of the changes are gathered.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "sidechain/sae_edit.h"

namespace sidechain::cuda {

constexpr int kEditThreads = 256;

struct EditRow {
  CodeRow codes;
  int64_t old;  // first old value
  float strength;
};

__device__ inline EditRow edit_row(const SaeEditParams& p, int64_t n) {
  EditRow row = {code_row(p.codes, n), 0, 0.0f};
  row.old = p.codes.offsets != nullptr ? row.codes.values : n * p.values_old_row;
  row.strength = p.strength != nullptr ? p.strength[n * p.strength_stride] : 1.0f;
  return row;
}

// strength (new - old) of an entry; 0 where it stands for nothing.
__device__ inline float edit_change(const SaeEditParams& p, const EditRow& row, int64_t e,
                                    int64_t* feature) {
  *feature = p.codes.indices[row.codes.indices + e];
  if (*feature < 0 || *feature >= p.features) return 0.0f;
  const float after = p.codes.values != nullptr ? p.codes.values[row.codes.values + e] : 0.0f;
  const float before = p.values_old != nullptr ? p.values_old[row.old + e] : 0.0f;
  return row.strength * (after - before);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kEditThreads)
    edit_kernel(const __grid_constant__ SaeEditParams p) {
  const int64_t n = blockIdx.x;
  if (p.mask != nullptr && p.mask[n * p.mask_stride] == 0) return;
  const EditRow row = edit_row(p, n);
  if (row.strength == 0.0f) return;
  int changes = 0;
  int64_t feature;
  for (int64_t e = threadIdx.x; e < row.codes.count; e += blockDim.x) {
    changes |= edit_change(p, row, e, &feature) != 0.0f ? 1 : 0;
  }
  if (!__syncthreads_or(changes)) return;
  T* const x = static_cast<T*>(p.x) + n * p.x_row;
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kWidth; c < p.width;
       c += static_cast<int64_t>(blockDim.x) * kWidth) {
    float sum[kWidth] = {};
    for (int64_t e = 0; e < row.codes.count; ++e) {
      const float change = edit_change(p, row, e, &feature);
      if (change == 0.0f) continue;
      float w[kWidth] = {};
      load_as(p.w_dec, p.w_dec_dtype, feature * p.w_dec_row + c, true, w);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += change * w[i];
    }
    float value[kWidth];
    load(x + c, value);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] += sum[i];
    store(x + c, value);
  }
}

template <class T>
cudaError_t launch_edit_typed(const SaeEditParams& p, cudaStream_t stream) {
  // Packs of at most 16 bytes of either row; the wider type decides how many elements they hold.
  const int64_t widest = size_of(p.w_dec_dtype) > static_cast<int64_t>(sizeof(T))
                             ? size_of(p.w_dec_dtype)
                             : static_cast<int64_t>(sizeof(T));
  const int64_t width = 16 / widest;
  const bool wide = p.width % width == 0 && packs(p.x, p.x_row, sizeof(T), width) &&
                    packs(p.w_dec, p.w_dec_row, size_of(p.w_dec_dtype), width);
  const int64_t threads = threads_for(wide ? p.width / width : p.width, 32, kEditThreads);
  const auto kernel = !wide        ? edit_kernel<T, 1>
                      : width == 4 ? edit_kernel<T, 4>
                                   : edit_kernel<T, 16 / sizeof(T)>;
  return launch(kernel, p.codes.rows, threads, 0, stream, p);
}

inline cudaError_t launch_sae_edit(const SaeEditParams& p, cudaStream_t stream) {
  if (p.codes.rows == 0 || p.width == 0) return cudaSuccess;
  switch (p.dtype) {
    case Dtype::kFloat32:
      return launch_edit_typed<float>(p, stream);
    case Dtype::kFloat16:
      return launch_edit_typed<__half>(p, stream);
    case Dtype::kBFloat16:
      return launch_edit_typed<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace sidechain::cuda
