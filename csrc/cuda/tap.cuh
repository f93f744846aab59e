// SPDX-License-Identifier: Apache-2.0
// tap_ on CUDA. Contract: csrc/include/sidechain/tap.h; every pointer lies on the device.
//
// Blocks: one per (row, chunk of tokens), of one or several teams of warps; a team owns up to
// kTapTokens tokens, and each of its threads one pack of 16 bytes of every token. A group of
// kTapGroup tokens is loaded at once and stays in registers until it is written: 2 sizeof(T) bytes
// per element move, which bounds the kernel. Sums over tokens stay in registers too, are added over
// the teams and go to a workspace; a second launch adds the chunks in a fixed order, so that the
// result does not depend on scheduling. Where one block holds a row, it adds to the capture buffers
// itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shared.cuh"
#include "cuda/tap_fold.cuh"
#include "cuda/tap_passes.cuh"
#include "cuda/tap_plan.cuh"
#include "cuda/vec.cuh"
#include "sidechain/tap.h"

namespace sidechain::cuda {

constexpr int kTapScratch = kTapThreads / 32 * 2 * kTapGroup;

// A sum of this block over its tokens, of channel c.
__device__ inline void tap_deliver(const TapParams& p, const TapLayout& layout, int64_t slot,
                                   unsigned row, unsigned chunk, bool squares, int64_t c,
                                   float value) {
  if (!layout.direct) {
    const int64_t partial = (row * layout.chunks + chunk) * 2 + (squares ? 1 : 0);
    layout.workspace[partial * p.channels + c] = value;
    return;
  }
  const SumBuffer to = squares ? p.squares : p.sums;
  if (to.data == nullptr || !tap_inside(slot, to.slots)) return;
  to.data[slot * to.slot + row * to.row + c] += value;
}

// Adds the sums of the teams of a block in order, through shared memory [teams, 2, C].
template <int kWidth>
__device__ inline void tap_finish(const TapParams& p, const TapLayout& layout, int64_t slot,
                                  unsigned row, unsigned chunk, int team, int c,
                                  const float (&total)[kWidth], const float (&square)[kWidth]) {
  const int channels = static_cast<int>(p.channels);
  if (layout.teams == 1) {
    if (c >= channels) return;
    if (!layout.direct) {
      float* const to = layout.workspace + (row * layout.chunks + chunk) * 2 * p.channels + c;
      store(to, total);
      store(to + channels, square);
      return;
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      tap_deliver(p, layout, slot, row, chunk, false, c + k, total[k]);
      tap_deliver(p, layout, slot, row, chunk, true, c + k, square[k]);
    }
    return;
  }
  float* const all = dynamic_shared<float>();
  if (c < channels) {
    store(all + team * 2 * channels + c, total);
    store(all + team * 2 * channels + channels + c, square);
  }
  __syncthreads();
  for (int n = threadIdx.x; n < 2 * channels; n += blockDim.x) {
    float sum = 0.0f;
    for (int i = 0; i < layout.teams; ++i) sum += all[i * 2 * channels + n];
    const bool squares = n >= channels;
    tap_deliver(p, layout, slot, row, chunk, squares, squares ? n - channels : n, sum);
  }
}

template <class T, unsigned kWork>
__global__ void __launch_bounds__(kTapThreads)
    tap_kernel(const TapParams p, const TapLayout layout) {
  constexpr int kWidth = 16 / sizeof(T);
  // Two places in turn keep one sum's reads apart from the next one's writes.
  __shared__ float scratch[kWork & kTapProject ? 2 * kTapScratch : 1];
  const unsigned row = blockIdx.x / static_cast<unsigned>(layout.chunks);
  const unsigned chunk = blockIdx.x - row * static_cast<unsigned>(layout.chunks);
  const int team = threadIdx.x / layout.team_threads;
  const int c = (threadIdx.x - team * layout.team_threads) * kWidth;
  const int64_t begin = (static_cast<int64_t>(chunk) * layout.teams + team) * layout.tokens;
  const TapRow wanted = tap_row<kWork>(p, row);
  const TapTokens tokens = tap_tokens<kWork>(p, layout, row, begin);
  if ((kWork & kTapCapture) && layout.direct && p.counts.data != nullptr &&
      tap_inside(wanted.capture_slot, p.counts.slots)) {
    const bool mine = c < 32 * kWidth && (tokens.captured >> threadIdx.x % 32 & 1u) != 0;
    const int count = __syncthreads_count(mine);
    if (threadIdx.x == 0) {
      p.counts.data[wanted.capture_slot * p.counts.slot + row * p.counts.row] +=
          static_cast<float>(count);
    }
  }

  const unsigned sum = wanted.to_sums ? tokens.captured : 0;
  const unsigned copy = wanted.to_ring ? tokens.captured : 0;
  const unsigned steered = wanted.v != nullptr ? tokens.steered : 0;
  const bool active = c < p.channels;
  T* const x = static_cast<T*>(p.x) + row * p.x_row + begin * p.x_token + c;
  float direction[kWidth] = {}, total[kWidth] = {}, square[kWidth] = {};
  if ((kWork & kTapSteer) && wanted.v != nullptr && active) {
    load(wanted.v + c, layout.vectors_aligned, direction);
  }

  // Sums over channels meet at barriers: then all teams of a block make the same rounds.
  const bool project =
      (kWork & kTapProject) && wanted.v != nullptr && (p.renorm || wanted.b != 0.0f);
  const int warps = layout.team_threads / 32, warp = threadIdx.x / 32 - team * warps;
  float* const mine = scratch + team * warps * 2 * kTapGroup;
  int turn = 0;
  unsigned left = sum | copy | steered;
  for (int round = 0; round < layout.tokens; round += kTapGroup) {
    if (left == 0 && (!project || warps == 1)) break;
    const TapGroup group = tap_pick(left);
    Held<T, kWidth> held[kTapGroup] = {};
    float dot[2 * kTapGroup] = {};
    if (active) {
      tap_hold(x, p.x_token, group, held);
      tap_measure<kWork>(held, group, sum, project, direction, total, square, dot);
      if ((kWork & kTapCapture) && copy != 0) {
        tap_copy(p, layout.ring_aligned, row, wanted.capture_slot, begin, c, copy, group, held);
      }
    }
    if constexpr ((kWork & kTapSteer) != 0) {
      if (wanted.v == nullptr) continue;
      float along[kTapGroup], scale[kTapGroup];
#pragma unroll
      for (int i = 0; i < kTapGroup; ++i) along[i] = wanted.a, scale[i] = 1.0f;
      if (project) {
        const float sums = team_sums(dot, mine + turn * kTapScratch, warps, warp);
        turn ^= 1;
        tap_along(wanted, sums, along);
        if (p.renorm) {
          float yy[kTapGroup] = {};
          if (active) tap_norms(held, direction, along, yy);
          tap_scale(sums, team_sums(yy, mine + turn * kTapScratch, warps, warp), scale);
          turn ^= 1;
        }
      }
      if (active) tap_move<kWork>(x, p.x_token, group, steered, held, direction, along, scale);
    }
  }
  if ((kWork & kTapCapture) && wanted.to_sums) {
    tap_finish(p, layout, wanted.capture_slot, row, chunk, team, c, total, square);
  }
}

// Rows that one pack a thread does not cover, and layouts without packs: the block loops over
// channels, reads a group again from the cache in every pass, and keeps its sums in the workspace,
// where a thread touches only its own channels.
template <class T, int kWidth>
__global__ void __launch_bounds__(kTapWideThreads)
    tap_wide_kernel(const TapParams p, const TapLayout layout) {
  constexpr unsigned kWork = kTapCapture | kTapSteer | kTapProject;
  __shared__ float scratch[2 * kTapScratch];
  const unsigned row = blockIdx.x / static_cast<unsigned>(layout.chunks);
  const unsigned chunk = blockIdx.x - row * static_cast<unsigned>(layout.chunks);
  const int64_t begin = static_cast<int64_t>(chunk) * layout.tokens;
  const TapRow wanted = tap_row<kWork>(p, row);
  const TapTokens tokens = tap_tokens<kWork>(p, layout, row, begin);
  const unsigned sum = wanted.to_sums ? tokens.captured : 0;
  const unsigned copy = wanted.to_ring ? tokens.captured : 0;
  const unsigned steered = wanted.v != nullptr ? tokens.steered : 0;
  const bool project = wanted.v != nullptr && (p.renorm || wanted.b != 0.0f);
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kWidth;
  T* const x = static_cast<T*>(p.x) + row * p.x_row + begin * p.x_token;
  float* const partial = layout.workspace + (row * layout.chunks + chunk) * 2 * p.channels;
  if (wanted.to_sums) {
    const float zero[kWidth] = {};
    for (int64_t c = first; c < p.channels; c += stride) {
      store(partial + c, zero);
      store(partial + p.channels + c, zero);
    }
  }

  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  int turn = 0;
  for (unsigned left = sum | copy | steered; left != 0;) {
    const TapGroup group = tap_pick(left);
    Held<T, kWidth> held[kTapGroup];
    float direction[kWidth] = {}, dot[2 * kTapGroup] = {};
    for (int64_t c = first; c < p.channels; c += stride) {
      float total[kWidth] = {}, square[kWidth] = {};
      tap_hold(x + c, p.x_token, group, held);
      if (project) load(wanted.v + c, layout.vectors_aligned, direction);
      if (wanted.to_sums) {
        load(partial + c, total);
        load(partial + p.channels + c, square);
      }
      tap_measure<kWork>(held, group, sum, project, direction, total, square, dot);
      if (copy != 0) {
        tap_copy(p, layout.ring_aligned, row, wanted.capture_slot, begin, c, copy, group, held);
      }
      if (wanted.to_sums) {
        store(partial + c, total);
        store(partial + p.channels + c, square);
      }
    }
    if (wanted.v == nullptr) continue;
    float along[kTapGroup], scale[kTapGroup], yy[kTapGroup] = {};
#pragma unroll
    for (int i = 0; i < kTapGroup; ++i) along[i] = wanted.a, scale[i] = 1.0f;
    if (project) {
      const float sums = team_sums(dot, scratch + turn * kTapScratch, warps, warp);
      turn ^= 1;
      tap_along(wanted, sums, along);
      if (p.renorm) {
        for (int64_t c = first; c < p.channels; c += stride) {
          tap_hold(x + c, p.x_token, group, held);
          load(wanted.v + c, layout.vectors_aligned, direction);
          tap_norms(held, direction, along, yy);
        }
        tap_scale(sums, team_sums(yy, scratch + turn * kTapScratch, warps, warp), scale);
        turn ^= 1;
      }
    }
    for (int64_t c = first; c < p.channels; c += stride) {
      tap_hold(x + c, p.x_token, group, held);
      load(wanted.v + c, layout.vectors_aligned, direction);
      tap_move<kWork>(x + c, p.x_token, group, steered, held, direction, along, scale);
    }
  }
}

// Floats of workspace that launch_tap needs; their contents do not matter.
inline int64_t tap_workspace_floats(const TapParams& p) {
  const TapPlan plan = tap_plan(p);
  const bool sums = p.sums.data != nullptr || p.squares.data != nullptr;
  return sums && !plan.direct ? p.rows * plan.chunks * 2 * p.channels : 0;
}

template <class T>
cudaError_t launch_tap_typed(const TapParams& p, const TapPlan& plan, const TapLayout& layout,
                             cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  constexpr unsigned kSteerProject = kTapSteer | kTapProject;
  const bool sums = p.sums.data != nullptr || p.squares.data != nullptr;
  const bool captures = sums || p.ring.data != nullptr || (plan.direct && p.counts.data != nullptr);
  const bool steers = p.vectors != nullptr;
  const bool projects = steers && (p.removal != nullptr || p.renorm);
  if (!captures && !steers) return cudaSuccess;
  auto kernel = plan.packed ? tap_wide_kernel<T, kWidth> : tap_wide_kernel<T, 1>;
  if (plan.held && !steers) {
    kernel = tap_kernel<T, kTapCapture>;
  } else if (plan.held && captures) {
    kernel = projects ? tap_kernel<T, kTapCapture | kSteerProject>
                      : tap_kernel<T, kTapCapture | kTapSteer>;
  } else if (plan.held) {
    kernel = projects ? tap_kernel<T, kSteerProject> : tap_kernel<T, kTapSteer>;
  }
  const size_t bytes = sums && plan.teams > 1 ? plan.teams * 2 * p.channels * sizeof(float) : 0;
  return launch(kernel, p.rows * plan.chunks, plan.threads(), bytes, stream, p, layout);
}

inline cudaError_t launch_tap(const TapParams& p, float* workspace, cudaStream_t stream) {
  if (p.rows == 0 || p.tokens == 0) return cudaSuccess;
  const TapPlan plan = tap_plan(p);
  TapLayout layout = {};
  layout.chunks = plan.chunks;
  layout.teams = plan.teams;
  layout.team_threads = plan.team_threads;
  layout.tokens = plan.tokens;
  layout.direct = plan.direct;
  layout.workspace = workspace;
  layout.vectors_aligned = reinterpret_cast<uintptr_t>(p.vectors) % 16 == 0 &&
                           p.vector_stride % 4 == 0 && p.vector_slot_stride % 4 == 0;
  // 8 elements of any dtype are a multiple of 16 bytes.
  layout.ring_aligned = reinterpret_cast<uintptr_t>(p.ring.data) % 16 == 0 &&
                        p.ring.slot % 8 == 0 && p.ring.row % 8 == 0 && p.ring.token % 8 == 0;
  cudaError_t status = cudaSuccess;
  switch (p.dtype) {
    case Dtype::kFloat32:
      status = launch_tap_typed<float>(p, plan, layout, stream);
      break;
    case Dtype::kFloat16:
      status = launch_tap_typed<__half>(p, plan, layout, stream);
      break;
    case Dtype::kBFloat16:
      status = launch_tap_typed<__nv_bfloat16>(p, plan, layout, stream);
      break;
  }
  if (status != cudaSuccess || plan.direct) return status;
  if (workspace == nullptr && p.counts.data == nullptr) return status;
  return p.channels % 4 == 0 ? launch_tap_fold<4>(p, layout, stream)
                             : launch_tap_fold<1>(p, layout, stream);
}

}  // namespace sidechain::cuda
