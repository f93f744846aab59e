// SPDX-License-Identifier: Apache-2.0
// Rows of a store for NumPy: the functions of sidechain/rows.h, without the GIL where they take
// long.
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

py::tuple moments_entry(const py::array& rows, const std::string& dtype, int64_t seen,
                        Array<double> mean, Array<double> m2,
                        const std::optional<std::string>& isa) {
  MomentsParams p{};
  p.dtype = dtype_from("moments", dtype);
  const py::ssize_t size = p.dtype == Dtype::kFloat32 ? 4 : 2;
  const bool plain = rows.flags() & py::array::c_style;
  if (rows.ndim() != 2 || !plain || rows.itemsize() != size || mean.size() != rows.shape(1) ||
      m2.size() != rows.shape(1)) {
    throw py::value_error("moments: expected contiguous rows [n, C] of " + dtype +
                          " (float16 and bfloat16 as uint16), mean [C] and m2 [C]");
  }
  p.rows = rows.data();
  p.count = rows.shape(0);
  p.width = rows.shape(1);
  p.seen = seen;
  p.mean = mean.mutable_data();
  p.m2 = m2.mutable_data();
  const Isa which = isa ? isa_from("moments", *isa) : best_isa();
  {
    py::gil_scoped_release free;
    moments(p, which);
  }
  return py::make_tuple(p.seen, p.norm_sum, p.norm_squares, p.norm_max);
}

}  // namespace

void bind_rows(py::module_& m) {
  // noconvert: a converted copy of `out` would be written and thrown away, one of a shard would
  // read the whole file.
  m.def("gather_rows", &gather_entry, py::arg("shards").noconvert(), py::arg("shard"),
        py::arg("row"), py::arg("out").noconvert(), "out[i] = shards[shard[i]][row[i]].");
  m.def("moments", &moments_entry, py::arg("rows"), py::arg("dtype"), py::arg("seen"),
        py::arg("mean").noconvert(), py::arg("m2").noconvert(), py::arg("isa") = py::none(),
        "Takes rows [n, C] into mean [C] and m2 [C]; rows seen, sum of norms, of their squares, "
        "largest norm.");
}

}  // namespace sidechain::host
