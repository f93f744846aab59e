// SPDX-License-Identifier: Apache-2.0
#include "copies.h"

#include <cstring>

#include "order.h"
#include "scheduler.h"

#if defined(EMULATION_ADDRESS)
#include <sanitizer/asan_interface.h>
#endif

namespace emulation {
namespace {

constexpr size_t kWord = 4;
// wait_prior(n) lets at most this many groups pend, whatever n.
constexpr size_t kMostGroups = 8;

std::string text(Site site) {
  const char* const slash = std::strrchr(site.file, '/');
  return (slash != nullptr ? slash + 1 : site.file) + (":" + std::to_string(site.line));
}

bool is_poisoned([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(EMULATION_ADDRESS)
  return bytes > 0 && __asan_region_is_poisoned(const_cast<void*>(address), bytes) != nullptr;
#else
  return false;
#endif
}

// Why CUDA does not take such a copy, nullptr where it does.
const char* refusal(const void* dst, const void* src, size_t size, size_t zfill) {
  if (size != 4 && size != 8 && size != 16) return "has to move 4, 8 or 16 bytes";
  if (zfill > size) return "fills more than it moves";
  if (reinterpret_cast<uintptr_t>(dst) % size) return "has a misaligned destination";
  if (reinterpret_cast<uintptr_t>(src) % size) return "has a misaligned source";
  if (!in_shared_memory(dst, size)) return "does not end in shared memory of the block";
  if (zfill == size) return nullptr;
  if (in_shared_memory(src, 1) || on_fiber_stack(src)) return "does not start in global memory";
  if (is_poisoned(src, size - zfill)) return "reads outside of every buffer";
  return nullptr;
}

}  // namespace

void Copies::begin_block() {
  threads_.assign(kMaxThreads, {});
  writer_.clear();
}

void Copies::issue(int thread, void* dst, const void* src, size_t size, size_t zfill, Site site) {
  const auto refuse = [&](const std::string& why) {
    fail("issues an asynchronous copy at %s, which %s", text(site).c_str(), why.c_str());
  };
  if (const char* why = refusal(dst, src, size, zfill)) refuse(why);
  Copy c = {static_cast<char*>(dst),
            static_cast<const char*>(src),
            size,
            size - zfill,
            threads_[thread].groups,
            {},
            site};
  for (size_t at = 0; at < size; at += kWord) {
    const auto [known, fresh] = writer_.emplace(reinterpret_cast<uintptr_t>(c.dst + at), thread);
    if (!fresh) {
      refuse("writes what a pending copy of thread " + std::to_string(known->second) + " writes");
    }
  }
  if (order::kActive) order::begin_copy(dst, size, src, c.taken);
  std::memcpy(c.bytes, src, c.taken);
  std::memset(dst, 0xff, size);
  threads_[thread].pending.push_back(c);
}

void Copies::commit(int thread) { ++threads_[thread].groups; }

void Copies::wait(int thread, size_t prior, Site site) {
  Thread& me = threads_[thread];
  const uint64_t left = prior < kMostGroups ? prior : kMostGroups;
  size_t done = 0;
  while (done < me.pending.size() && me.pending[done].group + left < me.groups) {
    arrive(me.pending[done++], site);
  }
  me.pending.erase(me.pending.begin(), me.pending.begin() + static_cast<ptrdiff_t>(done));
}

void Copies::arrive(const Copy& copy, Site site) {
  const auto refuse = [&](const char* why) {
    fail("waits at %s for the asynchronous copy issued at %s, whose %s", text(site).c_str(),
         text(copy.site).c_str(), why);
  };
  if (is_poisoned(copy.src, copy.taken) || std::memcmp(copy.src, copy.bytes, copy.taken) != 0) {
    refuse("source has changed since");
  }
  for (size_t i = 0; i < copy.size; ++i) {
    if (static_cast<unsigned char>(copy.dst[i]) != 0xff) {
      refuse("destination was written before it arrived");
    }
  }
  for (size_t at = 0; at < copy.size; at += kWord) {
    writer_.erase(reinterpret_cast<uintptr_t>(copy.dst + at));
  }
  if (order::kActive) order::end_copy(copy.dst, copy.size, copy.src, copy.taken);
  std::memcpy(copy.dst, copy.bytes, copy.size);
}

std::string Copies::pending(int thread) const {
  const Thread& me = threads_[thread];
  return me.pending.empty() ? "" : text(me.pending.front().site);
}

}  // namespace emulation
