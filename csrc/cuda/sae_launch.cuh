// SPDX-License-Identifier: Apache-2.0
// Launches of sae_update_ and sae_gradient_square: workspace, widths of accesses, order of kernels.
//
// Kernels in the order of their launches; u = the first op, s = the second. E = entries of all
// groups (capacity of CSR codes), B = 2048 blocks, or F if that is less (256 where a row of a block
// is too long for shared memory), D = d_in + d_out. Gathers come from the second-level cache for
// the most part, the rest from memory.
//
// kernel                 op  grid       reads                        writes             bytes
// csc_count, csc_scatter us  at most    values, indices, dvalues     lists: entries by  about 40 E
//                            128        (later passes: entries)      feature            a pass
// csc_start              us  F / 256    keys (2 passes and more)     list starts        4 (E + F)
// adam_step_kernel       u   1          lr, step, clip_scale         AdamStep           < 100
// sae_tiles_kernel       us  E / 512    x, error of whole tiles      sums of the tiles  gathers +
//                                                                                       D E / 128
// sae_update_kernel      u   B          lists, x, error, sums of     weights, state,    gathers +
//                                       tiles, weights, state        last_fired         24 F D
// sae_fold_kernel        u   d_in / 32  b_pre_grad of the blocks     b_pre_grad         4 B d_in
// sae_square_kernel      s   B          lists, x, error, sums of     sums of blocks     gathers +
//                                       tiles, w_dec                                    4 F d_out
// sae_fold_square_kernel s   1          sums of blocks               the sum            8 B
//
// The gathers of both kernels together are E (d_in sizeof(x) + 4 d_out) bytes; 24 is 16 with a
// bfloat16 state. sae_fold_kernel runs where b_pre_grad is wanted.
#pragma once

#include "cuda/sae_update.cuh"

namespace sidechain::cuda {

struct SaeWorkspace {
  char* csc;
  float *partial, *rows, *b_pre_parts;
  double* square_parts;
  AdamStep* step;
  int64_t blocks, threads, row_stride, shared_bytes;
  int64_t bytes;
};

inline CscSource sae_source(const SaeGradientParams& p) {
  CscSource s = {};
  for (int32_t g = 0; g < p.group_count; ++g) s.groups[g] = p.groups[g];
  s.group_count = p.group_count;
  s.features = p.features;
  s.first_feature = p.first_feature;
  return s;
}

// Parts of `memory`, each a multiple of 16 bytes; memory = nullptr only measures.
inline SaeWorkspace sae_workspace(const SaeGradientParams& p, bool b_pre_grad, bool square,
                                  void* memory) {
  SaeWorkspace w = {};
  const auto take = [&](int64_t bytes) -> char* {
    char* const at = static_cast<char*>(memory) + w.bytes;
    w.bytes += (bytes + 15) / 16 * 16;
    return memory != nullptr ? at : nullptr;
  };
  const CscSource s = sae_source(p);
  w.row_stride = padded(p.d_in > p.d_out ? p.d_in : p.d_out);
  w.threads = strip_threads(p.d_in > p.d_out ? p.d_in : p.d_out);
  const int64_t own = (w.row_stride + (b_pre_grad ? padded(p.d_in) : 0)) * 4;
  const bool shared = own <= kFeatureShared;
  w.shared_bytes = shared ? own : 0;
  w.blocks = shared ? kFeatureBlocks : kFeatureBlocks / 8;
  if (w.blocks > p.features) w.blocks = p.features;
  w.csc = take(csc_workspace(s, nullptr).bytes);
  w.partial = reinterpret_cast<float*>(take(list_tile_count(s) * partial_stride(p) * 4));
  if (!shared) w.rows = reinterpret_cast<float*>(take(w.blocks * w.row_stride * 4));
  if (b_pre_grad) w.b_pre_parts = reinterpret_cast<float*>(take(w.blocks * padded(p.d_in) * 4));
  w.step = reinterpret_cast<AdamStep*>(take(sizeof(AdamStep)));
  if (square) w.square_parts = reinterpret_cast<double*>(take(w.blocks * 8));
  return w;
}

// Whether every row the kernels touch can be moved 16 bytes at a time.
inline bool wide_gradient(const SaeGradientParams& p, const float* w_dec) {
  const int64_t size = size_of(p.x_dtype), pack = 16 / size;
  bool wide = p.d_in % pack == 0 && p.d_out % 4 == 0 && packs(w_dec, p.d_out, 4, 4) &&
              packs(p.x, p.x_row, size, pack);
  for (int32_t i = 0; i < p.group_count; ++i) {
    const CodeGroup& g = p.groups[i];
    wide = wide && packs(g.error, g.error_row, 4, 4) && g.error_level % 4 == 0;
  }
  return wide;
}
inline bool wide_update(const SaeUpdateParams& p) {
  const SaeState& s = p.state;
  const int64_t d_in = p.gradient.d_in, d_out = p.gradient.d_out, m = size_of(s.dtype);
  return wide_gradient(p.gradient, s.w_dec) && packs(s.w_enc, d_in, 4, 4) &&
         packs(s.enc_mean, d_in, m, 4) && packs(s.enc_square, d_in, m, 4) &&
         packs(s.dec_mean, d_out, m, 4) && packs(s.dec_square, d_out, m, 4);
}

// What the launches of both ops share.
struct SaePlan {
  SaeWorkspace workspace;
  FeatureLayout layout;
  int64_t tiles;
};

inline cudaError_t sae_plan(const SaeGradientParams& p, bool b_pre_grad, bool square, void* memory,
                            cudaStream_t stream, SaePlan* plan) {
  const CscSource s = sae_source(p);
  const SaeWorkspace w = sae_workspace(p, b_pre_grad, square, memory);
  Csc csc = {};
  const cudaError_t status = build_csc(s, w.csc, stream, &csc);
  *plan = {w,
           {csc, w.partial, w.rows, w.row_stride, w.b_pre_parts, w.square_parts, w.step},
           list_tile_count(s)};
  return status;
}

template <class X, bool kWide>
cudaError_t launch_tiles(const SaeGradientParams& p, const SaePlan& plan, cudaStream_t stream) {
  if (plan.tiles == 0 || p.features == 0) return cudaSuccess;
  const int64_t threads = strip_threads(p.d_in + p.d_out);
  return launch(sae_tiles_kernel<X, kWide>, plan.tiles, threads, 0, stream, p, plan.layout.csc,
                plan.workspace.partial);
}

template <class... Params, class... Args>
cudaError_t launch_features(void (*kernel)(Params...), const SaeGradientParams& p,
                            const SaePlan& plan, cudaStream_t stream, const Args&... args) {
  if (p.features == 0) return cudaSuccess;
  const SaeWorkspace& w = plan.workspace;
  return launch(kernel, w.blocks, w.threads, w.shared_bytes, stream, args...);
}

struct LaunchUpdate {
  const SaeUpdateParams& p;
  const SaePlan& plan;
  cudaStream_t stream;
  template <class X, bool kWide>
  cudaError_t run() const {
    cudaError_t status = launch(adam_step_kernel, 1, 1, 0, stream, p, plan.workspace.step);
    if (status == cudaSuccess) status = launch_tiles<X, kWide>(p.gradient, plan, stream);
    if (status != cudaSuccess) return status;
    return launch_features(sae_update_kernel<X, kWide>, p.gradient, plan, stream, p, plan.layout);
  }
};

struct LaunchSquare {
  const SaeGradientParams& p;
  const float* w_dec;
  const SaePlan& plan;
  cudaStream_t stream;
  template <class X, bool kWide>
  cudaError_t run() const {
    const cudaError_t status = launch_tiles<X, kWide>(p, plan, stream);
    if (status != cudaSuccess) return status;
    return launch_features(sae_square_kernel<X, kWide>, p, plan, stream, p, w_dec, plan.layout);
  }
};

template <class Launch>
cudaError_t launch_for(Dtype x, bool wide, const Launch& with) {
  switch (x) {
    case Dtype::kFloat32:
      return wide ? with.template run<float, true>() : with.template run<float, false>();
    case Dtype::kFloat16:
      return wide ? with.template run<__half, true>() : with.template run<__half, false>();
    case Dtype::kBFloat16:
      return wide ? with.template run<__nv_bfloat16, true>()
                  : with.template run<__nv_bfloat16, false>();
  }
  return cudaErrorInvalidValue;
}

// Bytes of workspace for launch_sae_update; their contents do not matter.
inline int64_t sae_update_workspace(const SaeUpdateParams& p) {
  return sae_workspace(p.gradient, p.b_pre_grad != nullptr, false, nullptr).bytes;
}

inline cudaError_t launch_sae_update(const SaeUpdateParams& p, void* workspace,
                                     cudaStream_t stream) {
  SaePlan plan = {};
  cudaError_t status =
      sae_plan(p.gradient, p.b_pre_grad != nullptr, false, workspace, stream, &plan);
  if (status != cudaSuccess) return status;
  status = launch_for(p.gradient.x_dtype, wide_update(p), LaunchUpdate{p, plan, stream});
  const int64_t d_in = p.gradient.d_in;
  if (status != cudaSuccess || p.b_pre_grad == nullptr || d_in == 0) return status;
  const float* const parts = plan.workspace.b_pre_parts;
  return launch(sae_fold_kernel, (d_in + 31) / 32, kFoldThreads, 0, stream, parts,
                plan.workspace.blocks, d_in, p.b_pre_grad);
}

inline int64_t sae_square_workspace(const SaeGradientParams& p) {
  return sae_workspace(p, false, true, nullptr).bytes;
}

inline cudaError_t launch_sae_square(const SaeGradientParams& p, const float* w_dec, float* out,
                                     void* workspace, cudaStream_t stream) {
  SaePlan plan = {};
  cudaError_t status = sae_plan(p, false, true, workspace, stream, &plan);
  if (status != cudaSuccess) return status;
  const bool wide = wide_gradient(p, w_dec);
  status = launch_for(p.x_dtype, wide, LaunchSquare{p, w_dec, plan, stream});
  if (status != cudaSuccess) return status;
  const double* const parts = plan.workspace.square_parts;
  return launch(sae_fold_square_kernel, 1, kFoldThreads, 0, stream, parts, plan.workspace.blocks,
                out);
}

}  // namespace sidechain::cuda
