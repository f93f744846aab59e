// SPDX-License-Identifier: Apache-2.0
// _host: build facts, instruction sets, and NumPy entry points that run a kernel on a chosen ISA.
// Holds no tensor and includes no torch header.
#include "arrays.h"

namespace {

namespace py = pybind11;

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (sidechain::Isa isa : sidechain::host::supported_isas()) names.push_back(isa_name(isa));
  return names;
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
  sidechain::host::bind_attention_tap(m);
  sidechain::host::bind_encode_reduce(m);
  sidechain::host::bind_sae_edit(m);
  sidechain::host::bind_sae_update(m);
  sidechain::host::bind_sparse_decode(m);
  sidechain::host::bind_tap(m);
  sidechain::host::bind_topk_encode(m);
  sidechain::host::bind_rows(m);
}
