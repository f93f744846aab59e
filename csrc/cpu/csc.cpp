// SPDX-License-Identifier: Apache-2.0
#include "cpu/csc.h"

namespace sidechain::cpu {
namespace {

// Calls visit(feature, row, value, place in dvalues) for every entry, rows ascending.
template <class Visit>
void for_each_entry(const CscSource& s, Visit visit) {
  for (int64_t row = 0; row < s.codes.rows; ++row) {
    const CodeRow at = code_row(s.codes, row);
    const int64_t dvalues = s.codes.offsets ? at.values : row * s.dvalues_row;
    for (int64_t j = 0; j < at.count; ++j) {
      const int64_t feature = s.codes.indices[at.indices + j] - s.first_feature;
      if (feature < 0 || feature >= s.features) continue;
      const float value = s.codes.values[at.values + j];
      if (value == 0.0f && !s.keep_zeros) continue;
      visit(feature, row, value, dvalues + j);
    }
  }
}

}  // namespace

Csc build_csc(const CscSource& s) {
  Csc csc;
  csc.start.reset(new int32_t[s.features + 1]());
  int32_t* start = csc.start.get();
  for_each_entry(s, [&](int64_t feature, int64_t, float, int64_t) { ++start[feature + 1]; });
  for (int64_t f = 0; f < s.features; ++f) start[f + 1] += start[f];
  csc.entries.reset(new CscEntry[start[s.features]]);
  // Filling moves start[f] to the end of its list; shifting by one place moves it back.
  for_each_entry(s, [&](int64_t feature, int64_t row, float value, int64_t place) {
    const float weight = s.row_weight ? s.row_weight[row] : 1.0f;
    csc.entries[start[feature]++] = {static_cast<int32_t>(row), value * weight,
                                     s.dvalues ? s.dvalues[place] : 0.0f};
  });
  for (int64_t f = s.features; f > 0; --f) start[f] = start[f - 1];
  start[0] = 0;
  return csc;
}

}  // namespace sidechain::cpu
