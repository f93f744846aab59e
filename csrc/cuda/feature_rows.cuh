// SPDX-License-Identifier: Apache-2.0
// Sums of matrix rows over the list of a feature, shared by what owns features: gradients of the
// decoder and of whole autoencoders.
//
// A warp takes a strip of 256 channels and walks the list; a lane holds eight of them and asks for
// the rows of several entries before it uses one, 16 bytes each time and four such loads at once.
// Asynchronous copies to shared memory can have twice as many under way, but took 7.2 instructions
// an element of bfloat16 (sm_90a) where this takes 4.5.
//
// Feature use is skewed: the hottest fires in half of all rows. Whole tiles of kListTile sorted
// entries that belong to one feature are therefore summed by a block of their own first, and the
// owner adds the tiles in order; where they lie depends on the data alone. At most one tile on
// either end of a list is left to the owner.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/csc.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace sidechain::cuda {

constexpr int kListTile = 512;
constexpr int kLaneChannels = 8, kStrip = 32 * kLaneChannels;
// Entries are added in runs whose sums are added up: long lists lose less to rounding.
constexpr int32_t kRun = 32;

// The list that holds the whole tile, -1 where none does.
__device__ inline int64_t tile_owner(const Csc& csc, int64_t lists, int64_t tile) {
  const int64_t begin = tile * kListTile, end = begin + kListTile;
  if (end > csc.start[lists]) return -1;
  const uint32_t first = csc.keys[begin];
  return first == csc.keys[end - 1] ? static_cast<int64_t>(first) : -1;
}

// Tiles of lists that can be whole.
inline int64_t list_tile_count(const CscSource& s) { return csc_capacity(s) / kListTile; }

// Whole tiles of a list: [first, end) where first < end.
struct ListTiles {
  int32_t first, end;
};
__device__ inline ListTiles list_tiles(int32_t begin, int32_t end) {
  return {(begin + kListTile - 1) / kListTile, end / kListTile};
}

// Rounds row widths up so that packs of rows one behind the other stay aligned.
__host__ __device__ inline int64_t padded(int64_t width) { return (width + 3) / 4 * 4; }

// Warps of a block that takes the strips of rows of this width in turn.
constexpr int kMaxStripWarps = 8;
inline int64_t strip_threads(int64_t width) {
  const int64_t strips = (width + kStrip - 1) / kStrip;
  return 32 * (strips < 1 ? 1 : strips < kMaxStripWarps ? strips : kMaxStripWarps);
}

// Calls body(c, left) for each strip of this warp: its first channel, how many of them there are.
template <class Body>
__device__ inline void for_each_strip(int64_t width, const Body& body) {
  for (int64_t c = threadIdx.x / 32 * kStrip; c < width; c += blockDim.x / 32 * kStrip) {
    body(c, static_cast<int>(min(width - c, static_cast<int64_t>(kStrip))));
  }
}

// A lane's channels of a strip are packs of kPack, 32 kPack apart.
template <int kPack>
__device__ inline int lane_channel(int pack) {
  return (pack * 32 + static_cast<int>(threadIdx.x % 32)) * kPack;
}

// Calls body(channel) for each pack of this lane in the strip at c: one after the other, which
// holds few registers.
template <int kPack, class Body>
__device__ inline void for_each_pack(int64_t c, int left, const Body& body) {
#pragma unroll 1
  for (int at = lane_channel<kPack>(0); at < left; at += 32 * kPack) body(c + at);
}
// The same for all strips of this warp.
template <int kPack, class Body>
__device__ inline void for_each_own_pack(int64_t width, const Body& body) {
  for_each_strip(width, [&](int64_t c, int left) { for_each_pack<kPack>(c, left, body); });
}

// A lane's channels of a strip of a row, packs past the end of the row left out.
template <int kPack, class T>
__device__ inline void load_lane(const T* strip, int left, float (&out)[kLaneChannels]) {
#pragma unroll
  for (int h = 0; h < kLaneChannels / kPack; ++h) {
    float part[kPack] = {};
    if (lane_channel<kPack>(h) < left) load(strip + lane_channel<kPack>(h), part);
#pragma unroll
    for (int i = 0; i < kPack; ++i) out[h * kPack + i] = part[i];
  }
}
template <int kPack, class T>
__device__ inline void store_lane(T* strip, int left, const float (&in)[kLaneChannels]) {
#pragma unroll
  for (int h = 0; h < kLaneChannels / kPack; ++h) {
    float part[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) part[i] = in[h * kPack + i];
    if (lane_channel<kPack>(h) < left) store(strip + lane_channel<kPack>(h), part);
  }
}

// The same to a matrix of any dtype from element `at` on.
template <int kPack>
__device__ inline void store_lane_as(void* p, Dtype dtype, int64_t at, int left,
                                     const float (&in)[kLaneChannels]) {
  switch (dtype) {
    case Dtype::kFloat32:
      return store_lane<kPack>(static_cast<float*>(p) + at, left, in);
    case Dtype::kFloat16:
      return store_lane<kPack>(static_cast<__half*>(p) + at, left, in);
    case Dtype::kBFloat16:
      return store_lane<kPack>(static_cast<__nv_bfloat16*>(p) + at, left, in);
  }
}

// One row's channels of a lane, as they lie in memory: whole words, which hold half as many
// registers as 16-bit elements would.
template <class T, int kPack>
struct LaneRow {
  struct alignas(sizeof(T) * kPack) Words {
    uint32_t word[sizeof(T) * kPack / 4];
  };
  Words pack[kLaneChannels / kPack];

  // Through __ldg: the address comes from shared memory, so nothing else says that it is global.
  __device__ void load(int h, const T* from) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    memcpy(&pack[h], &words, sizeof(words));
  }
  __device__ float channel(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(pack[i / kPack].word[i % kPack]);
    const uint32_t word = pack[i / kPack].word[i % kPack / 2];
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float32
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
    T item[2];
    memcpy(item, &word, sizeof(word));
    return to_float(item[i % 2]);
  }
};
template <class T>
struct LaneRow<T, 1> {
  T item[kLaneChannels];

  __device__ void load(int h, const T* from) { item[h] = __ldg(from); }
  __device__ float channel(int i) const { return to_float(item[i]); }
};

// Rows of a matrix from the first channel of a strip on, stride in bytes: an address is one
// multiplication and addition.
struct RowBase {
  const char* first;
  int64_t stride;
};

// Base of the rows of T that begin at `first` and lie `stride` elements apart.
template <class T>
__device__ inline RowBase row_base(const T* first, int64_t stride) {
  return {reinterpret_cast<const char*>(first), stride * static_cast<int64_t>(sizeof(T))};
}

// The matrix each group of entries reads, of one warp, in shared memory: read where they are used,
// they hold no registers.
struct RowBases {
  RowBase group[kMaxCodeGroups];
};

// What is summed: scale (row - shift), for each entry.
template <class T, int kPack>
struct RowsOf {
  using Item = T;
  static constexpr int kPackWidth = kPack, kPacks = kLaneChannels / kPack;
  // Entries whose rows are under way at once.
  static constexpr int kBatch = kPack == 1 ? 1 : 4 / kPacks;
};

// Adds the sum of a run to the slot, or begins it; a lane touches its own channels.
template <int kPack>
__device__ inline void add_to_slot(float* slot, int left, bool& first,
                                   float (&sum)[kLaneChannels]) {
  if (!first) {
    float before[kLaneChannels];
    load_lane<kPack>(slot, left, before);
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) sum[i] = before[i] + sum[i];
  }
  store_lane<kPack>(slot, left, sum);
  first = false;
}

// sum += the rows of the entries [e, stop) in order, up to kBatch of them; all are under way before
// one is used. Reads entries up to kEntryPadding behind the list, whose rows it does not ask for.
// Lanes past the end of the row read its last pack, which nobody stores.
template <class Rows>
__device__ inline void add_batch(const CscEntry* e, int count, const Rows& rows,
                                 const RowBases& bases, int left, float (&sum)[kLaneChannels]) {
  using T = typename Rows::Item;
  constexpr int kPack = Rows::kPackWidth, kBatch = Rows::kBatch;
  static_assert(kBatch - 1 <= kEntryPadding);
  LaneRow<T, kPack> row[kBatch];
  const char* from[kBatch];
  float scale[kBatch];
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const CscEntry entry = e[j];
    const RowBase base = bases.group[Rows::group_of(entry)];
    from[j] = base.first + static_cast<uint32_t>(entry.row) * base.stride;
    scale[j] = Rows::scale(entry);
  }
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    if (j > 0 && j >= count) continue;
#pragma unroll
    for (int h = 0; h < Rows::kPacks; ++h) {
      const int at = min(lane_channel<kPack>(h), left - kPack);
      row[j].load(h, reinterpret_cast<const T*>(from[j]) + at);
    }
  }
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    if (j > 0 && j >= count) continue;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      sum[i] += scale[j] * (row[j].channel(i) - rows.shift(i));
    }
  }
}

// Leaves in slot the sum over the list [begin, end) for the strip: entry by entry in runs of kRun,
// but whole tiles, where there are sums of tiles, from partial + tile * stride.
template <class Rows>
__device__ inline void add_list(const CscEntry* entries, int32_t begin, int32_t end,
                                const Rows& rows, const RowBases& bases, int left,
                                const float* partial, int64_t stride, float* slot) {
  constexpr int kPack = Rows::kPackWidth;
  ListTiles tiles = list_tiles(begin, end);
  if (partial == nullptr || tiles.first >= tiles.end) tiles = {0, 0};
  bool first = true;
  for (int32_t run = begin; run < end;) {
    if (tiles.end > 0 && run == tiles.first * kListTile) {
      run = tiles.end * kListTile;
      continue;
    }
    const int32_t bound = run < tiles.first * kListTile ? tiles.first * kListTile : end;
    const int32_t stop = min(run + kRun, bound);
    float sum[kLaneChannels] = {};
#pragma unroll 1
    for (; run < stop; run += Rows::kBatch) {
      add_batch(entries + run, stop - run, rows, bases, left, sum);
    }
    run = stop;
    add_to_slot<kPack>(slot, left, first, sum);
  }
  for (int32_t tile = tiles.first; tile < tiles.end; ++tile) {
    float sum[kLaneChannels];
    load_lane<kPack>(partial + tile * stride, left, sum);
    add_to_slot<kPack>(slot, left, first, sum);
  }
  if (!first) return;
  float none[kLaneChannels] = {};
  add_to_slot<kPack>(slot, left, first, none);
}

}  // namespace sidechain::cuda
