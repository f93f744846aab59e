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

#include "cuda/decode_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shared.cuh"
#include "cuda/vec.cuh"
#include "sidechain/sparse_decode.h"

namespace sidechain::cuda {

// Dynamic shared memory of a block: with the static arrays three of them run on a multiprocessor of
// sm_90 and two on one of sm_80.
constexpr int64_t kDecodeShared = 72 * 1024;

// What the host finds out about the layout once per launch.
struct DecodeLayout {
  bool bias_aligned, target_aligned;
  int32_t held;  // entries of a row whose decoder rows stay in shared memory
};

// Where the dvalues of a row begin: they are contiguous in either form.
__device__ inline float* dvalues_row(float* dvalues, const Codes& codes, const CodeRow& row,
                                     int64_t n) {
  return dvalues + (codes.offsets != nullptr ? row.values : n * codes.width);
}

template <class T, int kWidth, bool kCompare>
__global__ void __launch_bounds__(kDecodeThreads, 3)
    decode_kernel(const __grid_constant__ DecodeParams p, const DecoderRows<T, kWidth> w_dec,
                  const DecodeLayout layout) {
  __shared__ float scratch[kDecodeThreads / 32];
  __shared__ Entry entries[kEntries + kBatch];
  constexpr bool kAsync = kCompare && kWidth > 1;  // narrow packs are no multiple of four bytes
  // More would spill: 64-bit addresses, or the target as floats beside eight sums.
  constexpr int kStep = kWidth == 1 || (kCompare && kWidth == 8) ? kBatch / 2 : kBatch;
  const int64_t n = blockIdx.x;
  const int32_t width = static_cast<int32_t>(p.width);
  float* const error = dynamic_shared<float>();  // [width], then the rows held
  const CodeEntries<T, kWidth> codes = {p.codes, w_dec, code_row(p.codes, n)};
  EntryList list(codes, entries);
  HeldRows<T, kWidth> held = {reinterpret_cast<T*>(error + (width + 3) / 4 * 4), 0, width};
  if (list.count() > 0) held.count = min(layout.held, list.hold(0));
  if (kAsync) held.copy(list, w_dec);

  float square[1] = {};
  for (int32_t base = 0; base < width; base += blockDim.x * kWidth) {
    const int32_t c = base + static_cast<int32_t>(threadIdx.x) * kWidth;
    const bool mine = c < width;
    float target[kWidth] = {};  // on its way while the rows are
    if (mine && kCompare) {
      load_as(p.target.data, p.target.dtype, n * p.target.row + c, layout.target_aligned, target);
    }
    float sum[kWidth] = {};
    for (int64_t first = 0; first < list.count(); first += kEntries) {
      const int count = list.hold(first);
      int begin = 0;
      if (first == 0) {
        begin = held.count;
        if (kAsync) held.add(list, c, sum);
        if (kCompare && !kAsync && mine) {
          add_rows<T, kWidth, kStep, true>(list, 0, begin, w_dec, width, c, held.rows, sum);
        }
      }
      if (!mine) continue;
      add_rows<T, kWidth, kStep, false>(list, begin, count, w_dec, width, c,
                                        static_cast<T*>(nullptr), sum);
    }
    if (!mine) continue;
    if (p.b_dec != nullptr) {
      float bias[kWidth];
      load(p.b_dec + c, layout.bias_aligned, bias);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += bias[i];
    }
    if (kCompare) {
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
  block_sum(square, scratch);  // its barrier completes error and the rows held too
  if (threadIdx.x == 0) p.loss[n] = square[0];
  const float weight = p.row_weight != nullptr ? p.row_weight[n] : 1.0f;
  entry_dots<T, kWidth>(list, w_dec, width, error, held.rows, held.count, weight,
                        dvalues_row(p.dvalues, p.codes, codes.row, n));
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kDecodeThreads, 3)
    decode_dvalues_kernel(const __grid_constant__ DecodeBackwardParams p,
                          const DecoderRows<T, kWidth> w_dec, bool grad_aligned) {
  __shared__ Entry entries[kEntries + kBatch];
  const int64_t n = blockIdx.x;
  const int32_t width = static_cast<int32_t>(p.width);
  float* const grad = dynamic_shared<float>();  // [width]
  for (int32_t c = threadIdx.x * kWidth; c < width; c += blockDim.x * kWidth) {
    float value[kWidth] = {};
    load(p.grad + n * p.grad_row + c, grad_aligned, value);
    store(grad + c, value);
  }
  __syncthreads();
  const CodeEntries<T, kWidth> codes = {p.codes, w_dec, code_row(p.codes, n)};
  EntryList list(codes, entries);
  const T* const none = nullptr;
  entry_dots<T, kWidth>(list, w_dec, width, grad, none, 0, 1.0f,
                        dvalues_row(p.dvalues, p.codes, codes.row, n));
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
  const DecoderRows<T, kWidth> w_dec(p.w_dec, p.features);
  if (!p.compare) {
    return launch(decode_kernel<T, kWidth, false>, p.codes.rows, threads, 0, stream, p, w_dec,
                  layout);
  }
  layout.target_aligned = packs(p.target.data, p.target.row, size_of(p.target.dtype), kWidth);
  const int64_t error_bytes = (p.width + 3) / 4 * 16;
  const int64_t row_bytes = p.width * static_cast<int64_t>(sizeof(T));
  const int64_t most = p.codes.offsets != nullptr ? p.codes.capacity : p.codes.width;
  int64_t held = 0;
  if (row_bytes > 0 && error_bytes < kDecodeShared) {
    held = (kDecodeShared - error_bytes) / row_bytes;
    if (held > most) held = most;
    if (held > kEntries) held = kEntries;
  }
  layout.held = static_cast<int32_t>(held);
  const int64_t bytes = error_bytes + held * row_bytes;
  return launch(decode_kernel<T, kWidth, true>, p.codes.rows, threads, bytes, stream, p, w_dec,
                layout);
}

template <class T, int kWidth>
cudaError_t launch_dvalues_typed(const DecodeBackwardParams& p, cudaStream_t stream) {
  const bool aligned = packs(p.grad, p.grad_row, 4, kWidth);
  const int64_t threads = threads_for(p.width / kWidth, 64, kDecodeThreads);
  return launch(decode_dvalues_kernel<T, kWidth>, p.codes.rows, threads, (p.width + 3) / 4 * 16,
                stream, p, DecoderRows<T, kWidth>(p.w_dec, p.features), aligned);
}

// Calls `with` for the element type of w_dec and the widest packs its layout allows.
template <class Params, class With>
cudaError_t with_decoder(const Params& p, With with) {
  const int64_t size = size_of(p.w_dec.dtype), width = 16 / size;
  if (p.width > kMostChannels) return cudaErrorInvalidValue;
  const bool wide = p.width % width == 0 && packs_of_rows(p.w_dec, p.features);
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
