// SPDX-License-Identifier: Apache-2.0
// Entries of sparse codes as the kernels read them.
#pragma once

#include <cstdint>

namespace sidechain::cpu {

// One row in which a feature is active.
struct CscEntry {
  int32_t row;
  float value;  // times the weight of the row
  float dvalue;
};

// One active feature of a row.
struct RowEntry {
  int64_t offset;  // first element of its decoder row
  int64_t place;   // of its dvalue
  float value;
};

}  // namespace sidechain::cpu
