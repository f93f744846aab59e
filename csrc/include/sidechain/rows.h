// SPDX-License-Identifier: Apache-2.0
// Rows of a store: where a shuffled order is, and copies of rows that lie anywhere in memory.
// The definitions are python/sidechain/store/permutation.py and gather.py.
#pragma once

#include <array>
#include <cstdint>

namespace sidechain {

constexpr int kOrderRounds = 8;

// A bijection of [0, size): a Feistel network on low_bits + high_bits bits, walked until inside.
struct Order {
  uint64_t size = 1;
  int low_bits = 1;
  int high_bits = 0;
  std::array<uint64_t, kOrderRounds> keys{};
};

// rows[i] = order of positions[i], i < count; every position within [0, size).
void permute(const Order& order, const int64_t* positions, int64_t count, int64_t* rows);

// out[i] = the row_bytes bytes at sources[i], i < count. Neither aligned nor of a special size.
void gather_rows(const uint8_t* const* sources, int64_t count, int64_t row_bytes, uint8_t* out);

}  // namespace sidechain
