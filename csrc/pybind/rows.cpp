// SPDX-License-Identifier: Apache-2.0
// Rows of a store for NumPy: the copy of sidechain/rows.h, without the GIL.
#include "sidechain/rows.h"

#include "arrays.h"

namespace sidechain::host {

namespace {

void gather_entry(const std::vector<Array<uint8_t>>& shards, const Array<int64_t>& shard,
                  const Array<int64_t>& row, Array<uint8_t> out) {
  const py::ssize_t count = row.size();
  if (out.ndim() != 2 || out.shape(0) != count || shard.size() != count) {
    throw py::value_error("gather_rows: expected out [B, row_bytes], shard [B] and row [B]");
  }
  const py::ssize_t row_bytes = out.shape(1);
  for (const auto& one : shards) {
    if (one.ndim() != 2 || (one.shape(0) > 0 && one.shape(1) != row_bytes)) {
      throw py::value_error("gather_rows: expected shards [n, " + std::to_string(row_bytes) + "]");
    }
  }
  std::vector<const uint8_t*> sources(count);
  const auto total = static_cast<int64_t>(shards.size());
  for (py::ssize_t i = 0; i < count; ++i) {
    const int64_t s = shard.data()[i], r = row.data()[i];
    if (s < 0 || s >= total || r < 0 || r >= shards[s].shape(0)) {
      throw py::index_error("gather_rows: expected rows of " + std::to_string(total) +
                            " shards, got row " + std::to_string(r) + " of shard " +
                            std::to_string(s));
    }
    sources[i] = shards[s].data() + r * row_bytes;
  }
  uint8_t* to = out.mutable_data();
  py::gil_scoped_release free;
  gather_rows(sources.data(), count, row_bytes, to);
}

}  // namespace

void bind_rows(py::module_& m) {
  // noconvert: a converted copy of `out` would be written and thrown away, one of a shard would
  // read the whole file.
  m.def("gather_rows", &gather_entry, py::arg("shards").noconvert(), py::arg("shard"),
        py::arg("row"), py::arg("out").noconvert(), "out[i] = shards[shard[i]][row[i]].");
}

}  // namespace sidechain::host
