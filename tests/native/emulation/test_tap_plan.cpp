// SPDX-License-Identifier: Apache-2.0
// How tap_ cuts its work: what its kernels take for granted, at every shape, and the number of
// blocks at shapes that are timed. Results do not show a plan that is only slow.
#include <cstdint>
#include <cstdio>

#include "cuda/tap.cuh"

namespace {

using sidechain::Dtype;
using sidechain::TapParams;
using namespace sidechain::cuda;

int failures = 0;

#define EXPECT(CONDITION)                                                                      \
  do {                                                                                         \
    if (!(CONDITION)) {                                                                        \
      ++failures;                                                                              \
      std::printf("%s:%d: failed: %s at [%lld, %lld, %lld]\n", __FILE__, __LINE__, #CONDITION, \
                  static_cast<long long>(p.rows), static_cast<long long>(p.tokens),            \
                  static_cast<long long>(p.channels));                                         \
    }                                                                                          \
  } while (0)

alignas(16) unsigned char memory[32];
float capture[1];

TapParams call(Dtype dtype, int64_t rows, int64_t tokens, int64_t channels, bool sums) {
  TapParams p = {};
  p.x = memory;
  p.dtype = dtype;
  p.rows = rows, p.tokens = tokens, p.channels = channels;
  p.x_row = tokens * channels, p.x_token = channels;
  if (sums) p.sums = {capture, 1, 0, 0};
  return p;
}

void test_limits(const TapParams& p) {
  const TapPlan plan = tap_plan(p);
  const int64_t width = plan.packed ? 16 / size_of(p.dtype) : 1;
  EXPECT(plan.chunks * plan.chunk_tokens() >= p.tokens);
  EXPECT((plan.chunks - 1) * plan.chunk_tokens() < p.tokens);
  EXPECT(plan.tokens % kTapGroup == 0 && plan.tokens >= kTapGroup && plan.tokens <= 32);
  EXPECT(plan.team_threads % 32 == 0 && plan.team_threads >= 32);
  EXPECT(plan.threads() <= (plan.held ? kTapThreads : kTapWideThreads));
  EXPECT(plan.held || plan.teams == 1);
  EXPECT(!plan.held || plan.team_threads * width >= p.channels);
  EXPECT(!plan.packed || p.channels % width == 0);
  EXPECT(!plan.direct || plan.chunks == 1);
  const int64_t shared = plan.teams > 1 ? plan.teams * 2 * p.channels * 4 : 0;
  EXPECT(shared + 2 * kTapScratch * 4 <= 48 * 1024);
  const bool partial = p.sums.data != nullptr && !plan.direct;
  EXPECT(tap_workspace_floats(p) == (partial ? p.rows * plan.chunks * 2 * p.channels : 0));
}

void test_packs() {
  TapParams p = call(Dtype::kBFloat16, 2, 3, 64, true);
  EXPECT(tap_plan(p).packed);
  p.x = memory + 2;
  EXPECT(!tap_plan(p).packed);
  p.x = memory, p.x_token = 68;
  EXPECT(!tap_plan(p).packed);
  p.x_token = 64, p.x_row = 204;
  EXPECT(!tap_plan(p).packed);
  p.x_row = 208, p.channels = 60;
  EXPECT(!tap_plan(p).packed);
}

struct Timed {
  Dtype dtype;
  int64_t rows, tokens, channels, blocks, threads;
};
// On 132 multiprocessors: one wave of two blocks each; one of 162 of 264; a row a block.
constexpr Timed kTimed[] = {
    {Dtype::kBFloat16, 8, 1025, 1536, 264, 384}, {Dtype::kFloat32, 8, 1025, 1536, 264, 384},
    {Dtype::kBFloat16, 2, 323, 2560, 162, 320},  {Dtype::kBFloat16, 2, 65, 160, 2, 512},
    {Dtype::kBFloat16, 16, 65, 160, 16, 512},
};

}  // namespace

int main() {
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
    for (int64_t rows : {1, 2, 16, 300}) {
      for (int64_t tokens :
           {1, 4, 5, 8, 9, 37, 65, 77, 128, 129, 600, 1025, 4096, 60000, 1 << 30}) {
        for (int64_t channels = 1; channels <= 6400; channels += channels < 80 ? 1 : 40) {
          test_limits(call(dtype, rows, tokens, channels, true));
        }
        test_limits(call(dtype, rows, tokens, 320, false));
        // Beyond 32 bits one way or the other; both at once would have no memory.
        if (tokens < 1000) test_limits(call(dtype, rows, tokens, int64_t{1} << 33, true));
      }
    }
  }
  test_packs();
  for (const Timed& t : kTimed) {
    const TapParams p = call(t.dtype, t.rows, t.tokens, t.channels, true);
    const TapPlan plan = tap_plan(p);
    EXPECT(p.rows * plan.chunks == t.blocks);
    EXPECT(plan.threads() == t.threads);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
