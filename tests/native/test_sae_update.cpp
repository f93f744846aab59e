// SPDX-License-Identifier: Apache-2.0
// sae_update_ on every instruction set this machine has, against a double-precision loop.
#include "sidechain/sae_update.h"

#include "expect.h"

namespace {

using sidechain::Dtype;
using sidechain::Isa;

constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEps = 1e-8, kDecay = 0.01, kClip = 0.5;

struct Problem {
  int64_t rows, d_in, d_out, features, k;
  std::vector<float> x, b_pre, values, dvalues, error;
  std::vector<int32_t> indices;
  std::vector<float> w_enc, w_dec, b_enc, m[6];
  std::vector<int64_t> last_fired;
  std::vector<float> b_pre_grad;
  float square = 0.0f, lr = 0.01f, clip = static_cast<float>(kClip);
  int64_t step = 5;
};

Problem random_problem(int64_t rows, int64_t d_in, int64_t d_out, int64_t features, int64_t k) {
  std::mt19937 random(11);
  Problem q = {rows, d_in, d_out, features, k, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  q.x = normal(random, rows * d_in), q.b_pre = normal(random, d_in);
  q.values = normal(random, rows * k), q.dvalues = normal(random, rows * k);
  q.error = normal(random, rows * d_out);
  q.indices = random_indices(random, rows, k, features);
  if (!q.values.empty()) q.values[0] = 0.0f;  // passes no gradient
  q.w_enc = normal(random, features * d_in), q.w_dec = normal(random, features * d_out);
  q.b_enc = normal(random, features);
  const int64_t sizes[] = {features * d_in, features * d_out, features};
  for (int i = 0; i < 6; ++i) {
    q.m[i] = normal(random, sizes[i / 2], 0.1f);
    if (i % 2 == 1) {
      for (float& square : q.m[i]) square *= square;
    }
  }
  q.last_fired.assign(features, 1);
  q.b_pre_grad.assign(d_in, -7.0f);
  return q;
}

void run(Problem& q, Isa isa, sidechain::cpu::ParallelFor parallel_for) {
  sidechain::SaeUpdateParams p = {};
  sidechain::SaeGradientParams& g = p.gradient;
  g.rows = q.rows, g.d_in = q.d_in, g.d_out = q.d_out, g.features = q.features;
  g.x = q.x.data(), g.x_row = q.d_in, g.b_pre = q.b_pre.data();
  sidechain::CodeGroup& group = g.groups[0];
  group.codes.values = q.values.data(), group.codes.indices = q.indices.data();
  group.codes.rows = q.rows, group.codes.width = q.k;
  group.codes.values_row = group.codes.indices_row = group.dvalues_row = q.k;
  group.dvalues = q.dvalues.data(), group.error = q.error.data(), group.error_row = q.d_out;
  g.group_count = 1, g.project = g.bias = true;
  p.state = {q.w_enc.data(), q.w_dec.data(), q.b_enc.data(),  q.m[0].data(), q.m[1].data(),
             q.m[2].data(),  q.m[3].data(),  Dtype::kFloat32, q.m[4].data(), q.m[5].data()};
  p.lr = &q.lr, p.step = &q.step, p.clip_scale = &q.clip;
  p.beta1 = kBeta1, p.beta2 = kBeta2, p.eps = kEps, p.weight_decay = kDecay;
  p.unit_norm = true;
  p.last_fired = q.last_fired.data(), p.b_pre_grad = q.b_pre_grad.data();
  sidechain::cpu::sae_gradient_square(g, q.w_dec.data(), &q.square, isa, parallel_for);
  sidechain::cpu::sae_update(p, isa, parallel_for);
}

using Doubles = std::vector<double>;

// Adam on one row of doubles; the squares of the gradient are returned.
void adam(Doubles& w, Doubles& m, Doubles& s, const Doubles& g, size_t from, double lr, double step,
          double decay) {
  for (size_t c = 0; c < g.size(); ++c) {
    const double grad = kClip * g[c];
    double &mean = m[from + c], &square = s[from + c], &weight = w[from + c];
    mean = kBeta1 * mean + (1 - kBeta1) * grad;
    square = kBeta2 * square + (1 - kBeta2) * grad * grad;
    const double size = mean / (1 - std::pow(kBeta1, step));
    const double root = std::sqrt(square / (1 - std::pow(kBeta2, step)));
    weight = weight * (1 - lr * decay) - lr * size / (root + kEps);
  }
}

struct Wide {
  Doubles w_enc, w_dec, b_enc, m[6], b_pre_grad;
  double square = 0;
};

Wide plain(Problem& q) {
  const auto widen = [](const std::vector<float>& v) { return Doubles(v.begin(), v.end()); };
  Wide r = {widen(q.w_enc), widen(q.w_dec), widen(q.b_enc), {}, Doubles(q.d_in, 0.0), 0.0};
  for (int i = 0; i < 6; ++i) r.m[i] = widen(q.m[i]);
  const auto lr = static_cast<double>(q.lr), step = static_cast<double>(q.step);
  for (int64_t f = 0; f < q.features; ++f) {
    Doubles enc(q.d_in, 0.0), dec(q.d_out, 0.0), bias(1, 0.0);
    for (int64_t i = 0; i < q.rows * q.k; ++i) {
      if (q.indices[i] != f || q.values[i] == 0.0f) continue;
      const int64_t n = i / q.k;
      for (int64_t c = 0; c < q.d_in; ++c) {
        enc[c] += q.dvalues[i] * (static_cast<double>(q.x[n * q.d_in + c]) - q.b_pre[c]);
      }
      for (int64_t c = 0; c < q.d_out; ++c) {
        dec[c] += static_cast<double>(q.values[i]) * q.error[n * q.d_out + c];
      }
      bias[0] += q.dvalues[i];
      q.last_fired[f] = q.step;
    }
    double along = 0, norm = 0;
    for (int64_t c = 0; c < q.d_out; ++c) {
      along += dec[c] * r.w_dec[f * q.d_out + c];
      norm += std::pow(r.w_dec[f * q.d_out + c], 2);
    }
    for (int64_t c = 0; c < q.d_out; ++c) dec[c] -= along / norm * r.w_dec[f * q.d_out + c];
    for (int64_t c = 0; c < q.d_in; ++c) r.b_pre_grad[c] -= bias[0] * r.w_enc[f * q.d_in + c];
    for (const Doubles* g : {&enc, &dec, &bias}) {
      for (double v : *g) r.square += v * v;
    }
    adam(r.w_enc, r.m[0], r.m[1], enc, f * q.d_in, lr, step, kDecay);
    adam(r.w_dec, r.m[2], r.m[3], dec, f * q.d_out, lr, step, kDecay);
    adam(r.b_enc, r.m[4], r.m[5], bias, f, lr, step, 0.0);
    norm = 0;
    for (int64_t c = 0; c < q.d_out; ++c) norm += std::pow(r.w_dec[f * q.d_out + c], 2);
    for (int64_t c = 0; c < q.d_out; ++c) r.w_dec[f * q.d_out + c] /= std::sqrt(norm);
  }
  return r;
}

void test(Isa isa) {
  const int64_t shapes[][5] = {{3, 5, 7, 4, 2},     {20, 33, 16, 50, 6}, {64, 100, 129, 300, 8},
                               {200, 64, 64, 3, 2}, {0, 8, 8, 5, 2},     {4, 512, 1000, 700, 16}};
  for (const auto& s : shapes) {
    Problem got = random_problem(s[0], s[1], s[2], s[3], s[4]), split = got, want = got;
    run(got, isa, nullptr);
    run(split, isa, backwards);
    const Wide r = plain(want);
    expect_close(isa, "w_enc", got.w_enc, r.w_enc, 1e-6);
    expect_close(isa, "w_dec", got.w_dec, r.w_dec, 1e-6);
    expect_close(isa, "b_enc", got.b_enc, r.b_enc, 1e-6);
    for (int i = 0; i < 6; ++i) expect_close(isa, "state", got.m[i], r.m[i], 1e-6);
    expect_close(isa, "b_pre_grad", got.b_pre_grad, r.b_pre_grad, 2e-6);
    expect_close(isa, "square", std::vector<float>{got.square}, Doubles{r.square}, 1e-6);
    EXPECT(got.last_fired == want.last_fired, "%s: last_fired", sidechain::isa_name(isa));
    bool alike = got.w_enc == split.w_enc && got.w_dec == split.w_dec && got.b_enc == split.b_enc &&
                 got.b_pre_grad == split.b_pre_grad && got.square == split.square;
    for (int i = 0; i < 6; ++i) alike = alike && got.m[i] == split.m[i];
    EXPECT(alike, "%s: result depends on how the work is split", sidechain::isa_name(isa));
  }
}

}  // namespace

int main() { return on_every_isa(test); }
