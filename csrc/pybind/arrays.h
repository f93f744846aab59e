// SPDX-License-Identifier: Apache-2.0
// NumPy arrays to params: what the per-ISA entry points share. `op` opens every message.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "sidechain/dtype.h"
#include "sidechain/isa.h"

namespace sidechain::host {

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style>;  // float16 and bfloat16 travel as uint16
using Floats = Array<float>;

// Instruction sets compiled in that this machine supports, weakest first.
std::vector<Isa> supported_isas();
// The supported ISA of that name.
Isa isa_from(const std::string& op, const std::string& name);
Dtype dtype_from(const std::string& op, const std::string& name);
// The data of a contiguous array of exactly this dtype and shape.
void* writable(const std::string& op, py::array& a, Dtype dtype, std::vector<py::ssize_t> shape,
               const char* name);

// One per op: adds its NumPy entry point.
void bind_attention_tap(py::module_& m);
void bind_encode_reduce(py::module_& m);
void bind_sae_edit(py::module_& m);
void bind_sae_update(py::module_& m);
void bind_sparse_decode(py::module_& m);
void bind_tap(py::module_& m);
void bind_topk_encode(py::module_& m);

// Not an op: the order and the gather of a store.
void bind_rows(py::module_& m);

}  // namespace sidechain::host
