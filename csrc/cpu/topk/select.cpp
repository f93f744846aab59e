// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <functional>

#include "cpu/topk/steps.h"

namespace sidechain::cpu {
namespace {

// Leaves the k best positive candidates, best first, ties by lowest index. One number holds value
// and index: sorting these takes two thirds of the time of sorting candidates.
void select_best(List& list, int64_t k, std::vector<uint64_t>& keys) {
  keys.clear();
  for (const Candidate& c : list) {
    const uint64_t order = order_of(c.z);
    if (order > 0) keys.push_back(order << 32 | ~static_cast<uint32_t>(c.feature));
  }
  std::sort(keys.begin(), keys.end(), std::greater<>());
  list.resize(std::min<size_t>(keys.size(), k));
  for (size_t j = 0; j < list.size(); ++j) {
    const auto order = static_cast<uint32_t>(keys[j] >> 32);
    list[j] = {value_of(order), static_cast<int32_t>(~static_cast<uint32_t>(keys[j])), 0.0f};
  }
}

// Leaves the candidates that are positive and above their limits, by ascending feature.
void select_active(List& list, const Features& features) {
  const auto idle = [&](const Candidate& c) {
    return order_of(c.z) == 0 || c.z <= features.limit(c.feature);
  };
  list.erase(std::remove_if(list.begin(), list.end(), idle), list.end());
  std::sort(list.begin(), list.end(),
            [](const Candidate& a, const Candidate& b) { return a.feature < b.feature; });
}

// Leaves the N k largest of all rows, ties by lowest position; lists are by ascending feature.
void select_best_of_batch(const TopkCall& call, std::vector<List>& lists) {
  std::vector<uint32_t> orders;
  for (const List& list : lists) {
    for (const Candidate& c : list) orders.push_back(order_of(c.z));
  }
  int64_t ties = call.p.rows * call.p.k;
  const uint32_t bound = kth_largest(call.kernels, orders, ties);
  if (bound == 0) return;
  for (uint32_t order : orders) ties -= order > bound;
  for (List& list : lists) {
    const auto late = [&](const Candidate& c) {
      const uint32_t order = order_of(c.z);
      return order == bound ? ties-- <= 0 : order < bound;
    };
    list.erase(std::remove_if(list.begin(), list.end(), late), list.end());
  }
}

}  // namespace

void select(const Features& features, std::vector<List>& lists) {
  const TopkCall& call = features.call;
  parallel(call.parallel_for, lists.size(), 16, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    for (int64_t i = begin; i < end; ++i) {
      if (call.p.mode == TopkMode::kRows) {
        select_best(lists[i], call.p.k, keys);
      } else {
        select_active(lists[i], features);
      }
    }
  });
  if (call.p.mode == TopkMode::kBatch) select_best_of_batch(call, lists);
}

}  // namespace sidechain::cpu
