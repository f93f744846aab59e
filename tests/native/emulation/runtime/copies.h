// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies of the block that runs. The bytes of a copy arrive when its thread waits for
// its group; until then the destination holds 0xff bytes (NaNs). A launch ends with a message for
//   - sizes, alignments and places that CUDA does not take;
//   - a second copy into bytes that a pending one writes;
//   - a destination, or a source, that has changed before the copy arrived;
//   - a thread that exits while a copy of its own is pending.
// The order checker adds: any access to a pending destination, and a read of bytes that arrived
// with no barrier behind the wait, by the issuing thread too, because __pipeline_wait_prior does
// not keep the compiler from reading earlier.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation/runtime.h"

namespace emulation {

class Copies {
 public:
  void begin_block();
  void issue(int thread, void* dst, const void* src, size_t size, size_t zfill, Site site);
  void commit(int thread);
  void wait(int thread, size_t prior, Site site);
  // Where the first copy that is still pending was issued, "" where none is.
  std::string pending(int thread) const;

 private:
  struct Copy {
    char* dst;
    const char* src;
    size_t size, taken;  // bytes written; bytes read, the rest is zero
    uint64_t group;
    unsigned char bytes[16];
    Site site;
  };
  struct Thread {
    std::vector<Copy> pending;  // in the order of issue
    uint64_t groups = 0;        // committed
  };

  void arrive(const Copy& copy, Site site);

  std::vector<Thread> threads_;
  std::unordered_map<uintptr_t, int> writer_;  // thread that writes the aligned 4 bytes at a key
};

}  // namespace emulation
