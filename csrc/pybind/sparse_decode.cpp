// SPDX-License-Identifier: Apache-2.0
#include "sidechain/sparse_decode.h"

#include "arrays.h"

namespace sidechain::host {
namespace {

using Ints = Array<int32_t>;

// Fixed-width codes [N, K], w_dec [F, d] and target [N, d] of `dtype`; returns error [N, d], loss
// [N] and dvalues [N, K].
py::tuple sparse_decode_loss(const Floats& values, const Ints& indices, py::array w_dec,
                             const Floats& b_dec, py::array target, const std::string& dtype,
                             const std::string& isa) {
  const std::string op = "sparse_decode";
  if (values.ndim() != 2 || indices.size() != values.size() || w_dec.ndim() != 2) {
    throw py::value_error(op + ": expected values and indices [N, K], w_dec [F, d]");
  }
  DecodeParams p = {};
  p.codes.values = values.data(), p.codes.indices = indices.data();
  p.codes.rows = values.shape(0), p.codes.width = values.shape(1);
  p.codes.values_row = p.codes.indices_row = p.codes.width;
  p.features = w_dec.shape(0), p.width = w_dec.shape(1);
  const Dtype type = dtype_from(op, dtype);
  p.w_dec = {writable(op, w_dec, type, {p.features, p.width}, "w_dec"), type, p.width};
  p.compare = true;
  p.target = {writable(op, target, type, {p.codes.rows, p.width}, "target"), type, p.width};
  if (b_dec.size() != p.width) throw py::value_error(op + ": unexpected size of b_dec");
  p.b_dec = b_dec.data();
  Floats error({p.codes.rows, p.width}), loss(p.codes.rows), dvalues({p.codes.rows, p.codes.width});
  p.out = error.mutable_data(), p.loss = loss.mutable_data(), p.dvalues = dvalues.mutable_data();
  cpu::sparse_decode(p, isa_from(op, isa), nullptr);
  return py::make_tuple(error, loss, dvalues);
}

}  // namespace

void bind_sparse_decode(py::module_& m) {
  m.def("sparse_decode_loss", &sparse_decode_loss, "sparse_decode_loss on one ISA.",
        py::arg("values"), py::arg("indices"), py::arg("w_dec"), py::arg("b_dec"),
        py::arg("target"), py::kw_only(), py::arg("dtype") = "float32", py::arg("isa"));
}

}  // namespace sidechain::host
