// SPDX-License-Identifier: Apache-2.0
#include "sidechain/sae_update.h"

#include "arrays.h"

namespace sidechain::host {
namespace {

const std::string kOp = "sae_update";

float* floats(py::array& a, std::vector<py::ssize_t> shape, const char* name) {
  return static_cast<float*>(writable(kOp, a, Dtype::kFloat32, std::move(shape), name));
}

// sae_gradient_square, then sae_update_, on one group of fixed-width codes; float32 weights and x,
// running statistics of the matrices of `dtype`, in place on contiguous arrays. Returns the sum of
// squares.
float sae_update(py::array w_enc, py::array w_dec, py::array b_enc, py::list state,
                 const std::string& dtype, const Floats& x, const Floats& b_pre,
                 const Floats& values, const Array<int32_t>& indices, const Floats& dvalues,
                 const Floats& error, float lr, int64_t step, float clip_scale, double weight_decay,
                 bool unit_norm, bool project, py::array b_pre_grad, const std::string& isa) {
  SaeUpdateParams p = {};
  SaeGradientParams& g = p.gradient;
  if (values.ndim() != 2 || w_enc.ndim() != 2 || w_dec.ndim() != 2 || state.size() != 6) {
    throw py::value_error(kOp + ": expected values [N, K], matrices and a state of six");
  }
  g.rows = values.shape(0), g.d_in = w_enc.shape(1), g.d_out = w_dec.shape(1);
  g.features = w_enc.shape(0);
  if (x.size() != g.rows * g.d_in || error.size() != g.rows * g.d_out || b_pre.size() != g.d_in ||
      indices.size() != values.size() || dvalues.size() != values.size()) {
    throw py::value_error(kOp + ": unexpected size of an input");
  }
  g.x = x.data(), g.x_dtype = Dtype::kFloat32, g.x_row = g.d_in, g.b_pre = b_pre.data();
  CodeGroup& group = g.groups[0];
  group.codes.values = values.data(), group.codes.indices = indices.data();
  group.codes.rows = g.rows, group.codes.width = values.shape(1);
  group.codes.values_row = group.codes.indices_row = group.dvalues_row = values.shape(1);
  group.dvalues = dvalues.data(), group.error = error.data(), group.error_row = g.d_out;
  g.group_count = 1;
  g.project = project, g.bias = true;

  const Dtype type = dtype_from(kOp, dtype);
  if (type == Dtype::kFloat16) throw py::value_error(kOp + ": expected float32 or bfloat16");
  py::array arrays[6];
  for (int i = 0; i < 6; ++i) arrays[i] = state[i].cast<py::array>();
  const std::vector<py::ssize_t> enc = {g.features, g.d_in}, dec = {g.features, g.d_out};
  p.state = {floats(w_enc, enc, "w_enc"),
             floats(w_dec, dec, "w_dec"),
             floats(b_enc, {g.features}, "b_enc"),
             writable(kOp, arrays[0], type, enc, "state"),
             writable(kOp, arrays[1], type, enc, "state"),
             writable(kOp, arrays[2], type, dec, "state"),
             writable(kOp, arrays[3], type, dec, "state"),
             type,
             floats(arrays[4], {g.features}, "state"),
             floats(arrays[5], {g.features}, "state")};
  p.lr = &lr, p.step = &step, p.clip_scale = &clip_scale;
  p.beta1 = 0.9, p.beta2 = 0.999, p.eps = 1e-8, p.weight_decay = weight_decay;
  p.unit_norm = unit_norm;
  p.b_pre_grad = floats(b_pre_grad, {g.d_in}, "b_pre_grad");
  float square = 0.0f;
  cpu::sae_gradient_square(g, p.state.w_dec, &square, isa_from(kOp, isa), nullptr);
  cpu::sae_update(p, isa_from(kOp, isa), nullptr);
  return square;
}

}  // namespace

void bind_sae_update(py::module_& m) {
  m.def("sae_update", &sae_update, "sae_update_ on one ISA, in place on contiguous arrays.",
        py::arg("w_enc"), py::arg("w_dec"), py::arg("b_enc"), py::arg("state"), py::kw_only(),
        py::arg("dtype"), py::arg("x"), py::arg("b_pre"), py::arg("values"), py::arg("indices"),
        py::arg("dvalues"), py::arg("error"), py::arg("lr"), py::arg("step"),
        py::arg("clip_scale") = 1.0f, py::arg("weight_decay") = 0.0, py::arg("unit_norm") = true,
        py::arg("project") = true, py::arg("b_pre_grad"), py::arg("isa"));
}

}  // namespace sidechain::host
