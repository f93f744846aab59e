// SPDX-License-Identifier: Apache-2.0
// What the kernels of tap_ do with one row and with one group of its tokens, held in registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/tap_plan.cuh"
#include "cuda/vec.cuh"
#include "sidechain/tap.h"

namespace sidechain::cuda {

// What a kernel is compiled for. Sums over channels, which need barriers, are left out where
// neither removal nor renorm was given.
enum TapWork : unsigned { kTapCapture = 1, kTapSteer = 2, kTapProject = 4 };

// What the host finds out about a call.
struct TapLayout {
  int64_t chunks;  // of a row
  int teams, team_threads, tokens;
  bool direct;
  bool vectors_aligned, ring_aligned;
  float* workspace;  // [R, chunks, 2, C], nullptr = no partial sums
};

// What one row asks for; the same in every thread of a block.
struct TapRow {
  const float* v;  // [C], nullptr = not steered
  float a, b;
  int64_t capture_slot;
  bool to_sums, to_ring;
};

// Tokens of a team as bits, the first token the lowest.
struct TapTokens {
  unsigned captured, steered;
};

// Up to kTapGroup tokens of a team: the bit of each (0 for none) and its number.
struct TapGroup {
  unsigned bit[kTapGroup];
};

__device__ inline bool tap_inside(int64_t slot, int64_t slots) { return slot >= 0 && slot < slots; }

__device__ inline bool tap_holds(const TokenMask& mask, int64_t row, int64_t token) {
  return mask.data == nullptr || mask.data[row * mask.row + token * mask.token] != 0;
}

template <unsigned kWork>
__device__ inline TapRow tap_row(const TapParams& p, int64_t row) {
  TapRow result = {};
  if (kWork & kTapCapture) {
    const int64_t slot = p.capture_slot != nullptr ? *p.capture_slot : 0;
    result.capture_slot = slot;
    result.to_ring = p.ring.data != nullptr && tap_inside(slot, p.ring.slots);
    result.to_sums = (p.sums.data != nullptr && tap_inside(slot, p.sums.slots)) ||
                     (p.squares.data != nullptr && tap_inside(slot, p.squares.slots));
  }
  if (kWork & kTapSteer) {
    result.a = p.strength != nullptr ? p.strength[row * p.strength_stride] : 0.0f;
    if (kWork & kTapProject) {
      result.b = p.removal != nullptr ? p.removal[row * p.removal_stride] : 0.0f;
    }
    const int64_t which = p.index != nullptr ? p.index[row * p.index_stride] : 0;
    const int64_t slot = p.steer_slot != nullptr ? *p.steer_slot : 0;
    if ((result.a != 0.0f || result.b != 0.0f) && tap_inside(which, p.vector_count) &&
        tap_inside(slot, p.vector_slots)) {
      result.v = p.vectors + which * p.vector_stride + slot * p.vector_slot_stride;
    }
  }
  return result;
}

// Lane i of every warp looks at token begin + i: one load a mask for all tokens of a team.
template <unsigned kWork>
__device__ inline TapTokens tap_tokens(const TapParams& p, const TapLayout& layout, int64_t row,
                                       int64_t begin) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  const int64_t token = begin + lane;
  const bool here = lane < layout.tokens && token < p.tokens;
  TapTokens tokens = {};
  if (kWork & kTapCapture) {
    tokens.captured = __ballot_sync(kAll, here && tap_holds(p.capture_mask, row, token));
  }
  if (kWork & kTapSteer) {
    tokens.steered = __ballot_sync(kAll, here && tap_holds(p.steer_mask, row, token));
  }
  return tokens;
}

// Takes the lowest bits of `left`.
__device__ inline TapGroup tap_pick(unsigned& left) {
  TapGroup group;
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) {
    group.bit[i] = left & (0u - left);
    left &= left - 1;
  }
  return group;
}

// Elements of one token as they lie in memory: a pass converts them when it needs them.
template <class T, int kWidth, bool kWords = sizeof(T) * kWidth == 16>
struct Held {
  T item[kWidth];
  __device__ float get(int i) const { return to_float(item[i]); }
};

// 16 bytes as four words: elements of 2 bytes would each take a register.
template <class T, int kWidth>
struct alignas(16) Held<T, kWidth, true> {
  uint32_t word[4];
  __device__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
    } else {
      Pack<T, 2> pair;
      memcpy(&pair, &word[i / 2], 4);
      return to_float(pair.item[i % 2]);
    }
  }
};

__device__ inline int64_t tap_offset(unsigned bit, int64_t stride) {
  return static_cast<unsigned>(__ffs(bit) - 1) * stride;
}

// All loads of a group, with no branch between them: where tokens are missing, the first again.
template <class T, int kWidth>
__device__ inline void tap_hold(const T* x, int64_t x_token, const TapGroup& group,
                                Held<T, kWidth> (&held)[kTapGroup]) {
  if (group.bit[0] == 0) return;
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) {
    const unsigned bit = group.bit[i] != 0 ? group.bit[i] : group.bit[0];
    held[i] = *reinterpret_cast<const Held<T, kWidth>*>(x + tap_offset(bit, x_token));
  }
}

// Adds to the sums over tokens and to dot: [<x, x> of each token, <x, v> of each token].
template <unsigned kWork, class T, int kWidth>
__device__ inline void tap_measure(const Held<T, kWidth> (&held)[kTapGroup], const TapGroup& group,
                                   unsigned sum, bool project, const float (&direction)[kWidth],
                                   float (&total)[kWidth], float (&square)[kWidth],
                                   float (&dot)[2 * kTapGroup]) {
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) {
    if ((kWork & kTapCapture) && (group.bit[i] & sum) != 0) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float value = held[i].get(k);
        total[k] += value;
        square[k] += value * value;
      }
    }
    if ((kWork & kTapProject) && project) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float value = held[i].get(k);
        dot[i] += value * value;
        dot[kTapGroup + i] += value * direction[k];
      }
    }
  }
}

// Copies the tokens of a group that are in `copy`, as elements of R.
template <class R, class T, int kWidth>
__device__ inline void tap_copy_as(const TapParams& p, bool aligned, int64_t offset, unsigned copy,
                                   const TapGroup& group,
                                   const Held<T, kWidth> (&held)[kTapGroup]) {
  R* const to = static_cast<R*>(p.ring.data) + offset;
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) {
    if ((group.bit[i] & copy) == 0) continue;
    float value[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) value[k] = held[i].get(k);
    store(to + tap_offset(group.bit[i], p.ring.token), aligned, value);
  }
}

// Copies to the ring, channel c on; `begin` is the first token of the team.
template <class T, int kWidth>
__device__ inline void tap_copy(const TapParams& p, bool aligned, int64_t row, int64_t slot,
                                int64_t begin, int64_t c, unsigned copy, const TapGroup& group,
                                const Held<T, kWidth> (&held)[kTapGroup]) {
  const int64_t offset = slot * p.ring.slot + row * p.ring.row + begin * p.ring.token + c;
  switch (p.ring.dtype) {
    case Dtype::kFloat32:
      return tap_copy_as<float>(p, aligned, offset, copy, group, held);
    case Dtype::kFloat16:
      return tap_copy_as<__half>(p, aligned, offset, copy, group, held);
    case Dtype::kBFloat16:
      return tap_copy_as<__nv_bfloat16>(p, aligned, offset, copy, group, held);
  }
}

// a - b <x, v>+ of each token; `sums` of lane l is that of dot[l % (2 kTapGroup)].
__device__ inline void tap_along(const TapRow& wanted, float sums, float (&along)[kTapGroup]) {
  // Written so that a NaN projection stays NaN.
  const float xv = sums < 0.0f ? 0.0f : sums;
  const float mine = wanted.b != 0.0f ? wanted.a - wanted.b * xv : wanted.a;
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) {
    along[i] = __shfl_sync(0xffffffffu, mine, kTapGroup + i);
  }
}

// Adds |x + along v|^2 of each token, from the elements: the expansion in <x, v> cancels for short
// y.
template <class T, int kWidth>
__device__ inline void tap_norms(const Held<T, kWidth> (&held)[kTapGroup],
                                 const float (&direction)[kWidth], const float (&along)[kTapGroup],
                                 float (&yy)[kTapGroup]) {
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float y = held[i].get(k) + along[i] * direction[k];
      yy[i] += y * y;
    }
  }
}

// |x| / |y| of each token; lane i < kTapGroup has the squares of token i.
__device__ inline void tap_scale(float xx, float yy, float (&scale)[kTapGroup]) {
  const float mine = yy == 0.0f ? 1.0f : sqrtf(xx) / sqrtf(yy);
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) scale[i] = __shfl_sync(0xffffffffu, mine, i);
}

// x <- (x + along v) scale; without kTapProject, scale is 1.
template <unsigned kWork, class T, int kWidth>
__device__ inline void tap_move(T* x, int64_t x_token, const TapGroup& group, unsigned steered,
                                const Held<T, kWidth> (&held)[kTapGroup],
                                const float (&direction)[kWidth], const float (&along)[kTapGroup],
                                const float (&scale)[kTapGroup]) {
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) {
    if ((group.bit[i] & steered) == 0) continue;
    float y[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      y[k] = held[i].get(k) + along[i] * direction[k];
      if (kWork & kTapProject) y[k] *= scale[i];
    }
    store(x + tap_offset(group.bit[i], x_token), y);
  }
}

}  // namespace sidechain::cuda
