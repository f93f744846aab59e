// SPDX-License-Identifier: Apache-2.0
#include "sidechain/tap.h"

#include "arrays.h"

namespace sidechain::host {
namespace {

// In place on contiguous arrays: x [R, T, C]; vectors [C] and strength, removal [R]; one capture
// slot: sums, squares [R, C], counts [R], ring [R, T, C].
void tap(py::array x, const std::string& dtype, const std::string& isa,
         std::optional<Floats> vector, std::optional<Floats> strength,
         std::optional<Floats> removal, std::optional<Array<bool>> steer_mask, bool renorm,
         std::optional<Floats> sums, std::optional<Floats> squares, std::optional<Floats> counts,
         std::optional<py::array> ring, const std::string& ring_dtype,
         std::optional<Array<bool>> capture_mask) {
  if (x.ndim() != 3) throw py::value_error("tap: expected x [R, T, C]");
  TapParams p = {};
  p.dtype = dtype_from("tap", dtype);
  p.rows = x.shape(0), p.tokens = x.shape(1), p.channels = x.shape(2);
  p.x = writable("tap", x, p.dtype, {p.rows, p.tokens, p.channels}, "x");
  p.x_row = p.tokens * p.channels, p.x_token = p.channels;
  const auto floats = [](std::optional<Floats>& a, int64_t n, const char* name) -> float* {
    if (!a) return nullptr;
    if (a->size() != n) throw py::value_error(std::string("tap: unexpected size of ") + name);
    return a->mutable_data();
  };
  const auto mask = [&](std::optional<Array<bool>>& a) -> TokenMask {
    if (!a) return {nullptr, 0, 0};
    if (a->size() != p.rows * p.tokens) throw py::value_error("tap: expected a mask [R, T]");
    return {reinterpret_cast<const uint8_t*>(a->data()), p.tokens, 1};
  };
  p.vectors = floats(vector, p.channels, "vector");
  p.vector_count = p.vector_slots = 1;
  p.strength = floats(strength, p.rows, "strength"), p.strength_stride = 1;
  p.removal = floats(removal, p.rows, "removal"), p.removal_stride = 1;
  p.steer_mask = mask(steer_mask);
  p.renorm = renorm;
  p.sums = {floats(sums, p.rows * p.channels, "sums"), 1, 0, p.channels};
  p.squares = {floats(squares, p.rows * p.channels, "squares"), 1, 0, p.channels};
  p.counts = {floats(counts, p.rows, "counts"), 1, 0, 1};
  p.capture_mask = mask(capture_mask);
  if (ring) {
    const Dtype to = dtype_from("tap", ring_dtype);
    p.ring = {writable("tap", *ring, to, {p.rows, p.tokens, p.channels}, "ring"),
              to,
              1,
              0,
              p.tokens * p.channels,
              p.channels};
  }
  cpu::tap(p, isa_from("tap", isa), nullptr);
}

}  // namespace

void bind_tap(py::module_& m) {
  m.def("tap", &tap, "tap_ on one ISA, in place on contiguous arrays.", py::arg("x"), py::kw_only(),
        py::arg("dtype") = "float32", py::arg("isa"), py::arg("vector") = py::none(),
        py::arg("strength") = py::none(), py::arg("removal") = py::none(),
        py::arg("steer_mask") = py::none(), py::arg("renorm") = false,
        py::arg("sums").noconvert() = py::none(), py::arg("squares").noconvert() = py::none(),
        py::arg("counts").noconvert() = py::none(), py::arg("ring") = py::none(),
        py::arg("ring_dtype") = "float32", py::arg("capture_mask") = py::none());
}

}  // namespace sidechain::host
