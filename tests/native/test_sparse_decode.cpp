// SPDX-License-Identifier: Apache-2.0
// sparse_decode on every instruction set this machine has, against a double-precision loop.
#include "sidechain/sparse_decode.h"

#include "expect.h"

namespace {

using sidechain::Dtype;
using sidechain::Isa;

struct Shape {
  int64_t rows, width, features, k;
};

struct Problem {
  Shape s;
  std::vector<float> values, w_dec, b_dec, target, row_weight;
  std::vector<int32_t> indices;
};

Problem random_problem(const Shape& s) {
  std::mt19937 random(7);
  return {s,
          normal(random, s.rows * s.k),
          normal(random, s.features * s.width),
          normal(random, s.width),
          normal(random, s.rows * s.width),
          normal(random, s.rows),
          random_indices(random, s.rows, s.k, s.features)};
}

struct Result {
  std::vector<float> error, loss, dvalues, dw_dec, dvalues_alone;
};

Result run(const Problem& q, Isa isa, sidechain::cpu::ParallelFor parallel_for) {
  const Shape& s = q.s;
  Result r;
  r.error.assign(s.rows * s.width, -7.0f);
  r.loss.assign(s.rows, -7.0f);
  r.dvalues.assign(s.rows * s.k, -7.0f);
  r.dvalues_alone = r.dvalues;
  r.dw_dec.assign(s.features * s.width, -7.0f);
  sidechain::DecodeParams p = {};
  p.codes.values = q.values.data(), p.codes.indices = q.indices.data();
  p.codes.rows = s.rows, p.codes.width = p.codes.values_row = p.codes.indices_row = s.k;
  p.features = s.features, p.width = s.width;
  p.w_dec = {q.w_dec.data(), Dtype::kFloat32, s.width};
  p.b_dec = q.b_dec.data();
  p.out = r.error.data(), p.compare = true;
  p.target = {q.target.data(), Dtype::kFloat32, s.width};
  p.row_weight = q.row_weight.data();
  p.loss = r.loss.data(), p.dvalues = r.dvalues.data();
  sidechain::cpu::sparse_decode(p, isa, parallel_for);

  sidechain::DecodeBackwardParams b = {};
  b.codes = p.codes, b.features = s.features, b.width = s.width, b.w_dec = p.w_dec;
  b.grad = static_cast<const float*>(p.target.data), b.grad_row = p.target.row;
  b.dvalues = r.dvalues_alone.data(), b.dw_dec = r.dw_dec.data();
  sidechain::cpu::sparse_decode_backward(b, isa, parallel_for);
  return r;
}

struct Wide {
  std::vector<double> error, loss, dvalues, dw_dec, dvalues_alone;
};

Wide plain(const Problem& q) {
  const Shape& s = q.s;
  Wide r;
  r.dw_dec.assign(s.features * s.width, 0.0);
  for (int64_t n = 0; n < s.rows; ++n) {
    double squares = 0;
    for (int64_t c = 0; c < s.width; ++c) {
      double sum = q.b_dec[c] - static_cast<double>(q.target[n * s.width + c]);
      for (int64_t j = 0; j < s.k; ++j) {
        const int64_t f = q.indices[n * s.k + j];
        if (f < 0) continue;
        sum += static_cast<double>(q.values[n * s.k + j]) * q.w_dec[f * s.width + c];
        r.dw_dec[f * s.width + c] +=
            static_cast<double>(q.values[n * s.k + j]) * q.target[n * s.width + c];
      }
      r.error.push_back(sum);
      squares += sum * sum;
    }
    r.loss.push_back(squares);
    for (int64_t j = 0; j < s.k; ++j) {
      const int64_t f = q.indices[n * s.k + j];
      double with_error = 0, with_grad = 0;
      for (int64_t c = 0; f >= 0 && c < s.width; ++c) {
        with_error += r.error[n * s.width + c] * q.w_dec[f * s.width + c];
        with_grad += static_cast<double>(q.target[n * s.width + c]) * q.w_dec[f * s.width + c];
      }
      r.dvalues.push_back(q.row_weight[n] * with_error);
      r.dvalues_alone.push_back(with_grad);
    }
  }
  return r;
}

void test(Isa isa) {
  const Shape shapes[] = {{3, 1, 5, 2},       {7, 33, 40, 5}, {5, 96, 200, 8}, {2, 513, 64, 16},
                          {9, 1000, 3000, 3}, {4, 17, 30, 0}, {0, 16, 8, 2},   {40, 256, 9000, 32}};
  for (const Shape& s : shapes) {
    const Problem q = random_problem(s);
    const Result got = run(q, isa, nullptr), split = run(q, isa, backwards);
    const Wide want = plain(q);
    expect_close(isa, "error", got.error, want.error, 1e-6);
    expect_close(isa, "loss", got.loss, want.loss, 1e-6);
    expect_close(isa, "dvalues", got.dvalues, want.dvalues, 2e-6);
    expect_close(isa, "dw_dec", got.dw_dec, want.dw_dec, 1e-6);
    expect_close(isa, "dvalues alone", got.dvalues_alone, want.dvalues_alone, 2e-6);
    EXPECT(split.error == got.error && split.loss == got.loss && split.dvalues == got.dvalues &&
               split.dw_dec == got.dw_dec && split.dvalues_alone == got.dvalues_alone,
           "%s: result depends on how the work is split", sidechain::isa_name(isa));
  }
}

}  // namespace

int main() { return on_every_isa(test); }
