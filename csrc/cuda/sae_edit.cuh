// SPDX-License-Identifier: Apache-2.0
// sae_edit_ on CUDA. Contract: csrc/include/sidechain/sae_edit.h; every pointer lies on the device.
//
// One block per row, threads own channels. Rows without a change are left after the codes have been
// read; else x is read and written once and the decoder rows of the changes are gathered, several
// at a time. Bound by that gather, most of it from the second-level cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/decode_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "sidechain/sae_edit.h"

namespace sidechain::cuda {

constexpr int kEditThreads = kDecodeThreads;

// The changes of a row: strength (new - old), nothing where that is 0.
template <class W, int kWidth>
struct EditEntries {
  const SaeEditParams& p;
  const DecoderRows<W, kWidth>& w_dec;
  CodeRow row;
  int64_t old;  // first old value
  float strength;

  __device__ EditEntries(const SaeEditParams& p, const DecoderRows<W, kWidth>& w_dec, int64_t n)
      : p(p),
        w_dec(w_dec),
        row(code_row(p.codes, n)),
        old(p.codes.offsets != nullptr ? row.values : n * p.values_old_row),
        strength(p.strength != nullptr ? p.strength[n * p.strength_stride] : 1.0f) {}

  __device__ Entry entry(int64_t e) const {
    Entry found = {w_dec.place(p.codes.indices[row.indices + e]), 0.0f};
    if (found.place == kNothing) return found;
    const float after = p.codes.values != nullptr ? p.codes.values[row.values + e] : 0.0f;
    const float before = p.values_old != nullptr ? p.values_old[old + e] : 0.0f;
    found.value = strength * (after - before);
    if (found.value == 0.0f) found.place = kNothing;
    return found;
  }
};

template <class T, class W, int kWidth>
__global__ void __launch_bounds__(kEditThreads, 3)
    edit_kernel(const __grid_constant__ SaeEditParams p, const DecoderRows<W, kWidth> w_dec) {
  __shared__ Entry entries[kEntries + kBatch];
  constexpr int kStep = kWidth == 1 ? kBatch / 2 : kBatch;
  const int64_t n = blockIdx.x;
  if (p.mask != nullptr && p.mask[n * p.mask_stride] == 0) return;
  const EditEntries<W, kWidth> edit(p, w_dec, n);
  if (edit.strength == 0.0f) return;
  int changes = 0;
  for (int64_t e = threadIdx.x; e < edit.row.count; e += blockDim.x) {
    changes |= edit.entry(e).place != kNothing ? 1 : 0;
  }
  if (!__syncthreads_or(changes)) return;
  EntryList list(edit, entries);
  T* const x = static_cast<T*>(p.x) + n * p.x_row;
  const int32_t width = static_cast<int32_t>(p.width);
  for (int32_t base = 0; base < width; base += blockDim.x * kWidth) {
    const int32_t c = base + static_cast<int32_t>(threadIdx.x) * kWidth;
    float value[kWidth] = {}, sum[kWidth] = {};
    if (c < width) load(x + c, value);
    for (int64_t first = 0; first < list.count(); first += kEntries) {
      const int count = list.hold(first);
      if (c >= width) continue;
      add_rows<W, kWidth, kStep, false>(list, 0, count, w_dec, width, c, static_cast<W*>(nullptr),
                                        sum);
    }
    if (c >= width) continue;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] += sum[i];
    store(x + c, value);
  }
}

// Packs of 16 bytes of a decoder row, where x can be moved in packs of as many elements.
template <class T, class W>
cudaError_t launch_edit_typed(const SaeEditParams& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(W));
  const Matrix w = {p.w_dec, p.w_dec_dtype, p.w_dec_row};
  const bool wide = p.width % kWidth == 0 && packs(p.x, p.x_row, sizeof(T), kWidth) &&
                    packs_of_rows(w, p.features);
  const int64_t threads = threads_for(wide ? p.width / kWidth : p.width, 32, kEditThreads);
  if (!wide) {
    return launch(edit_kernel<T, W, 1>, p.codes.rows, threads, 0, stream, p,
                  DecoderRows<W, 1>(w, p.features));
  }
  return launch(edit_kernel<T, W, kWidth>, p.codes.rows, threads, 0, stream, p,
                DecoderRows<W, kWidth>(w, p.features));
}

template <class T>
cudaError_t launch_edit_of(const SaeEditParams& p, cudaStream_t stream) {
  switch (p.w_dec_dtype) {
    case Dtype::kFloat32:
      return launch_edit_typed<T, float>(p, stream);
    case Dtype::kFloat16:
      return launch_edit_typed<T, __half>(p, stream);
    case Dtype::kBFloat16:
      return launch_edit_typed<T, __nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t launch_sae_edit(const SaeEditParams& p, cudaStream_t stream) {
  if (p.codes.rows == 0 || p.width == 0) return cudaSuccess;
  if (p.width > kMostChannels) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case Dtype::kFloat32:
      return launch_edit_of<float>(p, stream);
    case Dtype::kFloat16:
      return launch_edit_of<__half>(p, stream);
    case Dtype::kBFloat16:
      return launch_edit_of<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace sidechain::cuda
