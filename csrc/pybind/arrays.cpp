// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

namespace sidechain::host {

std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa_supported(isa)) found.push_back(isa);
  }
  return found;
}

Isa isa_from(const std::string& op, const std::string& name) {
  for (Isa isa : supported_isas()) {
    if (name == isa_name(isa)) return isa;
  }
  throw py::value_error(op + ": expected an ISA this machine supports, got " + name);
}

Dtype dtype_from(const std::string& op, const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float16") return Dtype::kFloat16;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw py::value_error(op + ": expected float32, float16 or bfloat16, got " + name);
}

void* writable(const std::string& op, py::array& a, Dtype dtype, std::vector<py::ssize_t> shape,
               const char* name) {
  const py::ssize_t item = dtype == Dtype::kFloat32 ? 4 : 2;
  const bool fits = a.itemsize() == item && (a.flags() & py::array::c_style) != 0 &&
                    std::vector<py::ssize_t>(a.shape(), a.shape() + a.ndim()) == shape;
  if (!fits) throw py::value_error(op + ": unexpected layout of " + name);
  return a.mutable_data();
}

}  // namespace sidechain::host
