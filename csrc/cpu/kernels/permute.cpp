// SPDX-License-Identifier: Apache-2.0
// Loop body of permute, compiled once per instruction set: whole numbers, so the same everywhere.
#include "cpu/kernels/permute.h"

#if SIDECHAIN_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {
namespace {

#include "cpu/kernels/vec-inl.h"

constexpr int kIndices = kLanes / 2;
static_assert(kMostIndices % kIndices == 0, "whole vectors are read and written");

typedef uint64_t U64 __attribute__((vector_size(8 * kIndices)));

inline U64 mix(U64 value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

}  // namespace

void permute_once(const Order& order, const uint64_t* indices, int64_t count, uint64_t* passed) {
  const uint64_t low_mask = (uint64_t{1} << order.low_bits) - 1;
  const uint64_t high_mask = (uint64_t{1} << order.high_bits) - 1;
  for (int64_t i = 0; i < count; i += kIndices) {
    U64 index;
    __builtin_memcpy(&index, indices + i, sizeof(index));
    U64 low = index & low_mask, high = index >> order.low_bits;
    for (int round = 0; round < kOrderRounds; round += 2) {
      low ^= mix(high + order.keys[round]) & low_mask;
      high ^= mix(low + order.keys[round + 1]) & high_mask;
    }
    index = high << order.low_bits | low;
    __builtin_memcpy(passed + i, &index, sizeof(index));
  }
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
