// SPDX-License-Identifier: Apache-2.0
// The order checker behind the instrumentation of -fsanitize=thread: this file takes the place of
// libtsan, is itself not instrumented, and sees every load and store of the instrumented kernels.
#include "order.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace emulation::order {
namespace {

// Accesses to two aligned bytes. An epoch is one stretch between barriers of one block and numbers
// are never reused, so that what an older launch left is recognised as old.
struct Cell {
  uint32_t write_epoch, read_epoch;
  uint32_t foreign_read;           // launch in which a block before this one read here
  uint16_t writer, reader;         // threads; reader = kMany after reads by several
  uint16_t write_turn, read_turn;  // how often the warp had met at __syncwarp
  uint8_t read_warp;               // kSeveral after reads by several warps
  uint8_t written, read;           // bytes of the last epochs
  uint8_t initialised;             // bytes written since the block began: shared memory
  uint8_t pending;                 // bytes that an asynchronous copy of `writer` still writes
  bool atomic_write, atomic_read;
  bool copied;  // the last write is the arrival of an asynchronous copy
};
constexpr uint16_t kMany = 0xffff;
constexpr uint8_t kSeveral = 0xff;

constexpr uintptr_t kPage = 4096, kGrain = 2;
struct Page {
  Cell cells[kPage / kGrain];
};
constexpr size_t kPages = 16384;  // forgotten between launches when there are more

struct Range {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t at) const { return begin <= at && at < end; }
};

struct Checker {
  uint32_t epoch = 1, launch = 0, launch_epoch = 1, block_epoch = 1;
  uint16_t turns[kMaxThreads / kWarp] = {};
  Range dynamic_shared;
  std::vector<Range> static_shared;  // of the kernel
  std::vector<Range> statics;        // all writable data of this image
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  } recent[1024];

  Page& page(uintptr_t number) {
    Recent& known = recent[number % 1024];
    if (known.number != number || known.page == nullptr) {
      std::unique_ptr<Page>& found = pages[number];
      if (!found) found.reset(new Page());
      known = {number, found.get()};
    }
    return *known.page;
  }

  bool is_shared(uintptr_t at) const {
    if (dynamic_shared.holds(at)) return true;
    return holds(static_shared, at);
  }

  static bool holds(const std::vector<Range>& ranges, uintptr_t at) {
    for (const Range& range : ranges) {
      if (range.holds(at)) return true;
    }
    return false;
  }
};

Checker& checker() {
  static Checker* one = new Checker;
  return *one;
}

// The writable segments of the image that holds this code, less what is read-only after loading.
int find_statics(dl_phdr_info* info, size_t, void* statics) {
  const auto here = reinterpret_cast<uintptr_t>(&find_statics);
  const auto range = [&](const ElfW(Phdr) & header) {
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    return Range{begin, begin + header.p_memsz};
  };
  bool mine = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    mine = mine || (info->dlpi_phdr[i].p_type == PT_LOAD && range(info->dlpi_phdr[i]).holds(here));
  }
  if (!mine) return 0;
  Range relocated;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type == PT_GNU_RELRO) relocated = range(info->dlpi_phdr[i]);
  }
  auto& found = *static_cast<std::vector<Range>*>(statics);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD || !(header.p_flags & PF_W)) continue;
    Range data = range(header);
    if (relocated.holds(data.begin)) data.begin = relocated.end;
    found.push_back(data);
  }
  return 1;
}

enum class Access { kRead, kWrite, kAtomic, kBeginCopy, kEndCopy };

std::string describe(uintptr_t at, const void* code) {
  Dl_info info;
  char text[320] = "";
  if (dladdr(code, &info) != 0) {
    std::snprintf(text, sizeof text, " (%s memory %#lx; addr2line -Cfie %s %#lx)",
                  checker().is_shared(at) ? "shared" : "global", static_cast<unsigned long>(at),
                  info.dli_fname,
                  static_cast<unsigned long>(static_cast<const char*>(code) -
                                             static_cast<const char*>(info.dli_fbase)));
  }
  return text;
}

[[noreturn]] void report(const std::string& what, uintptr_t at, const void* code) {
  fail("%s%s", what.c_str(), describe(at, code).c_str());
}

// Whether the write or read recorded in the cell is ordered before an access of `me` now.
bool write_is_ordered(const Checker& c, const Cell& cell, const Fiber& me) {
  const int thread = me.index;
  if (cell.write_epoch < c.launch_epoch) return true;
  if (cell.write_epoch < c.block_epoch) return false;
  if (cell.write_epoch != c.epoch || (cell.writer == thread && !cell.copied)) return true;
  return cell.writer / kWarp == thread / kWarp && cell.write_turn < c.turns[thread / kWarp];
}

bool read_is_ordered(const Checker& c, const Cell& cell, const Fiber& me) {
  const int thread = me.index;
  if (cell.foreign_read == c.launch) return false;
  if (cell.read_epoch < c.launch_epoch) return true;
  if (cell.read_epoch < c.block_epoch) return false;
  if (cell.read_epoch != c.epoch || cell.reader == thread) return true;
  return cell.read_warp == thread / kWarp && cell.read_turn < c.turns[thread / kWarp];
}

void note_read(const Checker& c, Cell& cell, const Fiber& me, uint8_t bytes, bool shared,
               bool atomic) {
  const auto thread = static_cast<uint16_t>(me.index);
  const auto warp = static_cast<uint8_t>(thread / kWarp);
  if (!shared && cell.read_epoch >= c.launch_epoch && cell.read_epoch < c.block_epoch) {
    cell.foreign_read = c.launch;
  }
  // Of neighbours smaller than a cell the last one is kept. Reads of this warp that a __syncwarp
  // has ordered before this one are before all that comes after it.
  const bool ordered = cell.read_warp == warp && cell.read_turn < c.turns[warp];
  if (cell.read_epoch != c.epoch || !(cell.read & bytes) || ordered) {
    cell.reader = thread, cell.read_warp = warp, cell.read = bytes, cell.atomic_read = atomic;
  } else {
    if (cell.reader != thread) cell.reader = kMany;
    if (cell.read_warp != warp) cell.read_warp = kSeveral;
    cell.read |= bytes;
    cell.atomic_read = cell.atomic_read && atomic;
  }
  cell.read_epoch = c.epoch;
  cell.read_turn = c.turns[warp];
}

void note_write(const Checker& c, Cell& cell, const Fiber& me, uint8_t bytes, bool atomic) {
  const auto thread = static_cast<uint16_t>(me.index);
  if (cell.write_epoch < c.block_epoch) cell.initialised = 0;
  cell.initialised |= bytes;
  const bool same = cell.write_epoch == c.epoch && cell.writer == thread;
  cell.written = same ? cell.written | bytes : bytes;
  cell.write_epoch = c.epoch, cell.writer = thread, cell.atomic_write = atomic;
  cell.copied = false, cell.pending = 0;
  cell.write_turn = c.turns[thread / kWarp];
}

void check_cell(Checker& c, Cell& cell, const Fiber& me, uintptr_t at, uint8_t bytes, bool shared,
                Access access, const void* code) {
  const bool atomic = access == Access::kAtomic;
  const bool reads = access == Access::kRead || atomic;
  if (access == Access::kEndCopy) {  // nobody has touched it since the copy began
    note_write(c, cell, me, bytes, false);
    cell.copied = true;
    return;
  }
  if (shared && cell.write_epoch >= c.block_epoch && (cell.pending & bytes)) {
    report(std::string(access == Access::kRead ? "reads" : "writes") +
               " what an asynchronous copy of thread " + std::to_string(cell.writer) +
               " still writes: it has not been waited for",
           at, code);
  }
  if (shared && reads) {
    const uint8_t known = cell.write_epoch >= c.block_epoch ? cell.initialised : 0;
    if (bytes & ~known) report("reads shared memory that no thread wrote", at, code);
  }
  // Shared memory that the block before left in a cell is no conflict.
  const bool fresh_write = !shared || cell.write_epoch >= c.block_epoch;
  // The compiler leaves the copies and waits of a thread in order.
  const bool own_copy = access == Access::kBeginCopy && cell.writer == me.index;
  if (fresh_write && !own_copy && (cell.written & bytes) && !(atomic && cell.atomic_write) &&
      !write_is_ordered(c, cell, me)) {
    const char* how = access == Access::kRead ? "reads" : "writes";
    if (cell.copied && cell.writer == me.index) {
      report(std::string(how) + " what its own asynchronous copy wrote, with no barrier behind " +
                 "the wait: race with the compiler",
             at, code);
    }
    report(std::string(how) + " what " +
               (cell.write_epoch < c.block_epoch ? std::string("another block of the launch")
                                                 : "thread " + std::to_string(cell.writer)) +
               " writes, with no barrier between: race",
           at, code);
  }
  const bool fresh_read = !shared || cell.read_epoch >= c.block_epoch;
  if (access != Access::kRead && fresh_read && (cell.read & bytes) &&
      !(atomic && cell.atomic_read) && !read_is_ordered(c, cell, me)) {
    report(std::string("writes what ") +
               (cell.read_epoch < c.block_epoch || cell.foreign_read == c.launch
                    ? std::string("another block of the launch")
                : cell.reader == kMany ? std::string("other threads")
                                       : "thread " + std::to_string(cell.reader)) +
               " read, with no barrier between: race",
           at, code);
  }
  if (reads) note_read(c, cell, me, bytes, shared, atomic);
  if (access != Access::kRead) note_write(c, cell, me, bytes, atomic);
  if (access == Access::kBeginCopy) cell.pending = bytes;
}

void check(const void* address, size_t size, Access access, const void* code) {
  const Fiber* me = running();
  if (me == nullptr || on_fiber_stack(address)) return;
  Checker& c = checker();
  auto at = reinterpret_cast<uintptr_t>(address);
  const bool shared = c.is_shared(at);
  if (!shared && Checker::holds(c.statics, at)) {
    report(
        "touches static memory that is not the kernel's: behind the end of its shared memory, or "
        "a __shared__ array that stands outside of a kernel",
        at, code);
  }
  const uintptr_t end = at + size;
  while (at < end) {
    const uintptr_t word = at / kGrain * kGrain;
    const uintptr_t stop = end < word + kGrain ? end : word + kGrain;
    const auto bytes =
        static_cast<uint8_t>(((1u << (stop - word)) - 1) & ~((1u << (at - word)) - 1));
    Cell& cell = c.page(word / kPage).cells[word % kPage / kGrain];
    check_cell(c, cell, *me, at, bytes, shared, access, code);
    at = stop;
  }
}

}  // namespace

void begin_launch(const std::vector<SharedArray>& static_shared) {
  Checker& c = checker();
  c.static_shared.clear();
  for (const SharedArray& array : static_shared) {
    const auto begin = reinterpret_cast<uintptr_t>(array.begin);
    c.static_shared.push_back({begin, begin + array.size});
  }
  if (c.statics.empty()) dl_iterate_phdr(find_statics, &c.statics);
  if (c.pages.size() > kPages) {
    c.pages.clear();
    for (auto& recent : c.recent) recent = {};
  }
  ++c.launch;
  c.launch_epoch = c.block_epoch = ++c.epoch;
}

void begin_block(const void* dynamic_shared, size_t bytes) {
  Checker& c = checker();
  const auto begin = reinterpret_cast<uintptr_t>(dynamic_shared);
  c.dynamic_shared = {begin, begin + bytes};
  c.block_epoch = ++c.epoch;
  std::memset(c.turns, 0, sizeof c.turns);
}

void barrier() {
  Checker& c = checker();
  ++c.epoch;
  std::memset(c.turns, 0, sizeof c.turns);
}

void sync_warp(int warp) { ++checker().turns[warp]; }

void atomic(const void* address, size_t size) {
  check(address, size, Access::kAtomic, __builtin_return_address(0));
}

void begin_copy(const void* dst, size_t size, const void* src, size_t taken) {
  check(src, taken, Access::kRead, __builtin_return_address(0));
  check(dst, size, Access::kBeginCopy, __builtin_return_address(0));
}

void end_copy(const void* dst, size_t size, const void* src, size_t taken) {
  check(src, taken, Access::kRead, __builtin_return_address(0));
  check(dst, size, Access::kEndCopy, __builtin_return_address(0));
}

namespace {
void read(const void* p, size_t n, const void* code) { check(p, n, Access::kRead, code); }
void write(const void* p, size_t n, const void* code) { check(p, n, Access::kWrite, code); }
}  // namespace

}  // namespace emulation::order

// ---- what instrumented code calls ----

#define EMULATION_CODE __builtin_return_address(0)
#define EMULATION_PLAIN(SIZE)                                                          \
  void __tsan_read##SIZE(void* p) { emulation::order::read(p, SIZE, EMULATION_CODE); } \
  void __tsan_write##SIZE(void* p) { emulation::order::write(p, SIZE, EMULATION_CODE); }
#define EMULATION_UNALIGNED(SIZE)                                                                \
  void __tsan_unaligned_read##SIZE(void* p) { emulation::order::read(p, SIZE, EMULATION_CODE); } \
  void __tsan_unaligned_write##SIZE(void* p) { emulation::order::write(p, SIZE, EMULATION_CODE); }

// Atomic builtins occur in host code only (reference counts of torch's handles).
#define EMULATION_ATOMIC_FETCH(BITS, T, NAME)               \
  T __tsan_atomic##BITS##_##NAME(volatile T* p, T v, int) { \
    return __atomic_##NAME(p, v, __ATOMIC_SEQ_CST);         \
  }
#define EMULATION_ATOMIC(BITS, T)                                                           \
  T __tsan_atomic##BITS##_load(const volatile T* p, int) {                                  \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                            \
  }                                                                                         \
  void __tsan_atomic##BITS##_store(volatile T* p, T v, int) {                               \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                               \
  }                                                                                         \
  T __tsan_atomic##BITS##_exchange(volatile T* p, T v, int) {                               \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                     \
  }                                                                                         \
  bool __tsan_atomic##BITS##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) {  \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                         \
  bool __tsan_atomic##BITS##_compare_exchange_weak(volatile T* p, T* e, T v, int, int) {    \
    return __atomic_compare_exchange_n(p, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }                                                                                         \
  EMULATION_ATOMIC_FETCH(BITS, T, fetch_add)                                                \
  EMULATION_ATOMIC_FETCH(BITS, T, fetch_sub)                                                \
  EMULATION_ATOMIC_FETCH(BITS, T, fetch_and)                                                \
  EMULATION_ATOMIC_FETCH(BITS, T, fetch_or)                                                 \
  EMULATION_ATOMIC_FETCH(BITS, T, fetch_xor)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t n) { emulation::order::read(p, n, EMULATION_CODE); }
void __tsan_write_range(void* p, size_t n) { emulation::order::write(p, n, EMULATION_CODE); }
EMULATION_PLAIN(1)
EMULATION_PLAIN(2)
EMULATION_PLAIN(4)
EMULATION_PLAIN(8)
EMULATION_PLAIN(16)
EMULATION_UNALIGNED(2)
EMULATION_UNALIGNED(4)
EMULATION_UNALIGNED(8)
EMULATION_UNALIGNED(16)
EMULATION_ATOMIC(8, uint8_t)
EMULATION_ATOMIC(16, uint16_t)
EMULATION_ATOMIC(32, uint32_t)
EMULATION_ATOMIC(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
}
