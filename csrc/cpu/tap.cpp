// SPDX-License-Identifier: Apache-2.0
// tap_ on the CPU: resolves slots, cuts the work into chunks, adds their partial sums in order.
#include "sidechain/tap.h"

#include <algorithm>
#include <memory>

#include "cpu/kernels/tap.h"

namespace sidechain::cpu {
namespace {

// Tokens of one task. 32 groups of four: the longest chain of additions in one partial sum, and
// enough tasks to occupy the threads at small R.
constexpr int64_t kChunk = 128;
// Elements below which a thread costs more than it saves (the grain of torch's own kernels).
constexpr int64_t kGrain = 32768;

using TapTokens = void (*)(const TapParams&, const TapRow&, int64_t, int64_t, int64_t, float*,
                           int64_t);

TapTokens entry(Isa isa) {
  switch (isa) {
#define SIDECHAIN_CASE(ID, NAME) \
  case Isa::ID:                  \
    return NAME::tap_tokens;
    SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_CASE)
#undef SIDECHAIN_CASE
    default:
      return baseline::tap_tokens;
  }
}

bool inside(int64_t slot, int64_t slots) { return slot >= 0 && slot < slots; }

struct Job {
  const TapParams& p;
  TapTokens tap_tokens;
  int64_t chunks;  // per row
  int64_t padded;  // channels rounded up to the widest vector
  int64_t capture_slot;
  float* sums;                        // [R, C] of the slot, nullptr = not captured
  float* squares;                     // likewise
  float* counts;                      // [R] of the slot
  std::unique_ptr<float[]> partials;  // [R, chunks, 2, padded], nullptr = nothing to sum

  float* partial(int64_t row, int64_t chunk) const {
    return partials ? partials.get() + (row * chunks + chunk) * 2 * padded : nullptr;
  }

  TapRow plan(int64_t row) const {
    TapRow plan = {nullptr, 0.0f, 0.0f, nullptr};
    if (p.vectors != nullptr) {
      plan.a = p.strength ? p.strength[row * p.strength_stride] : 0.0f;
      plan.b = p.removal ? p.removal[row * p.removal_stride] : 0.0f;
      const int64_t which = p.index ? p.index[row * p.index_stride] : 0;
      const int64_t slot = p.steer_slot ? *p.steer_slot : 0;
      const bool touched = plan.a != 0.0f || plan.b != 0.0f;
      if (touched && inside(which, p.vector_count) && inside(slot, p.vector_slots)) {
        plan.v = p.vectors + which * p.vector_stride + slot * p.vector_slot_stride;
      }
    }
    if (p.ring.data != nullptr && inside(capture_slot, p.ring.slots)) {
      const int64_t size = p.ring.dtype == Dtype::kFloat32 ? 4 : 2;
      plan.ring =
          static_cast<char*>(p.ring.data) + (capture_slot * p.ring.slot + row * p.ring.row) * size;
    }
    return plan;
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / chunks;
      const int64_t chunk = task % chunks;
      const TapRow todo = plan(row);
      float* sum = partial(row, chunk);
      if (todo.v == nullptr && todo.ring == nullptr && sum == nullptr) continue;
      const int64_t first = chunk * kChunk;
      tap_tokens(p, todo, row, first, std::min(first + kChunk, p.tokens), sum, padded);
    }
  }

  void fold(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      if (partials && chunks > 0) {
        float* total = partial(row, 0);
        for (int64_t chunk = 1; chunk < chunks; ++chunk) {
          const float* more = partial(row, chunk);
          for (int64_t i = 0; i < 2 * padded; ++i) total[i] += more[i];
        }
        add(sums, p.sums.row, row, total);
        add(squares, p.squares.row, row, total + padded);
      }
      if (counts != nullptr) counts[row * p.counts.row] += count(row);
    }
  }

  void add(float* buffer, int64_t stride, int64_t row, const float* total) const {
    if (buffer == nullptr) return;
    float* out = buffer + row * stride;
    for (int64_t c = 0; c < p.channels; ++c) out[c] += total[c];
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

void tap(const TapParams& p, Isa isa, ParallelFor parallel_for) {
  if (p.rows == 0) return;
  parallel_for = or_serial(parallel_for);
  const int64_t slot = p.capture_slot ? *p.capture_slot : 0;
  const int64_t chunks = (p.tokens + kChunk - 1) / kChunk;
  const int64_t padded = (p.channels + kLanePadding - 1) / kLanePadding * kLanePadding;
  Job job = {p,
             entry(isa),
             chunks,
             padded,
             slot,
             at_slot(p.sums, slot),
             at_slot(p.squares, slot),
             at_slot(p.counts, slot),
             nullptr};
  if (job.sums != nullptr || job.squares != nullptr) {
    job.partials.reset(new float[p.rows * chunks * 2 * padded]);
  }
  const int64_t elements = std::max<int64_t>(1, std::min(p.tokens, kChunk) * p.channels);
  const int64_t grain = std::max<int64_t>(1, kGrain / elements);
  parallel_for(p.rows * chunks, grain, call<&Job::run>, &job);
  if (job.partials || job.counts != nullptr) {
    const int64_t per_row = std::max<int64_t>(1, 2 * padded * chunks);
    parallel_for(p.rows, std::max<int64_t>(1, kGrain / per_row), call<&Job::fold>, &job);
  }
}

}  // namespace sidechain::cpu
