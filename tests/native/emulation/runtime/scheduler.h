// SPDX-License-Identifier: Apache-2.0
// One block at a time: its fibers, who waits for what, who runs next.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "copies.h"
#include "emulation/runtime.h"
#include "fiber.h"
#include "image.h"
#include "limits.h"

namespace emulation {

constexpr int kWarp = 32;

enum class State { kReady, kAtBarrier, kInCollective, kExited };

// The call a lane waits in.
struct Call {
  Collective kind;
  unsigned mask;
  uint64_t value;
  int argument, width;
  Site site;
};

struct Fiber {
  int index;  // linear, within the block
  uint3 thread;
  State state;
  Call call;        // while kInCollective
  uint64_t result;  // of the collective
  Context context;
};

class Scheduler {
 public:
  cudaError_t run(const Launch& launch, void (*body)(void*), void* context);
  uint64_t collective(const Call& call);
  Votes barrier(bool predicate, Site site);
  bool in_shared_memory(const void* address, size_t bytes) const;
  [[noreturn]] void fail(const std::string& message);

  const Fiber* current() const { return current_; }
  bool on_stack(const void* address) const { return stacks_.contains(address); }

  void seed(uint64_t seed) { random_ = seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du; }
  std::string report() const;
  // While dry, launches are checked and noted, one line each, and no kernel runs.
  void dry(bool dry) { dry_ = dry, noted_.clear(); }
  const std::string& noted() const { return noted_; }
  std::string failure;
  Limits limits;
  Copies copies;

 private:
  struct Tally {
    int64_t launches, blocks, threads;
  };

  static void entry();
  void run_block(const Launch& launch, unsigned block);
  unsigned draw(unsigned n);         // uniform in [0, n)
  unsigned draw_bit(unsigned bits);  // one of those that are set
  void leave(bool last);             // continues a ready fiber, or the scheduler when there is none
  void exit_thread();
  void ready(int thread);
  void take_next();  // makes a ready fiber, drawn at random, the current one
  const Fiber* waiting_for(const Fiber& me) const;  // a lane whose collective names `me`
  void complete(int warp, unsigned mask);
  std::string name(int thread) const;
  static std::string text(const Call& call);

  Stacks stacks_;
  std::vector<Fiber> fibers_ = std::vector<Fiber>(kMaxThreads);
  unsigned ready_warps_ = 0, ready_lanes_[kMaxThreads / kWarp] = {};
  Context scheduler_;
  Fiber* current_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  const KernelSymbols* kernel_ = nullptr;
  SharedArray dynamic_shared_ = {};
  int threads_ = 0, exited_ = 0, at_barrier_ = 0, votes_ = 0;
  Votes last_votes_ = {};
  Site barrier_site_ = {};
  bool failed_ = false, dry_ = false;
  uint64_t random_ = 1;
  std::map<std::string, Tally> tallies_;
  std::string noted_;
};

// For the order checker: the fiber that runs, or nullptr outside of kernels.
const Fiber* running();
bool on_fiber_stack(const void* address);
bool in_shared_memory(const void* address, size_t bytes);

}  // namespace emulation
