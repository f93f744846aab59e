// SPDX-License-Identifier: Apache-2.0
// sae_edit_ on every instruction set this machine has, against a double-precision loop.
#include "sidechain/sae_edit.h"

#include "expect.h"

namespace {

using sidechain::Isa;

void test_shape(Isa isa, int64_t rows, int64_t width, int64_t features, int64_t k) {
  std::mt19937 random(5);
  const std::vector<float> x = normal(random, rows * width), w = normal(random, features * width);
  const std::vector<float> now = normal(random, rows * k), strength = normal(random, rows);
  std::vector<float> old = normal(random, rows * k);
  const std::vector<int32_t> indices = random_indices(random, rows, k, features);
  std::vector<uint8_t> mask(rows, 1);
  if (rows > 2) mask[1] = 0;
  for (int64_t j = 0; j < k && rows > 0; ++j) old[j] = now[j];  // row 0 does not change

  sidechain::SaeEditParams p = {};
  p.codes.values = now.data(), p.codes.indices = indices.data();
  p.codes.rows = rows, p.codes.width = p.codes.values_row = p.codes.indices_row = k;
  p.values_old = old.data(), p.values_old_row = k;
  p.features = features, p.width = p.x_row = p.w_dec_row = width;
  p.w_dec = w.data();
  p.strength = strength.data(), p.strength_stride = 1;
  p.mask = mask.data(), p.mask_stride = 1;
  std::vector<float> got = x, split = x;
  p.x = got.data();
  sidechain::cpu::sae_edit(p, isa, nullptr);
  p.x = split.data();
  sidechain::cpu::sae_edit(p, isa, backwards);

  std::vector<double> want(x.begin(), x.end());
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t j = 0; j < k && mask[n] != 0; ++j) {
      const int64_t f = indices[n * k + j];
      const double change = strength[n] * (static_cast<double>(now[n * k + j]) - old[n * k + j]);
      for (int64_t c = 0; f >= 0 && c < width; ++c) {
        want[n * width + c] += change * w[f * width + c];
      }
    }
  }
  expect_close(isa, "x", got, want, 1e-6);
  EXPECT(got == split, "%s: result depends on how the work is split", sidechain::isa_name(isa));
  for (int64_t i = 0; i < width && rows > 0; ++i) {
    EXPECT(got[i] == x[i], "%s: a row without a change was written", sidechain::isa_name(isa));
  }
}

void test(Isa isa) {
  test_shape(isa, 3, 1, 4, 2);
  test_shape(isa, 9, 33, 20, 5);
  test_shape(isa, 5, 1536, 64, 8);
  test_shape(isa, 0, 8, 4, 2);
  test_shape(isa, 4, 8, 4, 0);
}

}  // namespace

int main() { return on_every_isa(test); }
