// SPDX-License-Identifier: Apache-2.0
// tap_ on every instruction set this machine has, against a token-by-token double-precision loop.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "expect.h"
#include "sidechain/tap.h"

namespace {

using sidechain::Dtype;
using sidechain::Isa;

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31;
  const int mantissa = h & 1023;
  const float sign = h >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

float bfloat_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct Shape {
  int64_t rows, tokens, channels;
};

struct Buffers {
  std::vector<float> x, v, strength, removal, sums, squares, counts, ring;
  std::vector<uint8_t> steer, capture;
};

Buffers random_buffers(const Shape& s) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  Buffers b;
  const auto fill = [&](std::vector<float>& to, int64_t n) {
    to.resize(n);
    for (float& value : to) value = normal(random);
  };
  fill(b.x, s.rows * s.tokens * s.channels);
  fill(b.v, s.channels);
  for (float& value : b.v) value /= std::sqrt(static_cast<float>(s.channels));
  fill(b.strength, s.rows);
  fill(b.removal, s.rows);
  fill(b.sums, s.rows * s.channels);
  fill(b.squares, s.rows * s.channels);
  b.counts.assign(s.rows, 2.0f);
  b.ring.assign(s.rows * s.tokens * s.channels, -7.0f);
  for (int64_t i = 0; i < s.rows * s.tokens; ++i) {
    b.steer.push_back(random() % 4 != 0);
    b.capture.push_back(random() % 3 != 0);
  }
  return b;
}

sidechain::TapParams params(Buffers& b, const Shape& s) {
  sidechain::TapParams p = {};
  const int64_t row = s.tokens * s.channels;
  p.x = b.x.data(), p.dtype = Dtype::kFloat32;
  p.rows = s.rows, p.tokens = s.tokens, p.channels = s.channels;
  p.x_row = row, p.x_token = s.channels;
  p.vectors = b.v.data(), p.vector_count = p.vector_slots = 1;
  p.strength = b.strength.data(), p.strength_stride = 1;
  p.removal = b.removal.data(), p.removal_stride = 1;
  p.steer_mask = {b.steer.data(), s.tokens, 1};
  p.renorm = true;
  p.sums = {b.sums.data(), 1, 0, s.channels};
  p.squares = {b.squares.data(), 1, 0, s.channels};
  p.counts = {b.counts.data(), 1, 0, 1};
  p.ring = {b.ring.data(), Dtype::kFloat32, 1, 0, s.tokens * s.channels, s.channels};
  p.capture_mask = {b.capture.data(), s.tokens, 1};
  return p;
}

void plain(Buffers& b, const Shape& s) {
  for (int64_t r = 0; r < s.rows; ++r) {
    std::vector<double> sum(s.channels), square(s.channels);
    for (int64_t t = 0; t < s.tokens; ++t) {
      float* x = b.x.data() + (r * s.tokens + t) * s.channels;
      double xx = 0, xv = 0, yy = 0;
      for (int64_t c = 0; c < s.channels; ++c) {
        xx += static_cast<double>(x[c]) * x[c];
        xv += static_cast<double>(x[c]) * b.v[c];
      }
      if (b.capture[r * s.tokens + t]) {
        b.counts[r] += 1.0f;
        for (int64_t c = 0; c < s.channels; ++c) {
          sum[c] += x[c];
          square[c] += static_cast<double>(x[c]) * x[c];
          b.ring[(r * s.tokens + t) * s.channels + c] = x[c];
        }
      }
      if (!b.steer[r * s.tokens + t]) continue;
      const double along = b.strength[r] - b.removal[r] * std::fmax(0.0, xv);
      for (int64_t c = 0; c < s.channels; ++c) {
        const double y = x[c] + along * b.v[c];
        yy += y * y;
      }
      const double scale = yy == 0 ? 1 : std::sqrt(xx / yy);
      for (int64_t c = 0; c < s.channels; ++c) {
        x[c] = static_cast<float>((x[c] + along * b.v[c]) * scale);
      }
    }
    for (int64_t c = 0; c < s.channels; ++c) {
      b.sums[r * s.channels + c] += static_cast<float>(sum[c]);
      b.squares[r * s.channels + c] += static_cast<float>(square[c]);
    }
  }
}

void test_shapes(Isa isa) {
  const Shape shapes[] = {{1, 1, 1},   {2, 5, 7},     {1, 129, 16}, {3, 300, 33},
                          {2, 65, 64}, {1, 40, 1536}, {0, 3, 4},    {2, 0, 5}};
  for (const Shape& s : shapes) {
    Buffers got = random_buffers(s), want = got, split = got;
    sidechain::cpu::tap(params(got, s), isa, nullptr);
    sidechain::cpu::tap(params(split, s), isa, backwards);
    plain(want, s);
    const char* name = sidechain::isa_name(isa);
    expect_close(isa, "x", got.x, want.x, 4e-7);
    expect_close(isa, "sums", got.sums, want.sums, 4e-7);
    expect_close(isa, "squares", got.squares, want.squares, 4e-7);
    expect_close(isa, "counts", got.counts, want.counts, 0);
    expect_close(isa, "ring", got.ring, want.ring, 0);
    EXPECT(split.x == got.x && split.sums == got.sums && split.squares == got.squares,
           "%s: result depends on how the work is split", name);
  }
}

// Every half and bfloat16 through the ring into float32, and through x with nothing to change.
void test_conversions(Isa isa) {
  const char* name = sidechain::isa_name(isa);
  for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
    std::vector<uint16_t> x(65536);
    for (int i = 0; i < 65536; ++i) x[i] = static_cast<uint16_t>(i);
    std::vector<float> wide(65536), zero(65536, 0.0f), one = {1.0f};
    sidechain::TapParams p = {};
    p.x = x.data(), p.dtype = dtype;
    p.rows = p.tokens = 1, p.channels = 65536;
    p.ring = {wide.data(), Dtype::kFloat32, 1, 0, 0, 0};
    p.vectors = zero.data(), p.vector_count = p.vector_slots = 1;
    p.strength = one.data();
    sidechain::cpu::tap(p, isa, nullptr);
    for (int i = 0; i < 65536; ++i) {
      const auto h = static_cast<uint16_t>(i);
      const float want = dtype == Dtype::kFloat16 ? half_to_float(h) : bfloat_to_float(h);
      const float back = dtype == Dtype::kFloat16 ? half_to_float(x[i]) : bfloat_to_float(x[i]);
      const bool nan = std::isnan(want);
      EXPECT(nan ? std::isnan(wide[i]) : wide[i] == want, "%s: widening of 0x%04x", name, i);
      // x + 0 is written: -0 may become +0, everything else survives the round trip.
      EXPECT(nan ? std::isnan(back) : back == want, "%s: round trip of 0x%04x", name, i);
    }
  }
}

// float32 to half types: halfway points, overflow and subnormals round to nearest even.
void test_rounding(Isa isa) {
  const float from[] = {1.0f + 0x1p-11f, 1.0f + 0x3p-11f, 65519.9f,    65520.0f,
                        0x1p-25f,        0x1.8p-25f,      0x3p-25f,    -0x1p-14f,
                        1e-30f,          -INFINITY,       0x1.ffcp-15f};
  const uint16_t half[] = {0x3c00, 0x3c02, 0x7bff, 0x7c00, 0x0000, 0x0001,
                           0x0002, 0x8400, 0x0000, 0xfc00, 0x0400};
  const float wide[] = {1.0f + 0x1p-8f, 1.0f + 0x3p-8f, -3.0f, 0x1.ffp127f, INFINITY};
  const uint16_t bfloat[] = {0x3f80, 0x3f82, 0xc040, 0x7f80, 0x7f80};
  const auto expect = [&](const float* x, const uint16_t* want, int n, Dtype dtype) {
    std::vector<float> copy(x, x + n);
    std::vector<uint16_t> ring(n);
    sidechain::TapParams p = {};
    p.x = copy.data(), p.dtype = Dtype::kFloat32;
    p.rows = p.tokens = 1, p.channels = n;
    p.ring = {ring.data(), dtype, 1, 0, 0, 0};
    sidechain::cpu::tap(p, isa, nullptr);
    for (int i = 0; i < n; ++i) {
      EXPECT(ring[i] == want[i], "%s: rounding of %a: expected 0x%04x, got 0x%04x",
             sidechain::isa_name(isa), static_cast<double>(x[i]), want[i], ring[i]);
    }
  };
  expect(from, half, 11, Dtype::kFloat16);
  expect(wide, bfloat, 5, Dtype::kBFloat16);
}

}  // namespace

int main() {
  return on_every_isa([](Isa isa) {
    test_shapes(isa);
    test_conversions(isa);
    test_rounding(isa);
  });
}
