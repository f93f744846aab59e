// SPDX-License-Identifier: Apache-2.0
// Gradient of the decoder rows on CUDA: dw_dec[f] = sum value grad[row] over the list of f.
// Contract: DecodeBackwardParams in csrc/include/sidechain/sparse_decode.h.
//
// One block per feature, warps own strips of channels, sums in float32 in row order. Bound by the
// gather of grad, nnz d 4 bytes from the second-level cache, and one write of the table.
#pragma once

#include "cuda/feature_rows.cuh"
#include "cuda/sparse_decode.cuh"

namespace sidechain::cuda {

constexpr int kTableThreads = 32 * kMaxStripWarps;

struct GradMatrix {
  const float* data;
  int64_t row;
};

// value grad[row]
template <int kPack>
struct GradRows : RowsOf<float, kPack> {
  static __device__ float scale(const CscEntry& e) { return e.value; }
  static __device__ int group_of(const CscEntry&) { return 0; }
  __device__ float shift(int) const { return 0.0f; }
};

// Leaves in slot the sum over the list for the strip at c.
template <int kPack>
__device__ inline void grad_sums(const GradMatrix& grad, const CscEntry* entries, int32_t begin,
                                 int32_t end, int64_t c, int left, RowBases& bases,
                                 const float* partial, int64_t stride, float* slot) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    const RowBase base = row_base(grad.data + c, grad.row);
    bases.group[0] = base;
  }
  __syncwarp();
  add_list(entries, begin, end, GradRows<kPack>(), bases, left, partial, stride, slot);
}

template <int kPack>
__global__ void __launch_bounds__(kTableThreads, 3)
    decode_tiles_kernel(GradMatrix grad, Csc csc, int64_t features, int64_t width, float* partial) {
  __shared__ __align__(16) float slots[kMaxStripWarps][kStrip];
  __shared__ RowBases bases[kMaxStripWarps];
  if (tile_owner(csc, features, blockIdx.x) < 0) return;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * kListTile;
  const int warp = threadIdx.x / 32;
  float* const sums = partial + blockIdx.x * padded(width);
  for_each_strip(width, [&](int64_t c, int left) {
    grad_sums<kPack>(grad, csc.entries, begin, begin + kListTile, c, left, bases[warp], nullptr, 0,
                     slots[warp]);
    float sum[kLaneChannels];
    load_lane<kPack>(slots[warp], left, sum);
    store_lane<kPack>(sums + c, left, sum);
  });
}

template <int kPack>
__global__ void __launch_bounds__(kTableThreads, 3)
    decode_table_kernel(GradMatrix grad, Csc csc, int64_t width, const float* partial, void* table,
                        Dtype dtype) {
  __shared__ __align__(16) float slots[kMaxStripWarps][kStrip];
  __shared__ RowBases bases[kMaxStripWarps];
  const int64_t f = blockIdx.x;
  const int warp = threadIdx.x / 32;
  for_each_strip(width, [&](int64_t c, int left) {
    grad_sums<kPack>(grad, csc.entries, csc.start[f], csc.start[f + 1], c, left, bases[warp],
                     partial + c, padded(width), slots[warp]);
    float sum[kLaneChannels];
    load_lane<kPack>(slots[warp], left, sum);
    store_lane_as<kPack>(table, dtype, f * width + c, left, sum);
  });
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

template <int kPack>
cudaError_t launch_decode_table_typed(const DecodeBackwardParams& p, const Csc& csc, int64_t tiles,
                                      float* partial, cudaStream_t stream) {
  const int64_t threads = strip_threads(p.width);
  const GradMatrix grad = {p.grad, p.grad_row};
  if (tiles > 0) {
    const cudaError_t status = launch(decode_tiles_kernel<kPack>, tiles, threads, 0, stream, grad,
                                      csc, p.features, p.width, partial);
    if (status != cudaSuccess) return status;
  }
  return launch(decode_table_kernel<kPack>, p.features, threads, 0, stream, grad, csc, p.width,
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
  const bool wide = p.width % 4 == 0 && packs(p.grad, p.grad_row, 4, 4);
  return wide ? launch_decode_table_typed<4>(p, csc, list_tile_count(s), partial, stream)
              : launch_decode_table_typed<1>(p, csc, list_tile_count(s), partial, stream);
}

}  // namespace sidechain::cuda
