// SPDX-License-Identifier: Apache-2.0
// Rows of a store for NumPy: the functions of sidechain/rows.h, without the GIL where they take
// long.
#include "sidechain/rows.h"

#include "arrays.h"

namespace sidechain::host {

namespace {

Array<int64_t> permute_entry(const Array<int64_t>& positions, uint64_t size,
                             const Array<uint64_t>& keys, const std::optional<std::string>& isa) {
  if (keys.size() != kOrderRounds) {
    throw py::value_error("permute: expected " + std::to_string(kOrderRounds) + " keys, got " +
                          std::to_string(keys.size()));
  }
  Order order;
  order.size = size;
  int bits = 1;
  while (bits < 63 && (uint64_t{1} << bits) < size) ++bits;
  order.low_bits = (bits + 1) / 2;
  order.high_bits = bits - order.low_bits;
  for (int i = 0; i < kOrderRounds; ++i) order.keys[i] = keys.data()[i];
  const int64_t* from = positions.data();
  for (py::ssize_t i = 0; i < positions.size(); ++i) {
    // Outside of [0, size) the walk may never come back.
    if (from[i] < 0 || static_cast<uint64_t>(from[i]) >= size) {
      throw py::index_error("permute: expected positions within [0, " + std::to_string(size) +
                            "), got " + std::to_string(from[i]));
    }
  }
  Array<int64_t> rows(positions.size());
  int64_t* to = rows.mutable_data();
  const Isa which = isa ? isa_from("permute", *isa) : best_isa();
  {
    py::gil_scoped_release free;
    permute(order, from, positions.size(), to, which);
  }
  return rows;
}

py::tuple locate_entry(const Array<int64_t>& rows, const Array<int64_t>& ends,
                       const Array<int64_t>& shard, const Array<int64_t>& shift,
                       const Array<int64_t>& first, int bits) {
  const py::ssize_t count = rows.size(), runs = ends.size();
  const int64_t total = runs > 0 ? ends.data()[runs - 1] : 0;
  const bool whole = bits >= 0 && bits < 63 && shard.size() == runs && shift.size() == runs &&
                     (total == 0 || first.size() == ((total - 1) >> bits) + 1);
  if (!whole)
    throw py::value_error("locate: expected ends, shard, shift [R] and first of each 2^bits");
  for (py::ssize_t i = 0; i < count; ++i) {
    if (rows.data()[i] < 0 || rows.data()[i] >= total) {
      throw py::index_error("locate: expected rows within [0, " + std::to_string(total) +
                            "), got " + std::to_string(rows.data()[i]));
    }
  }
  Array<int64_t> in_shard(count), in_row(count);
  locate({ends.data(), shard.data(), shift.data(), first.data(), bits}, rows.data(), count,
         in_shard.mutable_data(), in_row.mutable_data());
  return py::make_tuple(in_shard, in_row);
}

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
  m.def("permute", &permute_entry, py::arg("positions"), py::arg("size"), py::arg("keys"),
        py::arg("isa") = py::none(),
        "Rows at positions [B] int64 of the order that keys [8] uint64 choose.");
  m.def("locate", &locate_entry, py::arg("rows"), py::arg("ends"), py::arg("shard"),
        py::arg("shift"), py::arg("first"), py::arg("bits"),
        "Shard and row within it of rows [B] that lie in runs [R] of neighbours.");
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
