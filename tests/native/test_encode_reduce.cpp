// SPDX-License-Identifier: Apache-2.0
// code_sums_ on every instruction set this machine has, against a double-precision loop.
#include "sidechain/encode_reduce.h"

#include "expect.h"

namespace {

using sidechain::Isa;

void test_shape(Isa isa, int64_t rows, int64_t features, int64_t k, int64_t labels) {
  std::mt19937 random(3);
  const std::vector<float> values = normal(random, rows * k);
  const std::vector<int32_t> indices = random_indices(random, rows, k, features);
  std::vector<int64_t> label(rows);
  for (int64_t& g : label) g = static_cast<int64_t>(random() % (labels + 2)) - 1;

  struct Sums {
    std::vector<float> sums, squares;
    std::vector<int64_t> counts, rows;
  };
  const int64_t cells = labels * features;
  Sums got = {normal(random, cells), normal(random, cells), std::vector<int64_t>(cells, 3),
              std::vector<int64_t>(labels, 2)};
  Sums split = got, before = got;
  const auto run = [&](Sums& to, sidechain::cpu::ParallelFor parallel_for) {
    sidechain::CodeSumsParams p = {};
    p.codes.values = values.data(), p.codes.indices = indices.data();
    p.codes.rows = rows, p.codes.width = p.codes.values_row = p.codes.indices_row = k;
    p.label = label.data(), p.label_stride = 1;
    p.labels = labels, p.features = features;
    p.sums = to.sums.data(), p.squares = to.squares.data();
    p.counts = to.counts.data(), p.rows = to.rows.data();
    sidechain::cpu::code_sums(p, isa, parallel_for);
  };
  run(got, nullptr);
  run(split, backwards);

  std::vector<double> sums(before.sums.begin(), before.sums.end());
  std::vector<double> squares(before.squares.begin(), before.squares.end());
  for (int64_t n = 0; n < rows; ++n) {
    if (label[n] < 0 || label[n] >= labels) continue;
    ++before.rows[label[n]];
    for (int64_t j = 0; j < k; ++j) {
      if (indices[n * k + j] < 0) continue;
      const int64_t cell = label[n] * features + indices[n * k + j];
      const double value = values[n * k + j];
      sums[cell] += value, squares[cell] += value * value, ++before.counts[cell];
    }
  }
  expect_close(isa, "sums", got.sums, sums, 1e-6);
  expect_close(isa, "squares", got.squares, squares, 1e-6);
  EXPECT(got.counts == before.counts && got.rows == before.rows, "%s: counts",
         sidechain::isa_name(isa));
  EXPECT(got.sums == split.sums && got.squares == split.squares && got.counts == split.counts &&
             got.rows == split.rows,
         "%s: result depends on how the work is split", sidechain::isa_name(isa));
}

void test(Isa isa) {
  test_shape(isa, 40, 30, 4, 3);
  test_shape(isa, 500, 5, 2, 1);
  test_shape(isa, 0, 5, 2, 1);
  test_shape(isa, 7, 3000, 64, 2);
}

}  // namespace

int main() { return on_every_isa(test); }
