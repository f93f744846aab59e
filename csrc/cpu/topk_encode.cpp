// SPDX-License-Identifier: Apache-2.0
// topk_encode on the CPU: chunks of rows through the steps of topk/steps.h, and the results to
// where the caller wants them. topk/README.md has the notation and the proof.
#include "sidechain/topk_encode.h"

#include <algorithm>
#include <iterator>
#include <numeric>

#include "cpu/topk/steps.h"

namespace sidechain::cpu {
namespace {

// Rows whose candidates are valued together: the more, the more rows share a dictionary row; their
// float32 copies and candidates are the memory of the op beside the packed dictionary.
constexpr int64_t kChunk = 2048;
// Rows too few to pay for packing the dictionary: reading it once in float64 costs as much.
constexpr int64_t kDirectRows = 6;

// Calls take(first row, lists) for every chunk; returns the rows that were valued in full because
// no screen decided them.
template <class Take>
int64_t encode(const TopkCall& call, int64_t chunk, const Take& take) {
  const int64_t n = call.p.rows;
  if (n == 0) return 0;
  const Features features(call);
  std::unique_ptr<PackedFeatures> packed;
  int64_t in_full = 0;
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const Activations x(features, begin, std::min(chunk, n - begin));
    std::vector<List> lists(x.count);
    std::vector<int32_t> undecided(x.count);
    std::iota(undecided.begin(), undecided.end(), 0);
    if (n > kDirectRows) {
      if (!packed) packed.reset(new PackedFeatures(features, find_outliers(x, call.p.width)));
      undecided = search(*packed, x, lists);
      in_full += static_cast<int64_t>(undecided.size());
    }
    value_in_full(features, x, undecided, lists);
    select(features, lists);
    take(begin, lists);
  }
  return in_full;
}

}  // namespace

int64_t topk_encode(const TopkEncodeParams& p, Isa isa, ParallelFor parallel_for, float* values,
                    int32_t* indices) {
  const auto write = [&](int64_t first, const std::vector<List>& lists) {
    int64_t to = first * p.k;
    for (const List& list : lists) {
      const auto kept = static_cast<int64_t>(list.size());
      for (int64_t j = 0; j < p.k; ++j, ++to) {
        values[to] = j < kept ? list[j].z : 0.0f;
        indices[to] = j < kept ? list[j].feature : -1;
      }
    }
  };
  return encode({p, topk_kernels(isa), parallel_for}, kChunk, write);
}

int64_t topk_encode_ragged(const TopkEncodeParams& p, Isa isa, ParallelFor parallel_for,
                           int64_t* offsets, Allocate allocate, void* context) {
  std::vector<List> lists;
  const auto collect = [&](int64_t, std::vector<List>& found) {
    std::move(found.begin(), found.end(), std::back_inserter(lists));
  };
  // One bound for the whole batch needs all its candidates.
  const int64_t chunk = p.mode == TopkMode::kBatch ? p.rows : kChunk;
  const int64_t in_full = encode({p, topk_kernels(isa), parallel_for}, chunk, collect);
  offsets[0] = 0;
  for (int64_t i = 0; i < p.rows; ++i) offsets[i + 1] = offsets[i] + lists[i].size();
  float* values = nullptr;
  int32_t* indices = nullptr;
  allocate(offsets[p.rows], &values, &indices, context);
  for (const List& list : lists) {
    for (const Candidate& c : list) {
      *values++ = c.z;
      *indices++ = c.feature;
    }
  }
  return in_full;
}

}  // namespace sidechain::cpu
