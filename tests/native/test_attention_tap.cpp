// SPDX-License-Identifier: Apache-2.0
// attention_tap on every instruction set this machine has, against a double-precision loop.
#include "sidechain/attention_tap.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using sidechain::Isa;

struct Shape {
  int64_t rows, tokens, heads, width, contexts, length, kv_heads;
};

struct Buffers {
  std::vector<float> q, k, v, out, sums, squares;
  std::vector<uint8_t> readable, captured;
  std::vector<int32_t> index;
};

Buffers random_buffers(const Shape& s) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  Buffers b;
  const auto fill = [&](std::vector<float>& to, int64_t n) {
    to.resize(n);
    for (float& value : to) value = normal(random);
  };
  fill(b.q, s.rows * s.tokens * s.heads * s.width);
  fill(b.k, s.contexts * s.length * s.kv_heads * s.width);
  fill(b.v, s.contexts * s.length * s.kv_heads * s.width);
  fill(b.sums, s.rows * s.heads * s.width);
  fill(b.squares, s.rows * s.heads * s.width);
  b.out.assign(b.q.size(), -77.0f);
  for (int64_t i = 0; i < s.contexts * s.length; ++i) b.readable.push_back(random() % 3 != 0);
  for (int64_t i = 0; i < s.rows * s.tokens; ++i) b.captured.push_back(random() % 4 != 0);
  for (int64_t r = 0; r < s.rows; ++r) b.index.push_back(static_cast<int32_t>(r % s.contexts));
  b.index[0] = -1;
  return b;
}

sidechain::AttentionTapParams params(Buffers& b, const Shape& s) {
  sidechain::AttentionTapParams p = {};
  p.out = b.out.data(), p.q = b.q.data();
  p.rows = s.rows, p.tokens = s.tokens, p.heads = s.heads, p.width = s.width;
  p.q_head = s.width, p.q_token = s.heads * s.width, p.q_row = s.tokens * p.q_token;
  p.contexts = s.contexts, p.length = s.length, p.kv_heads = s.kv_heads;
  const int64_t token = s.kv_heads * s.width;
  p.keys = {b.k.data(), s.length * token, token, s.width};
  p.values = {b.v.data(), s.length * token, token, s.width};
  p.context_index = b.index.data(), p.context_index_stride = 1;
  p.context_mask = {b.readable.data(), s.length, 1};
  p.scale = 1.0f / std::sqrt(static_cast<float>(s.width));
  const int64_t channels = s.heads * s.width;
  p.sums = {b.sums.data(), 1, 0, channels};
  p.squares = {b.squares.data(), 1, 0, channels};
  p.capture_mask = {b.captured.data(), s.tokens, 1};
  return p;
}

// One query of one head in double precision.
std::vector<double> attend(const Buffers& b, const Shape& s, int64_t row, int64_t token,
                           int64_t head) {
  std::vector<double> out(s.width, 0.0), scores;
  const int64_t context = b.index[row];
  if (context < 0) return out;
  const int64_t kv_head = head * s.kv_heads / s.heads;
  const float* q = &b.q[((row * s.tokens + token) * s.heads + head) * s.width];
  double total = 0.0;
  for (int64_t n = 0; n < s.length; ++n) {
    if (!b.readable[context * s.length + n]) continue;
    const int64_t at = ((context * s.length + n) * s.kv_heads + kv_head) * s.width;
    double score = 0.0;
    for (int64_t d = 0; d < s.width; ++d) score += double(q[d]) * b.k[at + d];
    const double p = std::exp(score / std::sqrt(double(s.width)));
    total += p;
    for (int64_t d = 0; d < s.width; ++d) out[d] += p * b.v[at + d];
  }
  // Nothing readable: zeros.
  for (double& value : out) value /= total > 0.0 ? total : 1.0;
  return out;
}

double worst_error(const Buffers& before, const Buffers& after, const Shape& s) {
  double worst = 0.0;
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t h = 0; h < s.heads; ++h) {
      std::vector<double> sums(s.width), squares(s.width);
      for (int64_t t = 0; t < s.tokens; ++t) {
        const std::vector<double> want = attend(before, s, r, t, h);
        const float* got = &after.out[((r * s.tokens + t) * s.heads + h) * s.width];
        for (int64_t d = 0; d < s.width; ++d) {
          worst = std::fmax(worst, std::fabs(got[d] - want[d]));
          if (!before.captured[r * s.tokens + t]) continue;
          sums[d] += want[d];
          squares[d] += want[d] * want[d];
        }
      }
      for (int64_t d = 0; d < s.width; ++d) {
        const int64_t at = (r * s.heads + h) * s.width + d;
        worst = std::fmax(worst, std::fabs(after.sums[at] - before.sums[at] - sums[d]) / s.tokens);
        const double square = after.squares[at] - before.squares[at] - squares[d];
        worst = std::fmax(worst, std::fabs(square) / s.tokens);
      }
    }
  }
  return worst;
}

// Runs the pieces of the work backwards, in many splits.
void shuffled(int64_t n, int64_t, sidechain::cpu::Body body, void* context) {
  for (int64_t begin = (n - 1) / 3 * 3; begin >= 0; begin -= 3) {
    body(begin, begin + 3 < n ? begin + 3 : n, context);
  }
}

}  // namespace

int main() {
  int failures = 0;
  const Shape shapes[] = {{4, 65, 4, 32, 3, 24, 2},
                          {2, 7, 1, 1, 2, 1, 1},
                          {3, 200, 2, 40, 2, 77, 1},
                          {2, 6, 3, 128, 2, 300, 3},
                          {2, 19, 2, 23, 9, 53, 2}};
  for (const Shape& s : shapes) {
    for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
      if (!sidechain::isa_supported(isa)) continue;
      Buffers before = random_buffers(s);
      Buffers after = before, split = before;
      sidechain::cpu::attention_tap(params(after, s), isa, nullptr);
      sidechain::cpu::attention_tap(params(split, s), isa, shuffled);
      const double error = worst_error(before, after, s);
      const bool same = after.out == split.out && after.sums == split.sums;
      if (!(error < 3e-6) || !same) {
        ++failures;
        std::printf("T%ld S%ld D%ld %s: error %g, %s over splits\n", long(s.tokens), long(s.length),
                    long(s.width), isa_name(isa), error, same ? "equal" : "different");
      }
    }
  }
  std::printf("attention_tap: %s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
