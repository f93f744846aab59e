// SPDX-License-Identifier: Apache-2.0
#include "sidechain/attention_tap.h"

#include "arrays.h"

namespace sidechain::host {
namespace {

constexpr char kOp[] = "attention_tap";

// Contiguous arrays: q [R, T, H, D], k_bank and v_bank [M, S, Hkv, D]; one capture slot: sums,
// squares [R, H D], counts [R]. Returns [R, T, H, D].
py::array attention_tap(py::array q, py::array k_bank, py::array v_bank, const std::string& dtype,
                        const std::string& isa, std::optional<Array<int32_t>> context_index,
                        std::optional<Array<bool>> context_mask, float scale,
                        std::optional<Floats> sums, std::optional<Floats> squares,
                        std::optional<Floats> counts, std::optional<Array<bool>> capture_mask) {
  if (q.ndim() != 4 || k_bank.ndim() != 4) {
    throw py::value_error("attention_tap: expected q [R, T, H, D] and k_bank [M, S, Hkv, D]");
  }
  AttentionTapParams p = {};
  p.dtype = dtype_from(kOp, dtype);
  p.rows = q.shape(0), p.tokens = q.shape(1), p.heads = q.shape(2), p.width = q.shape(3);
  p.contexts = k_bank.shape(0), p.length = k_bank.shape(1), p.kv_heads = k_bank.shape(2);
  if (p.kv_heads < 1 || p.length < 1 || p.heads % p.kv_heads != 0) {
    throw py::value_error("attention_tap: expected S >= 1 and Hkv that divides H");
  }
  p.q = writable(kOp, q, p.dtype, {p.rows, p.tokens, p.heads, p.width}, "q");
  p.q_head = p.width, p.q_token = p.heads * p.width, p.q_row = p.tokens * p.q_token;
  const auto bank = [&](py::array& a, const char* name) -> ContextBank {
    void* data = writable(kOp, a, p.dtype, {p.contexts, p.length, p.kv_heads, p.width}, name);
    return {data, p.length * p.kv_heads * p.width, p.kv_heads * p.width, p.width};
  };
  p.keys = bank(k_bank, "k_bank");
  p.values = bank(v_bank, "v_bank");
  const auto sized = [](auto& a, int64_t n, const char* name) {
    if (!a) return decltype(a->mutable_data())(nullptr);
    if (a->size() != n) throw py::value_error(std::string(kOp) + ": unexpected size of " + name);
    return a->mutable_data();
  };
  const auto mask = [&](std::optional<Array<bool>>& a, int64_t rows, int64_t tokens,
                        const char* name) -> TokenMask {
    return {reinterpret_cast<const uint8_t*>(sized(a, rows * tokens, name)), tokens, 1};
  };
  p.context_index = sized(context_index, p.rows, "context_index"), p.context_index_stride = 1;
  p.context_mask = mask(context_mask, p.contexts, p.length, "context_mask");
  p.scale = scale;
  const int64_t channels = p.heads * p.width;
  p.sums = {sized(sums, p.rows * channels, "sums"), 1, 0, channels};
  p.squares = {sized(squares, p.rows * channels, "squares"), 1, 0, channels};
  p.counts = {sized(counts, p.rows, "counts"), 1, 0, 1};
  p.capture_mask = mask(capture_mask, p.rows, p.tokens, "capture_mask");
  py::array out(q.dtype(), std::vector<py::ssize_t>{p.rows, p.tokens, p.heads, p.width});
  p.out = out.mutable_data();
  cpu::attention_tap(p, isa_from(kOp, isa), nullptr);
  return out;
}

}  // namespace

void bind_attention_tap(py::module_& m) {
  m.def("attention_tap", &attention_tap, "attention_tap on one ISA, on contiguous arrays.",
        py::arg("q"), py::arg("k_bank"), py::arg("v_bank"), py::kw_only(),
        py::arg("dtype") = "float32", py::arg("isa"), py::arg("context_index") = py::none(),
        py::arg("context_mask") = py::none(), py::arg("scale"),
        py::arg("sums").noconvert() = py::none(), py::arg("squares").noconvert() = py::none(),
        py::arg("counts").noconvert() = py::none(), py::arg("capture_mask") = py::none());
}

}  // namespace sidechain::host
