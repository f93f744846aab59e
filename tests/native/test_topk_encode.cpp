// SPDX-License-Identifier: Apache-2.0
// topk_encode on every instruction set this machine has, against a dense double-precision loop.
#include "sidechain/topk_encode.h"

#include "cpu/topk/support.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iterator>
#include <numeric>
#include <random>
#include <vector>

namespace {

using sidechain::Dtype;
using sidechain::Isa;
using sidechain::TopkMode;

int failures = 0;

#define EXPECT(condition, ...)                    \
  do {                                            \
    if (!(condition)) {                           \
      ++failures;                                 \
      std::printf("%s:%d: ", __FILE__, __LINE__); \
      std::printf(__VA_ARGS__);                   \
      std::printf("\n");                          \
    }                                             \
  } while (0)

struct Shape {
  int64_t rows, width, features, k;
};

struct Problem {
  Shape shape;
  std::vector<float> x, w, b_enc, b_pre, threshold;
  std::vector<float> z;  // [N, F], summed in double, rounded once

  explicit Problem(const Shape& s) : shape(s) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& to, int64_t n, float scale) {
      to.resize(n);
      for (float& value : to) value = scale * normal(random);
    };
    fill(x, s.rows * s.width, 1.0f);
    fill(w, s.features * s.width, 0.2f);
    fill(b_enc, s.features, 0.1f);
    fill(b_pre, s.width, 1.0f);
    fill(threshold, s.features, 1.0f);
    for (int64_t n = 0; n < s.rows; ++n) {
      for (int64_t f = 0; f < s.features; ++f) {
        double sum = 0;
        for (int64_t c = 0; c < s.width; ++c) {
          sum += static_cast<double>(x[n * s.width + c] - b_pre[c]) * w[f * s.width + c];
        }
        z.push_back(std::max(0.0f, static_cast<float>(sum + b_enc[f])));
      }
    }
  }

  sidechain::TopkEncodeParams params(TopkMode mode) const {
    sidechain::TopkEncodeParams p = {};
    p.rows = shape.rows, p.width = shape.width, p.features = shape.features, p.k = shape.k;
    p.x = {x.data(), Dtype::kFloat32, shape.width};
    p.w_enc = {w.data(), Dtype::kFloat32, shape.width};
    p.b_enc = {b_enc.data(), Dtype::kFloat32, 1};
    p.b_pre = {b_pre.data(), Dtype::kFloat32, 1};
    if (mode == TopkMode::kThreshold) p.threshold = {threshold.data(), Dtype::kFloat32, 1};
    p.mode = mode;
    return p;
  }
};

// Splits the work in the least convenient way: backwards, one iteration at a time.
void backwards(int64_t n, int64_t, sidechain::cpu::Body body, void* context) {
  for (int64_t i = n; i-- > 0;) body(i, i + 1, context);
}

struct Lists {
  std::vector<float> values;
  std::vector<int32_t> indices;
};

void allocate(int64_t count, float** values, int32_t** indices, void* context) {
  auto* lists = static_cast<Lists*>(context);
  lists->values.resize(count);
  lists->indices.resize(count);
  *values = lists->values.data();
  *indices = lists->indices.data();
}

bool close(float got, float want) { return std::abs(got - want) <= 1.3e-7f * std::abs(want); }

// Against a sort: few and many distinct numbers, zeros, the largest there is, fewer than k.
void test_kth_largest(Isa isa) {
  const auto kernels = sidechain::cpu::topk_kernels(isa);
  std::mt19937 random(7);
  for (int64_t n : {0, 1, 5, 16, 67, 400}) {
    for (uint32_t most : {0u, 2u, 0x40000000u, 0xffffffffu}) {
      std::uniform_int_distribution<uint32_t> draw(0, most);
      std::vector<uint32_t> numbers(n);
      for (uint32_t& number : numbers) number = draw(random);
      if (n > 0) numbers[n / 2] = most;
      std::vector<uint32_t> sorted = numbers;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      for (int64_t k = 1; k <= n + 1; ++k) {
        std::vector<uint32_t> given = numbers;
        const uint32_t got = sidechain::cpu::kth_largest(kernels, given, k);
        const uint32_t want = k <= n ? sorted[k - 1] : 0;
        EXPECT(got == want, "%s: number %ld of %ld up to %u: %u, not %u", sidechain::isa_name(isa),
               static_cast<long>(k), static_cast<long>(n), most, got, want);
      }
    }
  }
}

void test_rows(Isa isa, const Problem& problem) {
  const Shape& s = problem.shape;
  std::vector<float> values(s.rows * s.k), again(values);
  std::vector<int32_t> indices(s.rows * s.k), other(indices);
  const auto p = problem.params(TopkMode::kRows);
  sidechain::cpu::topk_encode(p, isa, nullptr, values.data(), indices.data());
  sidechain::cpu::topk_encode(p, isa, backwards, again.data(), other.data());
  EXPECT(values == again && indices == other, "%s: depends on the splitting",
         sidechain::isa_name(isa));
  for (int64_t n = 0; n < s.rows; ++n) {
    const float* z = problem.z.data() + n * s.features;
    std::vector<int32_t> order(s.features);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return z[a] > z[b]; });
    for (int64_t j = 0; j < s.k; ++j) {
      const bool idle = z[order[j]] == 0.0f;
      EXPECT(
          indices[n * s.k + j] == (idle ? -1 : order[j]) && close(values[n * s.k + j], z[order[j]]),
          "%s: row %ld slot %ld of [%ld, %ld, %ld]: %d, %g", sidechain::isa_name(isa),
          static_cast<long>(n), static_cast<long>(j), static_cast<long>(s.rows),
          static_cast<long>(s.width), static_cast<long>(s.features), indices[n * s.k + j],
          static_cast<double>(values[n * s.k + j]));
    }
  }
}

void test_lists(Isa isa, const Problem& problem, TopkMode mode) {
  const Shape& s = problem.shape;
  std::vector<float> sorted = problem.z;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const int64_t budget = s.rows * s.k;
  const float least = budget > 0 ? sorted[budget - 1] : 0.0f;
  for (auto* parallel_for : {static_cast<sidechain::cpu::ParallelFor>(nullptr), &backwards}) {
    Lists got;
    std::vector<int64_t> offsets(s.rows + 1, -1);
    sidechain::cpu::topk_encode_ragged(problem.params(mode), isa, parallel_for, offsets.data(),
                                       allocate, &got);
    size_t at = 0;
    for (int64_t n = 0; n < s.rows; ++n) {
      EXPECT(offsets[n] == static_cast<int64_t>(at), "%s: offset of row %ld",
             sidechain::isa_name(isa), static_cast<long>(n));
      for (int64_t f = 0; f < s.features; ++f) {
        const float z = problem.z[n * s.features + f];
        const bool kept = mode == TopkMode::kBatch ? z > 0.0f && z >= least
                                                   : z > std::max(0.0f, problem.threshold[f]);
        if (!kept) continue;
        EXPECT(at < got.indices.size() && got.indices[at] == f && close(got.values[at], z),
               "%s: row %ld misses feature %ld", sidechain::isa_name(isa), static_cast<long>(n),
               static_cast<long>(f));
        ++at;
      }
    }
    EXPECT(at == got.values.size() && offsets[s.rows] == static_cast<int64_t>(at),
           "%s: more codes than expected", sidechain::isa_name(isa));
  }
}

void test_backward(Isa isa, const Problem& problem) {
  const Shape& s = problem.shape;
  std::vector<float> grad(s.rows * s.k);
  std::vector<int32_t> indices(s.rows * s.k);
  sidechain::cpu::topk_encode(problem.params(TopkMode::kRows), isa, nullptr, grad.data(),
                              indices.data());
  std::vector<float> dx(s.rows * s.width, NAN), dw(s.features * s.width, NAN), db(s.features, NAN);
  sidechain::TopkBackwardParams p = {};
  p.x = {problem.x.data(), Dtype::kFloat32, s.width};
  p.w_enc = {problem.w.data(), Dtype::kFloat32, s.width};
  p.b_pre = {problem.b_pre.data(), Dtype::kFloat32, 1};
  p.grad = grad.data(), p.indices = indices.data();
  p.rows = s.rows, p.width = s.width, p.features = s.features, p.k = s.k;
  p.dx = dx.data(), p.dw = dw.data(), p.db = db.data();
  sidechain::cpu::topk_encode_backward(p, isa, backwards);
  std::vector<double> want_x(dx.size()), want_w(dw.size()), want_b(db.size());
  for (int64_t n = 0; n < s.rows; ++n) {
    for (int64_t j = 0; j < s.k; ++j) {
      const int64_t f = indices[n * s.k + j];
      if (f < 0) continue;
      const double g = grad[n * s.k + j];
      want_b[f] += g;
      for (int64_t c = 0; c < s.width; ++c) {
        want_x[n * s.width + c] += g * problem.w[f * s.width + c];
        want_w[f * s.width + c] += g * (problem.x[n * s.width + c] - problem.b_pre[c]);
      }
    }
  }
  const auto expect = [&](const char* what, const std::vector<float>& got,
                          const std::vector<double>& want) {
    double error = 0, size = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      error += (got[i] - want[i]) * (got[i] - want[i]);
      size += want[i] * want[i];
    }
    EXPECT(error <= 1e-12 * size, "%s: %s errs by %g", sidechain::isa_name(isa), what,
           std::sqrt(error / size));
  };
  expect("dx", dx, want_x);
  expect("dw", dw, want_w);
  expect("db", db, want_b);
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 1, 1},     {7, 3, 5, 5},       {9, 37, 251, 6},
                          {70, 64, 300, 8}, {130, 129, 515, 3}, {0, 8, 9, 2}};
  std::vector<Problem> problems(std::begin(shapes), std::end(shapes));
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (!sidechain::isa_supported(isa)) {
      std::printf("%s: not supported by this machine\n", sidechain::isa_name(isa));
      continue;
    }
    test_kth_largest(isa);
    for (const Problem& problem : problems) {
      test_rows(isa, problem);
      test_lists(isa, problem, TopkMode::kBatch);
      test_lists(isa, problem, TopkMode::kThreshold);
      test_backward(isa, problem);
    }
    std::printf("%s: done\n", sidechain::isa_name(isa));
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
