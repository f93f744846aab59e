// SPDX-License-Identifier: Apache-2.0
// What the C++ tests share: failures that are counted and shown, and awkward ways to split work.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "sidechain/isa.h"
#include "sidechain/parallel.h"

inline int failures = 0;

#define EXPECT(condition, ...)                    \
  do {                                            \
    if (!(condition)) {                           \
      ++failures;                                 \
      std::printf("%s:%d: ", __FILE__, __LINE__); \
      std::printf(__VA_ARGS__);                   \
      std::printf("\n");                          \
    }                                             \
  } while (0)

// Splits the work in the least convenient way: backwards, one iteration at a time.
inline void backwards(int64_t n, int64_t, sidechain::cpu::Body body, void* context) {
  for (int64_t i = n; i-- > 0;) body(i, i + 1, context);
}

// |got - want| <= relative |want|, in the root of the sum of squares.
template <class A, class B>
void expect_close(sidechain::Isa isa, const char* what, const std::vector<A>& got,
                  const std::vector<B>& want, double relative) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  EXPECT(got.size() == want.size() && error <= relative * relative * size,
         "%s: %s of %zu: relative error %.3e", sidechain::isa_name(isa), what, want.size(),
         std::sqrt(error / size));
}

inline std::vector<float> normal(std::mt19937& random, int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> draw(0.0f, scale);
  std::vector<float> values(n);
  for (float& value : values) value = draw(random);
  return values;
}

// k different numbers below n for each row; the last of a row is -1 where k > 1.
inline std::vector<int32_t> random_indices(std::mt19937& random, int64_t rows, int64_t k,
                                           int64_t n) {
  std::vector<int32_t> indices;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = random() % n;
    const int64_t stride = n > 1 ? 1 + random() % (n / (k + 1) + 1) : 1;
    for (int64_t j = 0; j < k; ++j) {
      indices.push_back(k > 1 && j == k - 1 ? -1 : static_cast<int32_t>((first + j * stride) % n));
    }
  }
  return indices;
}

// Runs a test on every instruction set this machine has, and returns the exit code.
template <class Test>
int on_every_isa(Test test) {
  using sidechain::Isa;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (!sidechain::isa_supported(isa)) {
      std::printf("%s: not supported by this machine\n", sidechain::isa_name(isa));
      continue;
    }
    test(isa);
    std::printf("%s: done\n", sidechain::isa_name(isa));
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
