// SPDX-License-Identifier: Apache-2.0
// sparse_decode on CUDA. Contract: csrc/include/sidechain/sparse_decode.h; every pointer lies on
// the device.
//
// One block per row; threads own channels while the row is decoded, warps own entries while the
// error is held against their decoder rows. Decoder rows are gathered once: as many as fit stay in
// shared memory between the two, the rest is read again from the second-level cache. Bound by the
// gather: K d sizeof(w_dec) bytes a row, most of it from that cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shared.cuh"
#include "cuda/vec.cuh"
#include "sidechain/sparse_decode.h"

namespace sidechain::cuda {

constexpr int kDecodeThreads = 256;
// Shared memory of a block: two of them run on a multiprocessor of sm_80 and of sm_90.
constexpr int64_t kDecodeShared = 76 * 1024;

// What the host finds out about the layout once per launch.
struct DecodeLayout {
  bool bias_aligned, target_aligned;
  int64_t held;  // entries of a row whose decoder rows stay in shared memory
};

// The decoder row of an entry, nullptr where it stands for nothing.
template <class T>
__device__ inline const T* decoder_row(const Codes& codes, const Matrix& w_dec, int64_t features,
                                       int64_t at) {
  const int64_t f = codes.indices[at];
  if (f < 0 || f >= features) return nullptr;
  return static_cast<const T*>(w_dec.data) + f * w_dec.row;
}

// dvalues[e] = weight <vector, w_dec[indices[e]]> for the entries of a row, a warp each; the vector
// and the first `held` decoder rows lie in shared memory.
template <class T, int kWidth>
__device__ inline void entry_dots(const Codes& codes, const Matrix& w_dec, int64_t features,
                                  int64_t width, const CodeRow& row, const float* vector,
                                  const T* rows_held, int64_t held, float weight, float* dvalues) {
  const int lane = threadIdx.x % 32;
  for (int64_t e = threadIdx.x / 32; e < row.count; e += blockDim.x / 32) {
    const T* w = decoder_row<T>(codes, w_dec, features, row.indices + e);
    float dot[kWidth] = {};
    if (w != nullptr) {
      if (e < held) w = rows_held + e * width;
      for (int64_t c = lane * kWidth; c < width; c += 32 * kWidth) {
        float a[kWidth], b[kWidth];
        load(vector + c, a);
        load(w + c, b);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) dot[i] += a[i] * b[i];
      }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += dot[i];
    sum = warp_sum(sum);
    if (lane == 0) dvalues[e] = w != nullptr ? weight * sum : 0.0f;
  }
}

// Where the dvalues of a row begin: they are contiguous in either form.
__device__ inline float* dvalues_row(float* dvalues, const Codes& codes, const CodeRow& row,
                                     int64_t n) {
  return dvalues + (codes.offsets != nullptr ? row.values : n * codes.width);
}

template <class T, int kWidth, bool kCompare>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_kernel(const DecodeParams p, const DecodeLayout layout) {
  __shared__ float scratch[kDecodeThreads / 32];
  const int64_t n = blockIdx.x;
  const CodeRow row = code_row(p.codes, n);
  float* const error = dynamic_shared<float>();  // [width], then the rows held
  T* const rows_held = reinterpret_cast<T*>(error + (p.width + 3) / 4 * 4);

  float square[1] = {};
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kWidth; c < p.width;
       c += static_cast<int64_t>(blockDim.x) * kWidth) {
    float sum[kWidth] = {};
    for (int64_t e = 0; e < row.count; ++e) {
      const T* w = decoder_row<T>(p.codes, p.w_dec, p.features, row.indices + e);
      if (w == nullptr) continue;
      const float value = p.codes.values[row.values + e];
      const Pack<T, kWidth> pack = *reinterpret_cast<const Pack<T, kWidth>*>(w + c);
      if (kCompare && e < layout.held) {
        *reinterpret_cast<Pack<T, kWidth>*>(rows_held + e * p.width + c) = pack;
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += value * to_float(pack.item[i]);
    }
    if (p.b_dec != nullptr) {
      float bias[kWidth];
      load(p.b_dec + c, layout.bias_aligned, bias);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += bias[i];
    }
    if (kCompare) {
      float target[kWidth] = {};
      load_as(p.target.data, p.target.dtype, n * p.target.row + c, layout.target_aligned, target);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum[i] -= target[i];
        square[0] += sum[i] * sum[i];
      }
      store(error + c, sum);
    }
    store(p.out + n * p.width + c, sum);
  }
  if (!kCompare) return;
  block_sum(square, scratch);  // its barrier completes error and rows_held too
  if (threadIdx.x == 0) p.loss[n] = square[0];
  const float weight = p.row_weight != nullptr ? p.row_weight[n] : 1.0f;
  entry_dots<T, kWidth>(p.codes, p.w_dec, p.features, p.width, row, error, rows_held, layout.held,
                        weight, dvalues_row(p.dvalues, p.codes, row, n));
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_dvalues_kernel(const DecodeBackwardParams p, bool grad_aligned) {
  const int64_t n = blockIdx.x;
  float* const grad = dynamic_shared<float>();  // [width]
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kWidth; c < p.width;
       c += static_cast<int64_t>(blockDim.x) * kWidth) {
    float value[kWidth] = {};
    load_as(p.grad.data, p.grad.dtype, n * p.grad.row + c, grad_aligned, value);
    store(grad + c, value);
  }
  __syncthreads();
  const CodeRow row = code_row(p.codes, n);
  const T* const none = nullptr;
  entry_dots<T, kWidth>(p.codes, p.w_dec, p.features, p.width, row, grad, none, 0, 1.0f,
                        dvalues_row(p.dvalues, p.codes, row, n));
}

// Entries of codes in CSR form that belong to no row have dvalues as well.
inline cudaError_t clear_dvalues(const Codes& codes, float* dvalues, cudaStream_t stream) {
  if (codes.offsets == nullptr || codes.capacity == 0) return cudaSuccess;
  return cudaMemsetAsync(dvalues, 0, codes.capacity * sizeof(float), stream);
}

template <class T, int kWidth>
cudaError_t launch_decode_typed(const DecodeParams& p, cudaStream_t stream) {
  DecodeLayout layout = {};
  layout.bias_aligned = packs(p.b_dec, 0, 4, kWidth);
  const int64_t threads = threads_for(p.width / kWidth, 64, kDecodeThreads);
  if (!p.compare) {
    return launch(decode_kernel<T, kWidth, false>, p.codes.rows, threads, 0, stream, p, layout);
  }
  layout.target_aligned = packs(p.target.data, p.target.row, size_of(p.target.dtype), kWidth);
  const int64_t error_bytes = (p.width + 3) / 4 * 16;
  const int64_t row_bytes = p.width * static_cast<int64_t>(sizeof(T));
  const int64_t most = p.codes.offsets != nullptr ? p.codes.capacity : p.codes.width;
  if (row_bytes > 0 && error_bytes < kDecodeShared) {
    layout.held = (kDecodeShared - error_bytes) / row_bytes;
    if (layout.held > most) layout.held = most;
  }
  const int64_t bytes = error_bytes + layout.held * row_bytes;
  return launch(decode_kernel<T, kWidth, true>, p.codes.rows, threads, bytes, stream, p, layout);
}

template <class T, int kWidth>
cudaError_t launch_dvalues_typed(const DecodeBackwardParams& p, cudaStream_t stream) {
  const bool aligned = packs(p.grad.data, p.grad.row, size_of(p.grad.dtype), kWidth);
  const int64_t threads = threads_for(p.width / kWidth, 64, kDecodeThreads);
  return launch(decode_dvalues_kernel<T, kWidth>, p.codes.rows, threads, (p.width + 3) / 4 * 16,
                stream, p, aligned);
}

// Calls `with` for the element type of w_dec and the widest packs its layout allows.
template <class Params, class With>
cudaError_t with_decoder(const Params& p, With with) {
  const int64_t width = 16 / size_of(p.w_dec.dtype);
  const bool wide =
      p.width % width == 0 && packs(p.w_dec.data, p.w_dec.row, size_of(p.w_dec.dtype), width);
  switch (p.w_dec.dtype) {
    case Dtype::kFloat32:
      return wide ? with.template operator()<float, 4>() : with.template operator()<float, 1>();
    case Dtype::kFloat16:
      return wide ? with.template operator()<__half, 8>() : with.template operator()<__half, 1>();
    case Dtype::kBFloat16:
      return wide ? with.template operator()<__nv_bfloat16, 8>()
                  : with.template operator()<__nv_bfloat16, 1>();
  }
  return cudaErrorInvalidValue;
}

struct LaunchDecode {
  const DecodeParams& p;
  cudaStream_t stream;
  template <class T, int kWidth>
  cudaError_t operator()() const {
    return launch_decode_typed<T, kWidth>(p, stream);
  }
};

struct LaunchDvalues {
  const DecodeBackwardParams& p;
  cudaStream_t stream;
  template <class T, int kWidth>
  cudaError_t operator()() const {
    return launch_dvalues_typed<T, kWidth>(p, stream);
  }
};

inline cudaError_t launch_sparse_decode(const DecodeParams& p, cudaStream_t stream) {
  if (p.compare) {
    const cudaError_t status = clear_dvalues(p.codes, p.dvalues, stream);
    if (status != cudaSuccess) return status;
  }
  if (p.codes.rows == 0) return cudaSuccess;
  return with_decoder(p, LaunchDecode{p, stream});
}

inline cudaError_t launch_decode_dvalues(const DecodeBackwardParams& p, cudaStream_t stream) {
  const cudaError_t status = clear_dvalues(p.codes, p.dvalues, stream);
  if (status != cudaSuccess || p.codes.rows == 0) return status;
  return with_decoder(p, LaunchDvalues{p, stream});
}

}  // namespace sidechain::cuda
