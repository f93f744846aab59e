// SPDX-License-Identifier: Apache-2.0
// Gathers of decoder rows, shared by decoding and editing: the entries of a row of codes in shared
// memory, sums over their decoder rows, and dot products with them.
//
// What limits a gather is how many bytes are on the way. Indices are read once, coalesced, so that
// no load of a row waits for one of an index. Rows that are used twice are copied to shared memory
// asynchronously, all of a block at once; rows used once are read kBatch at a time into registers,
// which moves as many bytes for fewer instructions than a ring of copies.
#pragma once

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "sidechain/sparse_decode.h"

namespace sidechain::cuda {

constexpr int kDecodeThreads = 256;
constexpr int kEntries = 256;  // in shared memory at a time
// Channels are numbered in 32 bits, and a block may step over the end once.
constexpr int64_t kMostChannels = INT32_MAX - kDecodeThreads * 8;
constexpr int kBatch = 8;  // rows that a thread loads before it uses the first, at most

// Where the decoder row of an entry begins, in the units of DecoderRows.
struct Entry {
  uint32_t place;
  float value;
};
constexpr uint32_t kNothing = 0xffffffffu;  // place of an entry that stands for nothing

// The decoder, made on the host. Packs of 16 bytes are counted in 32 bits (64 GB;
// packs_of_rows says whether that does), so that an address takes two instructions; rows of other
// layouts are counted themselves.
template <class T, int kWidth>
struct DecoderRows {
  static constexpr bool kPacks = kWidth > 1;
  const T* data;
  int64_t features, stride;

  DecoderRows(const Matrix& w, int64_t features)
      : data(static_cast<const T*>(w.data)), features(features), stride(w.row) {}
  __device__ uint32_t place(int32_t row) const {
    if (row < 0 || row >= features) return kNothing;
    return static_cast<uint32_t>(row) * (kPacks ? static_cast<uint32_t>(stride / kWidth) : 1u);
  }
  // The pack of channels [c, c + kWidth) of the row at a place.
  __device__ const Pack<T, kWidth>* pack(uint32_t place, int32_t c) const {
    const auto* const packs = reinterpret_cast<const Pack<T, kWidth>*>(data);
    if (kPacks) return packs + (place + static_cast<uint32_t>(c) / kWidth);
    return packs + (int64_t{place} * stride + c);
  }
};

// Whether a decoder can be read as packs of 16 bytes that 32 bits count.
inline bool packs_of_rows(const Matrix& w, int64_t features) {
  const int64_t size = size_of(w.dtype), width = 16 / size;
  return packs(w.data, w.row, size, width) && features * (w.row / width) < kNothing;
}

// The entries of a row of codes as they are.
template <class T, int kWidth>
struct CodeEntries {
  const Codes& codes;
  const DecoderRows<T, kWidth>& w_dec;
  CodeRow row;

  __device__ Entry entry(int64_t e) const {
    Entry found = {w_dec.place(codes.indices[row.indices + e]), 0.0f};
    if (found.place != kNothing) found.value = codes.values[row.values + e];
    return found;
  }
};

// The entries of a row, kEntries at a time; kBatch that stand for nothing follow.
template <class Source>
class EntryList {
 public:
  __device__ EntryList(const Source& source, Entry* held) : source_(source), held_(held) {}

  __device__ int64_t count() const { return source_.row.count; }
  __device__ const Entry& operator[](int e) const { return held_[e]; }

  // Makes [first, first + kEntries) the entries held and returns how many there are. For all
  // threads of the block together.
  __device__ int hold(int64_t first) {
    const int64_t left = count() - first;
    const int held = left < kEntries ? static_cast<int>(left) : kEntries;
    if (first == first_) return held;
    if (first_ >= 0) __syncthreads();  // others may still read the ones before
    first_ = first;
    for (int e = static_cast<int>(threadIdx.x); e < held + kBatch; e += blockDim.x) {
      held_[e] = e < held ? source_.entry(first + e) : Entry{kNothing, 0.0f};
    }
    __syncthreads();
    return held;
  }

 private:
  const Source& source_;
  Entry* held_;
  int64_t first_ = -1;
};

// A pack as words: elements of 16 bits that are loaded under a condition are merged one by one.
template <int kBytes>
struct RawPack;
template <>
struct RawPack<16> {
  using Type = uint4;
};
template <>
struct RawPack<4> {
  using Type = uint32_t;
};
template <>
struct RawPack<2> {
  using Type = uint16_t;
};

// sum += value * decoder row over entries [begin, end) of the list, at channel c. `copy` takes the
// rows as well, one behind the other, where kCopy is set; else `end` is that of the list. kStep <=
// kBatch loads are on the way at a time.
template <class T, int kWidth, int kStep, bool kCopy, class List>
__device__ inline void add_rows(const List& list, int begin, int end,
                                const DecoderRows<T, kWidth>& w_dec, int32_t width, int32_t c,
                                T* copy, float (&sum)[kWidth]) {
  using Bits = typename RawPack<sizeof(Pack<T, kWidth>)>::Type;
  for (int e = begin; e < end; e += kStep) {
    Bits bits[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const uint32_t place = !kCopy || e + i < end ? list[e + i].place : kNothing;
      bits[i] = {};
      if (place != kNothing) bits[i] = *reinterpret_cast<const Bits*>(w_dec.pack(place, c));
    }
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      Pack<T, kWidth> pack;
      memcpy(&pack, &bits[i], sizeof(pack));
      if (kCopy && e + i < end) {
        *reinterpret_cast<Pack<T, kWidth>*>(copy + (e + i) * width + c) = pack;
      }
      // Nothing times zero leaves the sum as it is, to the bit: it began as +0.
      const float value = !kCopy || e + i < end ? list[e + i].value : 0.0f;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += value * to_float(pack.item[k]);
    }
  }
}

// Decoder rows that a block keeps in shared memory, zero where an entry stands for nothing. A
// thread copies the channels that it will sum, all at once; in kGroups groups, so that it can begin
// with the first rows of its first channels while the rest is on the way.
template <class T, int kWidth>
struct HeldRows {
  static constexpr int kGroups = 2;
  T* rows;  // [count, width]
  int32_t count, width;

  __device__ int group_end(int group) const { return (group + 1) * count / kGroups; }

  template <class List>
  __device__ void copy(const List& list, const DecoderRows<T, kWidth>& w_dec) const {
    int32_t c = static_cast<int32_t>(threadIdx.x) * kWidth;
    int begin = 0;
    for (int group = 0; group < kGroups; ++group) {
      const int end = group_end(group);
      if (c < width) copy_channels(list, w_dec, begin, end, c);
      if (group < kGroups - 1) __pipeline_commit();
      begin = end;
    }
    for (c += blockDim.x * kWidth; c < width; c += blockDim.x * kWidth) {
      copy_channels(list, w_dec, 0, count, c);
    }
    __pipeline_commit();
  }

  // For whole warps: lanes beyond the width wait with the others.
  template <class List>
  __device__ void add(const List& list, int32_t c, float (&sum)[kWidth]) const {
    int begin = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      __pipeline_wait_prior(kGroups - 1 - group);
      __syncwarp();  // the wait alone lets the compiler read earlier
      const int end = group_end(group);
      if (c < width) add_channels(list, begin, end, c, sum);
      begin = end;
    }
  }

 private:
  template <class List>
  __device__ void copy_channels(const List& list, const DecoderRows<T, kWidth>& w_dec, int begin,
                                int end, int32_t c) const {
    T* to = rows + begin * width + c;
#pragma unroll 4
    for (int e = begin; e < end; ++e, to += width) {
      const uint32_t place = list[e].place;
      if (place != kNothing) {
        __pipeline_memcpy_async(to, w_dec.pack(place, c), sizeof(T) * kWidth);
      } else {
        *reinterpret_cast<Pack<T, kWidth>*>(to) = {};
      }
    }
  }

  template <class List>
  __device__ void add_channels(const List& list, int begin, int end, int32_t c,
                               float (&sum)[kWidth]) const {
    const T* at = rows + begin * width + c;
#pragma unroll 4
    for (int e = begin; e < end; ++e, at += width) {
      const float value = list[e].value;
      float w[kWidth];
      load(at, w);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += value * w[k];
    }
  }
};

// <vector, w> over the lanes of a warp, the same in each.
template <class T, int kWidth>
__device__ inline float warp_dot(const float* vector, const Pack<T, kWidth>* w, int32_t width) {
  float dot[kWidth] = {};
  const int32_t packs = width / kWidth;
#pragma unroll(kWidth == 8 ? 4 : 8)
  for (int32_t at = threadIdx.x % 32; at < packs; at += 32) {
    float a[kWidth];
    load(vector + at * kWidth, a);
    const Pack<T, kWidth> pack = w[at];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) dot[i] += a[i] * to_float(pack.item[i]);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += dot[i];
  return warp_sum(sum);
}

// dvalues[e] = weight <vector, w_dec[indices[e]]> for the entries of a row, a warp each; the vector
// and the decoder rows of the first `held` entries lie in shared memory.
template <class T, int kWidth, class List>
__device__ inline void entry_dots(List& list, const DecoderRows<T, kWidth>& w_dec, int32_t width,
                                  const float* vector, const T* rows_held, int held, float weight,
                                  float* dvalues) {
  for (int64_t first = 0; first < list.count(); first += kEntries) {
    const int count = list.hold(first);
    for (int e = static_cast<int>(threadIdx.x / 32); e < count; e += blockDim.x / 32) {
      const uint32_t place = list[e].place;
      float dot = 0.0f;
      if (place != kNothing) {
        // Apart, so that either is known to read its own kind of memory.
        if (first == 0 && e < held) {
          const T* const row = rows_held + e * width;
          dot = warp_dot(vector, reinterpret_cast<const Pack<T, kWidth>*>(row), width);
        } else {
          dot = warp_dot(vector, w_dec.pack(place, 0), width);
        }
      }
      if (threadIdx.x % 32 == 0) dvalues[first + e] = place != kNothing ? weight * dot : 0.0f;
    }
  }
}

}  // namespace sidechain::cuda
