// SPDX-License-Identifier: Apache-2.0
// Rows of a store: copies of rows that lie anywhere in memory. The definition is gather_rows in
// python/sidechain/store/row_index.py.
#pragma once

#include <cstdint>

namespace sidechain {

// out[i] = the row_bytes bytes at sources[i], i < count. Neither aligned nor of a special size.
void gather_rows(const uint8_t* const* sources, int64_t count, int64_t row_bytes, uint8_t* out);

}  // namespace sidechain
