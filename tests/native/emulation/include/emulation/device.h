// SPDX-License-Identifier: Apache-2.0
// Device side of the emulation: indices, barriers, warp collectives, atomics, cached accesses.
#pragma once

#include <cstring>
#include <type_traits>

#include "emulation/runtime.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // counted by the symbol table: runtime/image.h
#define __grid_constant__

constexpr int warpSize = 32;

// ---- barriers ----

inline void __syncthreads(EMULATION_SITE) { emulation::barrier(false, {file, line}); }
inline int __syncthreads_count(int predicate, EMULATION_SITE) {
  return emulation::barrier(predicate != 0, {file, line}).count;
}
inline int __syncthreads_or(int predicate, EMULATION_SITE) {
  return emulation::barrier(predicate != 0, {file, line}).count > 0;
}
inline int __syncthreads_and(int predicate, EMULATION_SITE) {
  const emulation::Votes votes = emulation::barrier(predicate != 0, {file, line});
  return votes.count == votes.threads;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) {
  emulation::collective(emulation::Collective::kSync, mask, 0, 0, 32, {file, line});
}
// Blocks run one after the other, and only barriers order the threads of one.
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warp collectives ----

namespace emulation {

template <class T>
T shuffle(Collective kind, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(kind, mask, bits, argument, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

}  // namespace emulation

#define EMULATION_SHUFFLE(NAME, KIND, ARGUMENT)                                       \
  template <class T>                                                                  \
  T NAME(unsigned mask, T value, ARGUMENT argument, int width = 32, EMULATION_SITE) { \
    return emulation::shuffle(emulation::Collective::KIND, mask, value,               \
                              static_cast<int>(argument), width, {file, line});       \
  }
EMULATION_SHUFFLE(__shfl_sync, kShuffle, int)
EMULATION_SHUFFLE(__shfl_up_sync, kShuffleUp, unsigned)
EMULATION_SHUFFLE(__shfl_down_sync, kShuffleDown, unsigned)
EMULATION_SHUFFLE(__shfl_xor_sync, kShuffleXor, int)
#undef EMULATION_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return static_cast<unsigned>(emulation::collective(emulation::Collective::kBallot, mask,
                                                     predicate != 0, 0, 32, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return static_cast<int>(emulation::collective(emulation::Collective::kAny, mask, predicate != 0,
                                                0, 32, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return static_cast<int>(emulation::collective(emulation::Collective::kAll, mask, predicate != 0,
                                                0, 32, {file, line}));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATION_SITE) {
  return static_cast<unsigned>(emulation::collective(
      emulation::Collective::kMatchAny, mask, emulation::bits_of(value), 0, 32, {file, line}));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, EMULATION_SITE) {
  const uint64_t met = emulation::collective(emulation::Collective::kMatchAll, mask,
                                             emulation::bits_of(value), 0, 32, {file, line});
  *all = met != 0;
  return static_cast<unsigned>(met);
}

#define EMULATION_REDUCE(NAME, T, KIND)                                                         \
  inline T NAME(unsigned mask, T value, EMULATION_SITE) {                                       \
    return static_cast<T>(emulation::collective(                                                \
        emulation::Collective::KIND, mask, static_cast<unsigned>(value), 0, 32, {file, line})); \
  }
EMULATION_REDUCE(__reduce_add_sync, unsigned, kReduceAdd)
EMULATION_REDUCE(__reduce_add_sync, int, kReduceAdd)
EMULATION_REDUCE(__reduce_min_sync, unsigned, kReduceMin)
EMULATION_REDUCE(__reduce_min_sync, int, kReduceMinSigned)
EMULATION_REDUCE(__reduce_max_sync, unsigned, kReduceMax)
EMULATION_REDUCE(__reduce_max_sync, int, kReduceMaxSigned)
EMULATION_REDUCE(__reduce_and_sync, unsigned, kReduceAnd)
EMULATION_REDUCE(__reduce_or_sync, unsigned, kReduceOr)
EMULATION_REDUCE(__reduce_xor_sync, unsigned, kReduceXor)
#undef EMULATION_REDUCE

// ---- atomics: fibers switch only where they wait, so plain code is indivisible ----

// Not instrumented: the order checker hears of the access as an atomic one.
#define EMULATION_ATOMIC(NAME, RESULT)                                                     \
  template <class T>                                                                       \
  __attribute__((no_sanitize("thread"), noinline)) T NAME(T* p, std::common_type_t<T> v) { \
    emulation::note_atomic(p, sizeof(T));                                                  \
    const T old = *p;                                                                      \
    *p = RESULT;                                                                           \
    return old;                                                                            \
  }
EMULATION_ATOMIC(atomicAdd, old + v)
EMULATION_ATOMIC(atomicSub, old - v)
EMULATION_ATOMIC(atomicExch, v)
EMULATION_ATOMIC(atomicMin, v < old ? v : old)
EMULATION_ATOMIC(atomicMax, old < v ? v : old)
EMULATION_ATOMIC(atomicAnd, old& v)
EMULATION_ATOMIC(atomicOr, old | v)
EMULATION_ATOMIC(atomicXor, old ^ v)
#undef EMULATION_ATOMIC

template <class T>
__attribute__((no_sanitize("thread"), noinline)) T atomicCAS(T* p, std::common_type_t<T> expected,
                                                             std::common_type_t<T> desired) {
  emulation::note_atomic(p, sizeof(T));
  const T old = *p;
  if (old == expected) *p = desired;
  return old;
}

// ---- loads and stores with a cache hint ----

#define EMULATION_LOAD(NAME) \
  template <class T>         \
  T NAME(const T* p) {       \
    return *p;               \
  }
EMULATION_LOAD(__ldg)
EMULATION_LOAD(__ldca)
EMULATION_LOAD(__ldcg)
EMULATION_LOAD(__ldcs)
EMULATION_LOAD(__ldlu)
#undef EMULATION_LOAD

#define EMULATION_STORE(NAME)                       \
  template <class T>                                \
  void NAME(T* p, const std::common_type_t<T>& v) { \
    *p = v;                                         \
  }
EMULATION_STORE(__stwb)
EMULATION_STORE(__stcg)
EMULATION_STORE(__stcs)
EMULATION_STORE(__stwt)
#undef EMULATION_STORE
