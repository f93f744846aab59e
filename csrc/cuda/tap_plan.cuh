// SPDX-License-Identifier: Apache-2.0
// How tap_ cuts its work: a pure function of the shapes and the alignment of a call.
#pragma once

#include <cstdint>

#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "sidechain/tap.h"

namespace sidechain::cuda {

constexpr int kTapGroup = 4;          // tokens whose loads a thread has in flight together
constexpr int kTapTokens = 32;        // of a team at most: flags are the bits of a word
constexpr int kTapThreads = 768;      // of a block: 80 registers each, below that a kernel spills
constexpr int kTapTeamThreads = 512;  // of a block of several teams
constexpr int kTapTeams = 16;
constexpr int kTapWideThreads = 512;  // of a block whose threads loop over channels
// One block a row where a team gets no more tokens than this: the time of a second launch.
constexpr int kTapDirectTokens = 8;
// What the plan is made for: an H100. Any GPU computes the same with it.
constexpr int64_t kTapProcessors = 132;
constexpr int64_t kTapResident = 768;  // threads of a multiprocessor, by their registers
constexpr int64_t kTapStart = 8;       // time of a block beside its tokens, in tokens

struct TapPlan {
  bool packed;       // threads own packs of 16 bytes, else single channels
  bool held;         // a thread owns one pack and keeps it between the passes
  int team_threads;  // a whole number of warps
  int teams;         // of a block
  int tokens;        // of a team, consecutive ones
  int64_t chunks;    // blocks of a row
  bool direct;       // one block holds a row: it adds to the capture buffers itself

  int64_t chunk_tokens() const { return static_cast<int64_t>(teams) * tokens; }
  int64_t threads() const { return static_cast<int64_t>(teams) * team_threads; }
};

inline int64_t tap_ceil(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Teams and tokens of a team: few blocks leave few partial sums, but all multiprocessors should
// have work to the end.
inline void tap_cut(const TapParams& p, TapPlan& plan) {
  while (plan.teams > 1 &&
         p.rows * tap_ceil(p.tokens, plan.teams * int64_t{kTapGroup}) < kTapProcessors) {
    plan.teams = (plan.teams + 1) / 2;
  }
  const int64_t per_processor =
      kTapResident / plan.threads() > 1 ? kTapResident / plan.threads() : 1;
  int64_t least = INT64_MAX;
  for (int tokens = kTapGroup; tokens <= kTapTokens; tokens += kTapGroup) {
    const int64_t blocks = p.rows * tap_ceil(p.tokens, int64_t{plan.teams} * tokens);
    const int64_t cost = tap_ceil(blocks, kTapProcessors * per_processor) * (tokens + kTapStart);
    if (cost > least) continue;
    least = cost;
    plan.tokens = tokens;
  }
}

inline TapPlan tap_plan(const TapParams& p) {
  TapPlan plan = {};
  if (p.rows == 0 || p.tokens == 0) return plan;  // no chunks
  const int64_t size = size_of(p.dtype);
  const int64_t width = 16 / size;
  plan.packed = p.channels % width == 0 && packs(p.x, p.x_row, size, width) &&
                packs(p.x, p.x_token, size, width);
  const int64_t count = plan.packed ? p.channels / width : p.channels;
  plan.held = plan.packed && count <= kTapThreads;
  plan.team_threads =
      static_cast<int>(threads_for(count, 32, plan.held ? kTapThreads : kTapWideThreads));
  plan.teams = 1;
  if (plan.held) {
    int64_t most = kTapTeamThreads / plan.team_threads;
    most = most < kTapTeams ? most : kTapTeams;
    const int64_t groups = tap_ceil(p.tokens, kTapGroup);
    most = most < groups ? most : groups;
    plan.teams = most > 1 ? static_cast<int>(most) : 1;
  }
  const bool sums = p.sums.data != nullptr || p.squares.data != nullptr || p.counts.data != nullptr;
  plan.direct = plan.held && sums && p.tokens <= plan.teams * kTapDirectTokens;
  if (plan.direct) {
    plan.tokens = static_cast<int>(tap_ceil(p.tokens, plan.teams * kTapGroup)) * kTapGroup;
  } else {
    tap_cut(p, plan);
  }
  plan.chunks = tap_ceil(p.tokens, plan.chunk_tokens());
  return plan;
}

}  // namespace sidechain::cuda
