// SPDX-License-Identifier: Apache-2.0
// _host: build facts, instruction sets, and NumPy entry points that run a kernel on a chosen ISA.
// Holds no tensor and includes no torch header.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "sidechain/tap.h"

namespace py = pybind11;

namespace {

using sidechain::Dtype;
using sidechain::Isa;
template <class T>
using Array = py::array_t<T, py::array::c_style>;  // float16 and bfloat16 travel as uint16
using Floats = Array<float>;

constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (sidechain::isa_supported(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

Isa isa_from(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == isa_name(isa) && sidechain::isa_supported(isa)) return isa;
  }
  throw py::value_error("tap: expected an ISA this machine supports, got " + name);
}

Dtype dtype_from(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float16") return Dtype::kFloat16;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw py::value_error("tap: expected float32, float16 or bfloat16, got " + name);
}

void* writable(py::array& a, Dtype dtype, std::vector<py::ssize_t> shape, const char* name) {
  const py::ssize_t item = dtype == Dtype::kFloat32 ? 4 : 2;
  const bool fits = a.itemsize() == item && (a.flags() & py::array::c_style) != 0 &&
                    std::vector<py::ssize_t>(a.shape(), a.shape() + a.ndim()) == shape;
  if (!fits) throw py::value_error(std::string("tap: unexpected layout of ") + name);
  return a.mutable_data();
}

// In place on contiguous arrays: x [R, T, C]; vectors [C] and strength, removal [R]; one capture
// slot: sums, squares [R, C], counts [R], ring [R, ceil(T / ring_stride), C].
void tap(py::array x, const std::string& dtype, const std::string& isa,
         std::optional<Floats> vector, std::optional<Floats> strength,
         std::optional<Floats> removal, std::optional<Array<bool>> steer_mask, bool renorm,
         std::optional<Floats> sums, std::optional<Floats> squares, std::optional<Floats> counts,
         std::optional<py::array> ring, const std::string& ring_dtype, int64_t ring_stride,
         std::optional<Array<bool>> capture_mask) {
  if (x.ndim() != 3 || ring_stride < 1) throw py::value_error("tap: expected x [R, T, C]");
  sidechain::TapParams p = {};
  p.dtype = dtype_from(dtype);
  p.rows = x.shape(0), p.tokens = x.shape(1), p.channels = x.shape(2);
  p.x = writable(x, p.dtype, {p.rows, p.tokens, p.channels}, "x");
  p.x_row = p.tokens * p.channels, p.x_token = p.channels;
  const auto floats = [](std::optional<Floats>& a, int64_t n, const char* name) -> float* {
    if (!a) return nullptr;
    if (a->size() != n) throw py::value_error(std::string("tap: unexpected size of ") + name);
    return a->mutable_data();
  };
  const auto mask = [&](std::optional<Array<bool>>& a) -> sidechain::TokenMask {
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
    const Dtype to = dtype_from(ring_dtype);
    const int64_t kept = (p.tokens + ring_stride - 1) / ring_stride;
    p.ring = {writable(*ring, to, {p.rows, kept, p.channels}, "ring"),
              to,
              1,
              0,
              kept * p.channels,
              p.channels,
              ring_stride};
  }
  sidechain::cpu::tap(p, isa_from(isa), nullptr);
}

py::dict build_info() {
  py::dict info;
  info["version"] = SIDECHAIN_VERSION;
  info["compiler"] = SIDECHAIN_COMPILER;
  info["torch_target"] = SIDECHAIN_TORCH_TARGET;
  info["cuda_architectures"] = SIDECHAIN_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts and per-ISA NumPy entry points of the native kernels.";
  m.def("build_info", &build_info, "Version, compiler, torch target and CUDA architectures.");
  m.def("isas", &isas, "Instruction sets compiled in that this machine supports, weakest first.");
  m.def(
      "best_isa", [] { return std::string(isa_name(sidechain::best_isa())); },
      "The instruction set the ops use.");
  m.def("tap", &tap, "tap_ on one ISA, in place on contiguous arrays.", py::arg("x"), py::kw_only(),
        py::arg("dtype") = "float32", py::arg("isa"), py::arg("vector") = py::none(),
        py::arg("strength") = py::none(), py::arg("removal") = py::none(),
        py::arg("steer_mask") = py::none(), py::arg("renorm") = false,
        py::arg("sums").noconvert() = py::none(), py::arg("squares").noconvert() = py::none(),
        py::arg("counts").noconvert() = py::none(), py::arg("ring") = py::none(),
        py::arg("ring_dtype") = "float32", py::arg("ring_stride") = 1,
        py::arg("capture_mask") = py::none());
}
