// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cpu/topk/steps.h"

namespace sidechain::cpu {
namespace {

Rank rank_of(const TopkEncodeParams& p) {
  switch (p.mode) {
    case TopkMode::kRows:
      return {p.k, false};
    case TopkMode::kBatch:
      return {p.rows * p.k, true};
    default:
      return {0, false};
  }
}

// The order of the k-th largest among the first counts[i] candidates of each row i; of all rows
// together, for each of them, where the rank is joint; 0 where there are fewer than k.
std::vector<uint32_t> kth_orders(const ScreenedRows& set, const std::vector<int64_t>& counts,
                                 const Rank& rank) {
  const TopkCall& call = set.packed().call();
  std::vector<uint32_t> kth(set.size(), 0);
  if (rank.k == 0) return kth;
  const auto append = [&](int64_t i, std::vector<uint32_t>& orders) {
    for (int64_t j = 0; j < counts[i]; ++j) orders.push_back(order_of(set.lists[i][j].z));
  };
  if (rank.joint) {
    std::vector<uint32_t> orders;
    for (int64_t i = 0; i < set.size(); ++i) append(i, orders);
    kth.assign(set.size(), kth_largest(call.kernels, orders, rank.k));
    return kth;
  }
  parallel(call.parallel_for, set.size(), 16, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> orders;
    for (int64_t i = begin; i < end; ++i) {
      orders.clear();
      append(i, orders);
      kth[i] = kth_largest(call.kernels, orders, rank.k);
    }
  });
  return kth;
}

// Moves the candidates that the exact k-th value will most likely not rule out to the front and
// returns their number. With `errors` they include those that their error may lift to the k-th
// value: few more are then left for the second reading of the dictionary.
int64_t move_likely(List& list, uint32_t kth, bool errors) {
  if (kth == 0) return static_cast<int64_t>(list.size());
  float bound = value_of(kth);
  if (errors) {
    const auto same = [&](const Candidate& c) { return order_of(c.z) == kth; };
    bound -= kLikelyShare * std::find_if(list.begin(), list.end(), same)->error;
  }
  const auto likely = [&](const Candidate& c) {
    return errors ? may_reach(c, bound) : !(c.z < bound);
  };
  return std::partition(list.begin(), list.end(), likely) - list.begin();
}

// Drops the candidates from slot `first` on that cannot reach the bound.
void keep_reaching(List& list, int64_t first, float bound) {
  const auto below = [&](const Candidate& c) { return !may_reach(c, bound); };
  list.erase(std::remove_if(list.begin() + first, list.end(), below), list.end());
}

}  // namespace

void screen(ScreenedRows& set, const Rank& rank, float share) {
  const int64_t panels = set.packed().panels();
  if (!rank.joint) return set.screen(0, panels, rank.k, share);
  const TopkCall& call = set.packed().call();
  // More and more features; after each part all cuts rise together.
  std::vector<uint32_t> orders;
  for (int64_t begin = 0, end = (panels + 15) / 16; begin < panels;
       begin = end, end = std::min(2 * end, panels)) {
    set.screen(begin, end, 0, share);
    orders.clear();
    for (int64_t i = 0; i < set.size(); ++i) set.lower_bounds(i, share, orders);
    const float bound = cut_at(kth_largest(call.kernels, orders, rank.k));
    parallel(call.parallel_for, set.size(), 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) set.raise_to(i, bound);
    });
  }
}

std::vector<int32_t> prove(ScreenedRows& set, Start start, std::vector<List>& lists) {
  const TopkCall& call = set.packed().call();
  const Rank rank = rank_of(call.p);
  const bool estimated = start == Start::kEstimate;
  const int64_t n = set.size();

  // One estimate for all rows is not improved by screening in parts.
  screen(set, rank.joint && estimated ? Rank{0, false} : rank,
         estimated ? estimated_share(call) : 1.0f);

  std::vector<int64_t> none(n, 0), first(n), all(n);
  for (int64_t i = 0; i < n; ++i) all[i] = static_cast<int64_t>(set.lists[i].size());
  std::vector<uint32_t> kth = kth_orders(set, all, rank);
  parallel(call.parallel_for, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      first[i] = move_likely(set.lists[i], kth[i], call.certified() && !rank.joint);
    }
  });
  value(set, none, first);

  // The k-th largest of these exact values bounds that of all from below. A cut that is not above
  // it has hidden nothing that belongs to the result.
  kth = kth_orders(set, first, rank);
  std::vector<uint8_t> failed(n, 0);
  parallel(call.parallel_for, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float bound = cut_at(kth[i]);
      failed[i] = set.dropped[i] || (bound < set.cut[i] && (estimated || call.certified()));
      if (!failed[i]) keep_reaching(set.lists[i], first[i], bound);
      all[i] = failed[i] ? first[i] : static_cast<int64_t>(set.lists[i].size());
    }
  });
  value(set, first, all);

  std::vector<int32_t> rest;
  for (int64_t i = 0; i < n; ++i) {
    if (failed[i]) {
      rest.push_back(set.id(i));
    } else {
      lists[set.id(i)] = std::move(set.lists[i]);
    }
  }
  return rest;
}

}  // namespace sidechain::cpu
