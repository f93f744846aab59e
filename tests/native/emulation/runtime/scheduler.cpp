// SPDX-License-Identifier: Apache-2.0
#include "scheduler.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <numeric>

#include "order.h"

#if defined(EMULATION_ADDRESS)
#include <sanitizer/asan_interface.h>
#endif

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kSharedBytes = 227 * 1024;  // the most a block can have: sm_90

alignas(128) unsigned char dynamic_memory[kSharedBytes];

Scheduler& scheduler() {
  static Scheduler* one = new Scheduler;
  return *one;
}

// What a launch did not ask for may not be touched.
void open_dynamic_memory([[maybe_unused]] size_t bytes) {
#if defined(EMULATION_ADDRESS)
  __asan_unpoison_memory_region(dynamic_memory, kSharedBytes);
  __asan_poison_memory_region(dynamic_memory + bytes, kSharedBytes - bytes);
#endif
}

}  // namespace

// ---- one launch ----

bool Scheduler::in_shared_memory(const void* address, size_t bytes) const {
  if (dynamic_shared_.holds(address, bytes)) return true;
  for (const SharedArray& array : kernel_->shared) {
    if (array.holds(address, bytes)) return true;
  }
  return false;
}

cudaError_t Scheduler::run(const Launch& launch, void (*body)(void*), void* context) {
  static std::mutex one_at_a_time;  // shared memory is the process's
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  kernel_ = &kernel_symbols(launch.kernel);
  failure = limits.refusal(launch, *kernel_);
  if (!failure.empty()) {
    failure = kernel_->name + ": " + failure;
    return cudaErrorInvalidConfiguration;
  }
  if (dry_) {
    const dim3 &grid = launch.grid, &block = launch.block;
    noted_ += std::to_string(uint64_t{grid.x} * grid.y * grid.z) + " " +
              std::to_string(uint64_t{block.x} * block.y * block.z) + " " +
              std::to_string(launch.shared_bytes) + " " + kernel_->name + "\n";
    return cudaSuccess;
  }

  body_ = body;
  context_ = context;
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  threads_ = static_cast<int>(block.x * block.y * block.z);
  failed_ = false;
  Tally& tally = tallies_[kernel_->name];
  ++tally.launches;
  dynamic_shared_ = {reinterpret_cast<char*>(dynamic_memory), launch.shared_bytes};
  open_dynamic_memory(launch.shared_bytes);
  if (order::kActive) order::begin_launch(kernel_->shared);
  std::vector<unsigned> sequence(blocks);
  std::iota(sequence.begin(), sequence.end(), 0u);
  for (size_t i = blocks; i > 1 && !failed_; --i) {
    std::swap(sequence[i - 1], sequence[draw(static_cast<unsigned>(i))]);
  }
  for (size_t i = 0; i < blocks && !failed_; ++i) {
    std::memset(dynamic_memory, 0xff, launch.shared_bytes);  // NaNs
    for (const SharedArray& array : kernel_->shared) std::memset(array.begin, 0xff, array.size);
    copies.begin_block();
    if (order::kActive) order::begin_block(dynamic_memory, launch.shared_bytes);
    run_block(launch, sequence[i]);
    ++tally.blocks;
    tally.threads += threads_;
  }
  current_ = nullptr;
  if (!failed_) return cudaSuccess;
  stacks_.unpoison();
  return cudaErrorLaunchFailure;
}

void Scheduler::run_block(const Launch& launch, unsigned block) {
  const dim3 &grid = launch.grid, &size = launch.block;
  exited_ = at_barrier_ = votes_ = 0;
  ready_warps_ = 0;
  std::memset(ready_lanes_, 0, sizeof ready_lanes_);
  current_ = nullptr;
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[i];
    const unsigned t = static_cast<unsigned>(i);
    fiber.index = i;
    fiber.thread = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    prepare(fiber.context, stacks_.at(i), &Scheduler::entry);
    ready(i);
  }
  blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
  blockDim = size, gridDim = grid;
  take_next();
  scheduler_.stack = {};
  switch_context(scheduler_, current_->context, false);
}

void Scheduler::entry() {
  Scheduler& s = scheduler();
  arrive(s.current_->context);
  s.body_(s.context_);
  s.exit_thread();
}

unsigned Scheduler::draw(unsigned n) {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return static_cast<unsigned>((random_ >> 32) * n >> 32);
}

void Scheduler::ready(int thread) {
  fibers_[thread].state = State::kReady;
  ready_lanes_[thread / kWarp] |= 1u << thread % kWarp;
  ready_warps_ |= 1u << thread / kWarp;
}

unsigned Scheduler::draw_bit(unsigned bits) {
  for (unsigned skip = draw(static_cast<unsigned>(__builtin_popcount(bits))); skip > 0; --skip) {
    bits &= bits - 1;
  }
  return static_cast<unsigned>(__builtin_ctz(bits));
}

// Mostly the warp goes on that ran before: its stacks are in the cache. Often enough to mix all
// orders another one is drawn.
void Scheduler::take_next() {
  unsigned warp = current_ != nullptr ? static_cast<unsigned>(current_->index / kWarp) : 0;
  if (!(ready_warps_ >> warp & 1u) || draw(16) == 0) warp = draw_bit(ready_warps_);
  const unsigned lane = draw_bit(ready_lanes_[warp]);
  ready_lanes_[warp] &= ~(1u << lane);
  if (ready_lanes_[warp] == 0) ready_warps_ &= ~(1u << warp);
  current_ = &fibers_[warp * kWarp + lane];
  threadIdx = current_->thread;
}

void Scheduler::leave(bool last) {
  Fiber* const from = current_;
  if (ready_warps_ == 0) {
    if (exited_ != threads_ && !failed_) failure = "emulation: no thread can go on";
    failed_ = failed_ || exited_ != threads_;
    switch_context(from->context, scheduler_, last);
    return;
  }
  take_next();
  if (current_ != from) switch_context(from->context, current_->context, last);
}

const Fiber* Scheduler::waiting_for(const Fiber& me) const {
  const int lane = me.index % kWarp, first = me.index - lane;
  for (int i = first; i < first + kWarp && i < threads_; ++i) {
    const Fiber& other = fibers_[i];
    if (other.state == State::kInCollective && (other.call.mask >> lane & 1u)) return &other;
  }
  return nullptr;
}

void Scheduler::exit_thread() {
  Fiber& me = *current_;
  if (at_barrier_ > 0)
    fail("exits while " + std::to_string(at_barrier_) +
         " threads of the block wait at __syncthreads");
  if (const Fiber* other = waiting_for(me)) {
    fail("exits while " + name(other->index) + " waits for it in " + text(other->call));
  }
  const std::string copy = copies.pending(me.index);
  if (!copy.empty()) fail("exits while its asynchronous copy issued at " + copy + " is pending");
  me.state = State::kExited;
  ++exited_;
  leave(true);
  __builtin_unreachable();
}

void Scheduler::fail(const std::string& message) {
  failure = kernel_->name + ": " + name(current_->index) + " " + message;
  failed_ = true;
  switch_context(current_->context, scheduler_, true);
  __builtin_unreachable();
}

// ---- barriers ----

Votes Scheduler::barrier(bool predicate, Site site) {
  Fiber& me = *current_;
  const auto refuse = [&](const std::string& why) {
    fail(std::string("waits at __syncthreads at ") + site.file + ":" + std::to_string(site.line) +
         " " + why);
  };
  if (exited_ > 0) refuse("after " + std::to_string(exited_) + " threads of the block exited");
  if (at_barrier_ == 0) barrier_site_ = site;
  if (!(site == barrier_site_)) {
    refuse("while others wait at line " + std::to_string(barrier_site_.line));
  }
  if (const Fiber* other = waiting_for(me)) {
    refuse("while " + name(other->index) + " waits for it in " + text(other->call));
  }
  me.state = State::kAtBarrier;
  ++at_barrier_;
  votes_ += predicate ? 1 : 0;
  if (at_barrier_ == threads_) {
    last_votes_ = {votes_, threads_};
    at_barrier_ = votes_ = 0;
    if (order::kActive) order::barrier();
    for (int i = 0; i < threads_; ++i) ready(i);
  }
  leave(false);
  return last_votes_;
}

// ---- warp collectives ----

uint64_t Scheduler::collective(const Call& call) {
  Fiber& me = *current_;
  const int warp = me.index / kWarp, lane = me.index % kWarp;
  if (!(call.mask >> lane & 1u)) fail("calls " + text(call) + ", whose mask leaves it out");
  me.call = call;
  me.state = State::kInCollective;
  for (int i = 0; i < kWarp; ++i) {
    if (!(call.mask >> i & 1u)) continue;
    const int thread = warp * kWarp + i;
    if (thread >= threads_) fail("calls " + text(call) + ", which names lanes that do not exist");
    const Fiber& other = fibers_[thread];
    if (other.state == State::kReady) continue;
    if (other.state == State::kExited) {
      fail("calls " + text(call) + ", which names " + name(thread) + ", which has exited");
    }
    if (other.state == State::kAtBarrier) {
      fail("calls " + text(call) + ", which names " + name(thread) +
           ", which waits at __syncthreads");
    }
    const bool same = other.call.kind == call.kind && other.call.mask == call.mask &&
                      other.call.width == call.width && other.call.site == call.site;
    if (!same) {
      fail("calls " + text(call) + " while " + name(thread) + " waits for it in " +
           text(other.call) + ": the warp has diverged");
    }
  }
  for (int i = 0; i < kWarp; ++i) {
    if ((call.mask >> i & 1u) && fibers_[warp * kWarp + i].state != State::kInCollective) {
      leave(false);
      return me.result;
    }
  }
  complete(warp, call.mask);
  return me.result;
}

namespace {

// The lane a shuffle reads; its own where the segment ends.
int source_lane(const Call& call, int lane) {
  const int first = lane / call.width * call.width;
  switch (call.kind) {
    case Collective::kShuffle:
      return first + (call.argument & (call.width - 1));
    case Collective::kShuffleUp:
      return lane - call.argument >= first ? lane - call.argument : lane;
    case Collective::kShuffleDown:
      return lane + call.argument < first + call.width ? lane + call.argument : lane;
    default: {
      const int from = lane ^ call.argument;
      return from < first + call.width ? from : lane;
    }
  }
}

uint64_t fold(Collective kind, uint64_t a, uint64_t b) {
  const auto x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
  const auto sx = static_cast<int32_t>(x), sy = static_cast<int32_t>(y);
  switch (kind) {
    case Collective::kReduceAdd:
      return x + y;
    case Collective::kReduceMin:
      return x < y ? x : y;
    case Collective::kReduceMax:
      return x < y ? y : x;
    case Collective::kReduceMinSigned:
      return sx < sy ? x : y;
    case Collective::kReduceMaxSigned:
      return sx < sy ? y : x;
    case Collective::kReduceAnd:
      return x & y;
    case Collective::kReduceOr:
      return x | y;
    default:
      return x ^ y;
  }
}

bool is_shuffle(Collective kind) {
  return kind == Collective::kShuffle || kind == Collective::kShuffleUp ||
         kind == Collective::kShuffleDown || kind == Collective::kShuffleXor;
}

}  // namespace

// Gives every lane of the mask its result and makes the others ready.
void Scheduler::complete(int warp, unsigned mask) {
  Fiber* const lanes = &fibers_[warp * kWarp];
  const Call& mine = current_->call;
  if (mine.kind == Collective::kSync && order::kActive && mask == 0xffffffffu) {
    order::sync_warp(warp);
  }
  unsigned ballot = 0;
  uint64_t total = 0;
  bool first = true, equal = true;
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1u)) continue;
    const uint64_t value = lanes[i].call.value;
    ballot |= value == 1 ? 1u << i : 0u;
    equal = equal && value == mine.value;
    total = first ? value : fold(mine.kind, total, value);
    first = false;
  }
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1u)) continue;
    Fiber& lane = lanes[i];
    switch (mine.kind) {
      case Collective::kSync:
        break;
      case Collective::kBallot:
        lane.result = ballot;
        break;
      case Collective::kAny:
        lane.result = ballot != 0;
        break;
      case Collective::kAll:
        lane.result = ballot == mask;
        break;
      case Collective::kMatchAll:
        lane.result = equal ? mask : 0;
        break;
      case Collective::kMatchAny:
        lane.result = 0;
        for (int k = 0; k < kWarp; ++k) {
          if ((mask >> k & 1u) && lanes[k].call.value == lane.call.value) lane.result |= 1u << k;
        }
        break;
      default:
        lane.result = total;
    }
    if (is_shuffle(mine.kind)) {
      const int from = source_lane(lane.call, i);
      if (!(mask >> from & 1u)) {
        fail("meets " + text(mine) + ", where lane " + std::to_string(i) + " reads lane " +
             std::to_string(from) + ", which the mask leaves out");
      }
      lane.result = lanes[from].call.value;
    }
  }
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1u) && &lanes[i] != current_) ready(warp * kWarp + i);
  }
  current_->state = State::kReady;
}

// ---- words ----

std::string Scheduler::name(int thread) const {
  char text[96];
  std::snprintf(text, sizeof text, "thread %d (warp %d, lane %d) of block %u", thread,
                thread / kWarp, thread % kWarp, blockIdx.x);
  return text;
}

std::string Scheduler::text(const Call& call) {
  static const char* const kNames[] = {
      "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",
      "__shfl_xor_sync",   "__ballot_sync",     "__any_sync",        "__all_sync",
      "__match_any_sync",  "__match_all_sync",  "__reduce_add_sync", "__reduce_min_sync",
      "__reduce_max_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync",
      "__reduce_or_sync",  "__reduce_xor_sync"};
  char text[256];
  std::snprintf(text, sizeof text, "%s(0x%08x) at %s:%d", kNames[static_cast<int>(call.kind)],
                call.mask, call.site.file, call.site.line);
  return text;
}

std::string Scheduler::report() const {
  Tally all = {};
  std::string lines;
  for (const auto& [name, tally] : tallies_) {
    all.launches += tally.launches;
    all.blocks += tally.blocks;
    all.threads += tally.threads;
    lines += "\n" + std::to_string(tally.launches) + " " + name;
  }
  return std::to_string(tallies_.size()) + " " + std::to_string(all.launches) + " " +
         std::to_string(all.blocks) + " " + std::to_string(all.threads) + lines;
}

// ---- the interface of the headers ----

uint64_t collective(Collective kind, unsigned mask, uint64_t value, int argument, int width,
                    Site site) {
  return scheduler().collective({kind, mask, value, argument, width, site});
}

Votes barrier(bool predicate, Site site) { return scheduler().barrier(predicate, site); }

void* dynamic_shared_memory() { return dynamic_memory; }

void note_atomic(const void* address, size_t size) {
  if (order::kActive) order::atomic(address, size);
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  scheduler().fail(text);
}

cudaError_t run(const Launch& launch, void (*body)(void*), void* context) {
  return scheduler().run(launch, body, context);
}

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  const std::string why = scheduler().limits.ask_shared(kernel, bytes);
  if (why.empty()) return cudaSuccess;
  scheduler().failure = kernel_symbols(kernel).name + ": " + why;
  return cudaErrorInvalidValue;
}

void copy_async(void* dst, const void* src, size_t size, size_t zfill, Site site) {
  scheduler().copies.issue(running()->index, dst, src, size, zfill, site);
}
void commit_copies() { scheduler().copies.commit(running()->index); }
void wait_copies(size_t prior, Site site) {
  scheduler().copies.wait(running()->index, prior, site);
}

const char* last_failure() { return scheduler().failure.c_str(); }

const Fiber* running() { return scheduler().current(); }
bool on_fiber_stack(const void* address) { return scheduler().on_stack(address); }
bool in_shared_memory(const void* address, size_t bytes) {
  return scheduler().in_shared_memory(address, bytes);
}

}  // namespace emulation

extern "C" {
__attribute__((visibility("default"))) void emulation_seed(uint64_t seed) {
  emulation::scheduler().seed(seed);
}
__attribute__((visibility("default"))) void emulation_capability(int capability) {
  emulation::scheduler().limits.set_capability(capability);
}
__attribute__((visibility("default"))) const char* emulation_report() {
  static std::string text;
  text = emulation::scheduler().report();
  return text.c_str();
}
__attribute__((visibility("default"))) void emulation_dry(int dry) {
  emulation::scheduler().dry(dry != 0);
}
__attribute__((visibility("default"))) const char* emulation_launches() {
  return emulation::scheduler().noted().c_str();
}
}
