// SPDX-License-Identifier: Apache-2.0
// Gradient of the decoder rows on CUDA: dw_dec[f] = sum value grad[row] over the list of f.
// Contract: DecodeBackwardParams in csrc/include/sidechain/sparse_decode.h.
//
// One block per feature, threads own channels, sums in float32 in row order. Bound by the gather of
// grad, nnz d 4 bytes from the second-level cache, and one write of the table.
#pragma once

#include "cuda/feature_rows.cuh"
#include "cuda/sparse_decode.cuh"

namespace sidechain::cuda {

struct GradRows {
  const float* grad;
  int64_t row;
  __device__ float scale(const CscEntry& e) const { return e.value; }
  template <int kWidth>
  __device__ void load(const CscEntry& e, int64_t c, float (&out)[kWidth]) const {
    cuda::load(grad + e.row * row + c, out);
  }
};

template <int kWidth>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_tiles_kernel(GradRows rows, Csc csc, int64_t features, int64_t width, float* partial) {
  if (tile_owner(csc, features, blockIdx.x) < 0) return;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * kListTile;
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kWidth; c < width;
       c += static_cast<int64_t>(blockDim.x) * kWidth) {
    float sum[kWidth] = {};
    add_entries(csc.entries, begin, begin + kListTile, rows, c, sum);
    store(partial + blockIdx.x * padded(width) + c, sum);
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_table_kernel(GradRows rows, Csc csc, int64_t width, const float* partial, void* table,
                        Dtype dtype) {
  const int64_t f = blockIdx.x;
  const int32_t begin = csc.start[f], end = csc.start[f + 1];
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kWidth; c < width;
       c += static_cast<int64_t>(blockDim.x) * kWidth) {
    float sum[kWidth] = {};
    add_list(csc, begin, end, rows, partial, padded(width), c, c, sum);
    store_as(table, dtype, f * width + c, true, sum);
  }
}

inline CscSource decode_source(const DecodeBackwardParams& p) {
  CscSource s = {};
  s.groups[0].codes = p.codes;
  s.group_count = 1;
  s.features = p.features;
  s.keep_zeros = true;  // 0 times infinity counts, as in the reference
  return s;
}

inline int64_t decode_table_workspace(const DecodeBackwardParams& p) {
  const CscSource s = decode_source(p);
  return csc_workspace(s, nullptr).bytes + list_tile_count(s) * padded(p.width) * 4;
}

template <int kWidth>
cudaError_t launch_decode_table_typed(const DecodeBackwardParams& p, const Csc& csc, int64_t tiles,
                                      float* partial, cudaStream_t stream) {
  const GradRows rows = {static_cast<const float*>(p.grad.data), p.grad.row};
  const int64_t threads = threads_for(p.width / kWidth, 32, kDecodeThreads);
  if (tiles > 0) {
    const cudaError_t status = launch(decode_tiles_kernel<kWidth>, tiles, threads, 0, stream, rows,
                                      csc, p.features, p.width, partial);
    if (status != cudaSuccess) return status;
  }
  return launch(decode_table_kernel<kWidth>, p.features, threads, 0, stream, rows, csc, p.width,
                static_cast<const float*>(partial), p.dw_dec, p.w_dec.dtype);
}

// `workspace` holds decode_table_workspace(p) bytes whose contents do not matter.
inline cudaError_t launch_decode_table(const DecodeBackwardParams& p, void* workspace,
                                       cudaStream_t stream) {
  if (p.features == 0 || p.width == 0) return cudaSuccess;
  const CscSource s = decode_source(p);
  Csc csc = {};
  const cudaError_t status = build_csc(s, workspace, stream, &csc);
  if (status != cudaSuccess) return status;
  auto* const partial =
      reinterpret_cast<float*>(static_cast<char*>(workspace) + csc_workspace(s, nullptr).bytes);
  const bool wide = p.width % 4 == 0 && packs(p.grad.data, p.grad.row, 4, 4);
  return wide ? launch_decode_table_typed<4>(p, csc, list_tile_count(s), partial, stream)
              : launch_decode_table_typed<1>(p, csc, list_tile_count(s), partial, stream);
}

}  // namespace sidechain::cuda
