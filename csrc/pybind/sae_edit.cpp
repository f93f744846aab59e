// SPDX-License-Identifier: Apache-2.0
#include "sidechain/sae_edit.h"

#include "arrays.h"

namespace sidechain::host {
namespace {

// Fixed-width codes [N, K]; x [N, d] and w_dec [F, d] of `dtype`, x in place; strength [N].
void sae_edit(py::array x, const Floats& values_old, const Floats& values_new,
              const Array<int32_t>& indices, py::array w_dec, const Floats& strength,
              const std::string& dtype, const std::string& isa) {
  const std::string op = "sae_edit";
  if (values_new.ndim() != 2 || values_old.size() != values_new.size() ||
      indices.size() != values_new.size() || w_dec.ndim() != 2 ||
      strength.size() != values_new.shape(0)) {
    throw py::value_error(op + ": expected values and indices [N, K], w_dec [F, d], strength [N]");
  }
  SaeEditParams p = {};
  p.codes.values = values_new.data(), p.codes.indices = indices.data();
  p.codes.rows = values_new.shape(0), p.codes.width = values_new.shape(1);
  p.codes.values_row = p.codes.indices_row = p.values_old_row = p.codes.width;
  p.values_old = values_old.data();
  p.features = w_dec.shape(0), p.width = p.x_row = p.w_dec_row = w_dec.shape(1);
  p.dtype = p.w_dec_dtype = dtype_from(op, dtype);
  p.x = writable(op, x, p.dtype, {p.codes.rows, p.width}, "x");
  p.w_dec = writable(op, w_dec, p.dtype, {p.features, p.width}, "w_dec");
  p.strength = strength.data(), p.strength_stride = 1;
  cpu::sae_edit(p, isa_from(op, isa), nullptr);
}

}  // namespace

void bind_sae_edit(py::module_& m) {
  m.def("sae_edit", &sae_edit, "sae_edit_ on one ISA, in place on contiguous arrays.", py::arg("x"),
        py::arg("values_old"), py::arg("values_new"), py::arg("indices"), py::arg("w_dec"),
        py::arg("strength"), py::kw_only(), py::arg("dtype") = "float32", py::arg("isa"));
}

}  // namespace sidechain::host
