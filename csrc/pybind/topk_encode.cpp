// SPDX-License-Identifier: Apache-2.0
#include "sidechain/topk_encode.h"

#include "arrays.h"

namespace sidechain::host {
namespace {

struct Lists {
  Floats values;
  Array<int32_t> indices;
};

void allocate(int64_t count, float** values, int32_t** indices, void* context) {
  auto* lists = static_cast<Lists*>(context);
  lists->values = Floats(count);
  lists->indices = Array<int32_t>(count);
  *values = lists->values.mutable_data();
  *indices = lists->indices.mutable_data();
}

// Contiguous float32 x [N, d], w [F, d], b_enc [F], b_pre [d], threshold [F]; the mode follows from
// the threshold and `batch`. Returns values, indices, offsets (None in the fixed form), fallbacks.
py::tuple topk_encode(const Floats& x, const Floats& w, const std::string& isa,
                      std::optional<Floats> b_enc, std::optional<Floats> b_pre, int64_t k,
                      bool batch, std::optional<Floats> threshold, int64_t precision) {
  if (x.ndim() != 2 || w.ndim() != 2 || x.shape(1) != w.shape(1)) {
    throw py::value_error("topk_encode: expected x [N, d] and w [F, d]");
  }
  TopkEncodeParams p = {};
  p.rows = x.shape(0), p.width = x.shape(1), p.features = w.shape(0), p.k = k;
  p.x = {x.data(), Dtype::kFloat32, p.width};
  p.w_enc = {w.data(), Dtype::kFloat32, p.width};
  const auto vector = [](const std::optional<Floats>& a, int64_t n, const char* name) -> Vector {
    if (!a) return {nullptr, Dtype::kFloat32, 1};
    if (a->size() != n)
      throw py::value_error(std::string("topk_encode: unexpected size of ") + name);
    return {a->data(), Dtype::kFloat32, 1};
  };
  p.b_enc = vector(b_enc, p.features, "b_enc");
  p.b_pre = vector(b_pre, p.width, "b_pre");
  p.threshold = vector(threshold, p.features, "threshold");
  if (!threshold && (k < 1 || k > p.features)) {
    throw py::value_error("topk_encode: expected 1 <= k <= F");
  }
  if (precision != 0 && precision != 2) {
    throw py::value_error("topk_encode: expected precision 0 or 2");
  }
  p.precision = static_cast<TopkPrecision>(precision);
  const Isa chosen = isa_from("topk_encode", isa);
  if (!threshold && !batch) {
    Floats values({p.rows, k});
    Array<int32_t> indices({p.rows, k});
    const int64_t fallbacks =
        cpu::topk_encode(p, chosen, nullptr, values.mutable_data(), indices.mutable_data());
    return py::make_tuple(values, indices, py::none(), fallbacks);
  }
  p.mode = threshold ? TopkMode::kThreshold : TopkMode::kBatch;
  Array<int64_t> offsets(p.rows + 1);
  Lists lists;
  const int64_t fallbacks =
      cpu::topk_encode_ragged(p, chosen, nullptr, offsets.mutable_data(), allocate, &lists);
  return py::make_tuple(lists.values, lists.indices, offsets, fallbacks);
}

}  // namespace

void bind_topk_encode(py::module_& m) {
  m.def("topk_encode", &topk_encode, "topk_encode on one ISA, on contiguous float32 arrays.",
        py::arg("x"), py::arg("w"), py::kw_only(), py::arg("isa"), py::arg("b_enc") = py::none(),
        py::arg("b_pre") = py::none(), py::arg("k") = 0, py::arg("batch") = false,
        py::arg("threshold") = py::none(), py::arg("precision") = 0);
}

}  // namespace sidechain::host
