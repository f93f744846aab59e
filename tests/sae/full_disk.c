// SPDX-License-Identifier: Apache-2.0
// Preloaded: lets the n-th call that takes room in a folder fail as on a full disk.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long left, calls;
static int stays, armed;

// From the n-th call on if `always`, otherwise that one alone; n = 0 disarms.
void full_disk(const char* path, long n, int always) {
  snprintf(folder, sizeof folder, "%s/", path);
  left = n;
  calls = 0;
  stays = always;
  armed = n > 0;
}

long full_disk_calls(void) { return calls; }

static int fails(const char* path) {
  if (!armed || strncmp(path, folder, strlen(folder)) != 0) return 0;
  ++calls;
  if (calls < left || (calls > left && !stays)) return 0;
  errno = ENOSPC;
  return 1;
}

static int fails_at(int file) {
  char name[64], path[PATH_MAX];
  if (!armed) return 0;
  snprintf(name, sizeof name, "/proc/self/fd/%d", file);
  ssize_t size = readlink(name, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void* data, size_t size) {
  // A disk that fills up takes the beginning of a large write first.
  if (fails_at(file)) {
    if (size > 1 && !stays) {
      REAL(write)(file, data, size / 2);
      errno = ENOSPC;
    }
    return -1;
  }
  return REAL(write)(file, data, size);
}
ssize_t writev(int file, const struct iovec* parts, int count) {
  return fails_at(file) ? -1 : REAL(writev)(file, parts, count);
}
ssize_t pwrite64(int file, const void* data, size_t size, off64_t at) {
  return fails_at(file) ? -1 : REAL(pwrite64)(file, data, size, at);
}
int ftruncate64(int file, off64_t size) {
  struct stat now;
  if (fstat(file, &now) == 0 && size > now.st_size && fails_at(file)) return -1;
  return REAL(ftruncate64)(file, size);
}
int fsync(int file) { return fails_at(file) ? -1 : REAL(fsync)(file); }
int mkdir(const char* path, mode_t mode) { return fails(path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char* from, const char* to) { return fails(to) ? -1 : REAL(rename)(from, to); }
int open64(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
  va_end(more);
  if ((flags & O_CREAT) && access(path, F_OK) != 0 && fails(path)) return -1;
  return REAL(open64)(path, flags, mode);
}
