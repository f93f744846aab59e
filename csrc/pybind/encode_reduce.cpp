// SPDX-License-Identifier: Apache-2.0
#include "sidechain/encode_reduce.h"

#include "arrays.h"

namespace sidechain::host {
namespace {

using Longs = Array<int64_t>;

// Fixed-width codes [N, K] and labels [N]; sums, squares, counts [G, F] and rows [G] in place.
void code_sums(const Floats& values, const Array<int32_t>& indices, const Longs& label,
               Floats& sums, Floats& squares, Longs& counts, Longs& rows, const std::string& isa) {
  const std::string op = "code_sums";
  if (values.ndim() != 2 || indices.size() != values.size() || sums.ndim() != 2 ||
      label.size() != values.shape(0) || squares.size() != sums.size() ||
      counts.size() != sums.size() || rows.size() != sums.shape(0)) {
    throw py::value_error(op + ": expected codes [N, K], labels [N], sums [G, F], rows [G]");
  }
  CodeSumsParams p = {};
  p.codes.values = values.data(), p.codes.indices = indices.data();
  p.codes.rows = values.shape(0), p.codes.width = values.shape(1);
  p.codes.values_row = p.codes.indices_row = p.codes.width;
  p.label = label.data(), p.label_stride = 1;
  p.labels = sums.shape(0), p.features = sums.shape(1);
  p.sums = sums.mutable_data(), p.squares = squares.mutable_data();
  p.counts = counts.mutable_data(), p.rows = rows.mutable_data();
  cpu::code_sums(p, isa_from(op, isa), nullptr);
}

}  // namespace

void bind_encode_reduce(py::module_& m) {
  m.def("code_sums", &code_sums, "code_sums_ on one ISA, in place on contiguous arrays.",
        py::arg("values"), py::arg("indices"), py::arg("label"), py::arg("sums").noconvert(),
        py::arg("squares").noconvert(), py::arg("counts").noconvert(), py::arg("rows").noconvert(),
        py::kw_only(), py::arg("isa"));
}

}  // namespace sidechain::host
