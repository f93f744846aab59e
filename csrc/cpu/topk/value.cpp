// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cpu/topk/steps.h"

namespace sidechain::cpu {
namespace {

// Rows valued in full at a time: the only dense values held.
constexpr int64_t kFullRows = 16;
constexpr int64_t kFeatureGrain = 32;

// The exact values of feature f in rows `which`, while feature `next` is fetched.
void products(const Features& features, const Activations& x, int64_t f, int64_t next,
              const std::vector<int32_t>& which, float* weights, double* z) {
  const auto count = static_cast<int64_t>(which.size());
  const float* w = features.row(f, weights);
  features.call.kernels.exact(w, x.values.get(), x.padded, which.data(), count, x.padded,
                              features.source(next), z);
  for (int64_t e = 0; e < count; ++e) z[e] += features.bias(f);
}

}  // namespace

void value(ScreenedRows& set, const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
  struct Entry {
    int32_t row, slot;
  };
  const Features& features = set.packed().features();
  const auto found = group_by_feature<Entry>(features.size(), [&](const auto& add) {
    for (int64_t i = 0; i < set.size(); ++i) {
      for (int64_t j = from[i]; j < to[i]; ++j) {
        add(set.lists[i][j].feature, {static_cast<int32_t>(i), static_cast<int32_t>(j)});
      }
    }
  });
  if (found.entries.empty()) return;
  parallel(
      features.call.parallel_for, features.size(), kFeatureGrain, [&](int64_t begin, int64_t end) {
        const auto skip_idle = [&](int64_t f) {
          while (f < end && found.start[f + 1] == found.start[f]) ++f;
          return f;
        };
        std::vector<int32_t> which;
        std::vector<double> z;
        std::vector<float> weights(features.padded());
        for (int64_t f = skip_idle(begin), next; f < end; f = next) {
          next = skip_idle(f + 1);
          const int64_t count = found.start[f + 1] - found.start[f];
          which.resize(count);
          z.resize(count);
          const Entry* entry = found.entries.data() + found.start[f];
          for (int64_t e = 0; e < count; ++e) which[e] = set.id(entry[e].row);
          products(features, set.x(), f, next < end ? next : f, which, weights.data(), z.data());
          for (int64_t e = 0; e < count; ++e) {
            set.lists[entry[e].row][entry[e].slot].z = static_cast<float>(z[e]);
          }
        }
      });
}

void value_in_full(const Features& features, const Activations& x, const std::vector<int32_t>& ids,
                   std::vector<List>& lists) {
  const int64_t size = features.size();
  std::vector<float> z(std::min<int64_t>(kFullRows, ids.size()) * size);
  for (size_t begin = 0; begin < ids.size(); begin += kFullRows) {
    const std::vector<int32_t> which(ids.begin() + begin,
                                     ids.begin() + std::min(begin + kFullRows, ids.size()));
    parallel(features.call.parallel_for, size, kFeatureGrain, [&](int64_t first, int64_t last) {
      std::vector<float> weights(features.padded());
      std::vector<double> out(which.size());
      for (int64_t f = first; f < last; ++f) {
        products(features, x, f, f + 1 < last ? f + 1 : f, which, weights.data(), out.data());
        for (size_t i = 0; i < which.size(); ++i) z[i * size + f] = static_cast<float>(out[i]);
      }
    });
    for (size_t i = 0; i < which.size(); ++i) {
      for (int64_t f = 0; f < size; ++f) {
        const Candidate c = {z[i * size + f], static_cast<int32_t>(f), 0.0f};
        if (order_of(c.z) > 0) lists[which[i]].push_back(c);
      }
    }
  }
}

}  // namespace sidechain::cpu
