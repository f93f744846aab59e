// SPDX-License-Identifier: Apache-2.0
// attention_tap on the CPU: picks contexts, cuts the work into chunks, adds partial sums in order.
#include "sidechain/attention_tap.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/kernels/attention_tap.h"

namespace sidechain::cpu {
namespace {

// Tokens of one task. 32 groups of six: the longest chain of additions in one partial sum.
constexpr int64_t kChunk = 32 * kQueries;
// Multiply-adds below which a thread costs more than it saves.
constexpr int64_t kGrain = 200000;
// Contexts that a thread keeps packed, and the bytes they may take: a part of the L2 cache.
constexpr int64_t kKept = 8;
constexpr int64_t kKeptBytes = 256 * 1024;

using Pack = void (*)(const AttentionTapParams&, int64_t, int64_t, PackedContext*);
using Attend = void (*)(const AttentionTapParams&, const AttentionHead&, int64_t, int64_t);
struct Kernels {
  Pack pack;
  Attend attend;
};

Kernels entries(Isa isa) {
  switch (isa) {
#define SIDECHAIN_CASE(ID, NAME) \
  case Isa::ID:                  \
    return {NAME::pack_context, NAME::attend};
    SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_CASE)
#undef SIDECHAIN_CASE
    default:
      return {baseline::pack_context, baseline::attend};
  }
}

bool inside(int64_t slot, int64_t slots) { return slot >= 0 && slot < slots; }

// Packed contexts of the kv head that a thread is at, found by context modulo their number.
class Cache {
 public:
  Cache(const AttentionTapParams& p, Pack pack) : p_(p), pack_(pack) {
    const int64_t keys = padded(p.length) * p.width;
    const int64_t values = p.length * padded(p.width);
    const int64_t floats = keys + values;
    kept_ = std::clamp<int64_t>(kKeptBytes / (4 * floats), 1, std::min(kKept, p.contexts));
    memory_.reset(new float[kept_ * floats]);
    for (int64_t n = 0; n < kept_; ++n) {
      float* start = memory_.get() + n * floats;
      packed_.push_back({start, start + keys, 0});
      holds_.push_back({-1, -1});
    }
  }

  const PackedContext* get(int64_t context, int64_t kv_head) {
    const int64_t n = context % kept_;
    if (holds_[n].context != context || holds_[n].kv_head != kv_head) {
      pack_(p_, context, kv_head, &packed_[n]);
      holds_[n] = {context, kv_head};
    }
    return packed_[n].length > 0 ? &packed_[n] : nullptr;
  }

 private:
  struct Key {
    int64_t context, kv_head;
  };
  const AttentionTapParams& p_;
  Pack pack_;
  int64_t kept_;
  std::unique_ptr<float[]> memory_;
  std::vector<PackedContext> packed_;
  std::vector<Key> holds_;
};

struct Job {
  const AttentionTapParams& p;
  Kernels kernels;
  int64_t chunks;  // of the tokens
  int64_t stride;  // padded(D)
  int64_t slot;
  float* sums;                        // [R, H D] of the slot, nullptr = not captured
  float* squares;                     // likewise
  float* counts;                      // [R] of the slot
  std::unique_ptr<float[]> partials;  // [R, H, chunks, 2, padded(D)], nullptr = nothing to sum

  float* partial(int64_t row, int64_t head, int64_t chunk) const {
    if (!partials) return nullptr;
    return partials.get() + ((row * p.heads + head) * chunks + chunk) * 2 * stride;
  }

  void* ring(int64_t row, int64_t head) const {
    if (p.ring.data == nullptr || !inside(slot, p.ring.slots)) return nullptr;
    const int64_t size = p.ring.dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t offset = slot * p.ring.slot + row * p.ring.row + head * p.width;
    return static_cast<char*>(p.ring.data) + offset * size;
  }

  // Tasks are (kv head, row, chunk), so that neighbours share packed contexts.
  void run(int64_t begin, int64_t end) const {
    Cache cache(p, kernels.pack);
    const std::unique_ptr<float[]> scratch(new float[kQueries * (2 * stride + padded(p.length))]);
    const int64_t group = p.heads / p.kv_heads;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks;
      const int64_t row = task / chunks % p.rows;
      const int64_t kv_head = task / chunks / p.rows;
      const int64_t context = p.context_index ? p.context_index[row * p.context_index_stride] : 0;
      const PackedContext* packed =
          inside(context, p.contexts) ? cache.get(context, kv_head) : nullptr;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const AttentionHead h = {
            row, head, packed, ring(row, head), scratch.get(), partial(row, head, chunk)};
        kernels.attend(p, h, chunk * kChunk, std::min((chunk + 1) * kChunk, p.tokens));
      }
    }
  }

  void fold(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; partials && head < p.heads; ++head) {
        float* total = partial(row, head, 0);
        for (int64_t chunk = 1; chunk < chunks; ++chunk) {
          const float* more = partial(row, head, chunk);
          for (int64_t i = 0; i < 2 * stride; ++i) total[i] += more[i];
        }
        add(sums, p.sums.row, row, head, total);
        add(squares, p.squares.row, row, head, total + stride);
      }
      if (counts != nullptr) counts[row * p.counts.row] += count(row);
    }
  }

  void add(float* buffer, int64_t row_stride, int64_t row, int64_t head, const float* from) const {
    if (buffer == nullptr) return;
    float* to = buffer + row * row_stride + head * p.width;
    for (int64_t d = 0; d < p.width; ++d) to[d] += from[d];
  }

  float count(int64_t row) const {
    const TokenMask& mask = p.capture_mask;
    if (mask.data == nullptr) return static_cast<float>(p.tokens);
    int64_t n = 0;
    for (int64_t t = 0; t < p.tokens; ++t) n += mask.data[row * mask.row + t * mask.token] != 0;
    return static_cast<float>(n);
  }
};

template <void (Job::*kMethod)(int64_t, int64_t) const>
void call(int64_t begin, int64_t end, void* job) {
  (static_cast<const Job*>(job)->*kMethod)(begin, end);
}

template <class Buffer>
float* at_slot(const Buffer& buffer, int64_t slot) {
  if (buffer.data == nullptr || !inside(slot, buffer.slots)) return nullptr;
  return buffer.data + slot * buffer.slot;
}

}  // namespace

void attention_tap(const AttentionTapParams& p, Isa isa, ParallelFor parallel_for) {
  if (p.rows == 0 || p.tokens == 0) return;
  parallel_for = or_serial(parallel_for);
  const int64_t slot = p.capture_slot ? *p.capture_slot : 0;
  const int64_t chunks = (p.tokens + kChunk - 1) / kChunk;
  Job job = {p,
             entries(isa),
             chunks,
             padded(p.width),
             slot,
             at_slot(p.sums, slot),
             at_slot(p.squares, slot),
             at_slot(p.counts, slot),
             nullptr};
  if (job.sums != nullptr || job.squares != nullptr) {
    job.partials.reset(new float[p.rows * p.heads * chunks * 2 * job.stride]);
  }
  const int64_t products =
      2 * std::min(p.tokens, kChunk) * p.length * p.width * (p.heads / p.kv_heads);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, products));
  parallel_for(p.kv_heads * p.rows * chunks, grain, call<&Job::run>, &job);
  if (job.partials || job.counts != nullptr) {
    const int64_t per_row = std::max<int64_t>(1, 2 * p.heads * chunks * job.stride);
    parallel_for(p.rows, std::max<int64_t>(1, kGrain / per_row), call<&Job::fold>, &job);
  }
}

}  // namespace sidechain::cpu
