// SPDX-License-Identifier: Apache-2.0
#include "sidechain/rows.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/kernels/moments.h"

namespace sidechain {

namespace {

constexpr int64_t kLine = 64;
constexpr uintptr_t kPage = 4096;
// What is fetched ahead: about so many bytes, one row at least, ...
constexpr int64_t kBytesAhead = 2560;
// ... and so many rows before that their pages are looked up; 4 to 16 measure alike.
constexpr int64_t kPagesAhead = 7;

constexpr int64_t kBlock = 256;  // positions walked together

inline uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

// One pass through the Feistel network.
inline uint64_t network(const Order& order, uint64_t index) {
  const uint64_t low_mask = (uint64_t{1} << order.low_bits) - 1;
  const uint64_t high_mask = (uint64_t{1} << order.high_bits) - 1;
  uint64_t low = index & low_mask;
  uint64_t high = index >> order.low_bits;
  for (int round = 0; round < kOrderRounds; round += 2) {
    low ^= mix(high + order.keys[round]) & low_mask;
    high ^= mix(low + order.keys[round + 1]) & high_mask;
  }
  return high << order.low_bits | low;
}

inline void touch_pages(const uint8_t* row, int64_t row_bytes) {
  __builtin_prefetch(row);
  const uint8_t* end = row + row_bytes;
  for (const uint8_t* page = row + (kPage - reinterpret_cast<uintptr_t>(row) % kPage); page < end;
       page += kPage) {
    __builtin_prefetch(page);
  }
}

// Floats of a chunk of moments: 64 KiB, which the second-level cache holds with room to spare.
constexpr int64_t kChunk = 16384;
constexpr int64_t kWidest = 16;  // lanes of the widest vectors

auto moments_entry(Isa isa) {
  switch (isa) {
#define SIDECHAIN_CASE(ID, NAME) \
  case Isa::ID:                  \
    return cpu::NAME::moments_chunk;
    SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_CASE)
#undef SIDECHAIN_CASE
    default:
      return cpu::baseline::moments_chunk;
  }
}

}  // namespace

// Indices that left [0, size) are collected without a branch and walked on together: whether one
// leaves is a coin toss that no predictor learns.
void permute(const Order& order, const int64_t* positions, int64_t count, int64_t* rows) {
  int32_t outside[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t here = std::min(kBlock, count - begin);
    int64_t* row = rows + begin;
    int64_t left = 0;
    for (int64_t i = 0; i < here; ++i) {
      const uint64_t index = network(order, static_cast<uint64_t>(positions[begin + i]));
      row[i] = static_cast<int64_t>(index);
      outside[left] = static_cast<int32_t>(i);
      left += index >= order.size;
    }
    while (left > 0) {
      int64_t still = 0;
      for (int64_t k = 0; k < left; ++k) {
        const int32_t i = outside[k];
        const uint64_t index = network(order, static_cast<uint64_t>(row[i]));
        row[i] = static_cast<int64_t>(index);
        outside[still] = i;
        still += index >= order.size;
      }
      left = still;
    }
  }
}

// One core copies rows from random places as fast as its outstanding misses allow: while a row is
// copied line by line, one of the next is fetched line by line, and the pages of a later one are
// looked up. A plain loop of memcpy waits for the first lines of every row instead.
void gather_rows(const uint8_t* const* sources, int64_t count, int64_t row_bytes, uint8_t* out) {
  const int64_t lines = row_bytes / kLine * kLine;
  const int64_t ahead = std::max<int64_t>(1, kBytesAhead / std::max<int64_t>(1, row_bytes));
  const int64_t pages_ahead = ahead + kPagesAhead;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* source = sources[i];
    const uint8_t* next = sources[i + ahead < count ? i + ahead : i];
    if (i + pages_ahead < count) touch_pages(sources[i + pages_ahead], row_bytes);
    uint8_t* target = out + i * row_bytes;
    for (int64_t offset = 0; offset < lines; offset += kLine) {
      __builtin_prefetch(next + offset);
      std::memcpy(target + offset, source + offset, kLine);
    }
    __builtin_prefetch(next + row_bytes - 1);
    std::memcpy(target + lines, source + lines, static_cast<size_t>(row_bytes - lines));
  }
}

void moments(MomentsParams& p, Isa isa) {
  const auto take_in = moments_entry(isa);
  const int64_t padded = (p.width + kWidest - 1) / kWidest * kWidest;
  const int64_t rows = std::max<int64_t>(1, kChunk / padded);
  const std::unique_ptr<float[]> scratch(new float[rows * padded]());
  for (int64_t begin = 0; begin < p.count; begin += rows) {
    take_in(p, begin, std::min(p.count, begin + rows), padded, scratch.get());
  }
}

}  // namespace sidechain
