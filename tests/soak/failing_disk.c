/* Preloaded into a process: from a given call on, whatever writes below a folder fails as on a full disk.
 *
 * olmfast_soak_arm(folder, n): the n-th such call from now, and all that follow, fail with ENOSPC; 0: none fails.
 * olmfast_soak_calls(): how many there have been since.
 */
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
#include <unistd.h>

static char folder[PATH_MAX];
static long first, calls;

void olmfast_soak_arm(const char* path, long n) {
  snprintf(folder, sizeof folder, "%s", path);
  first = n;
  calls = 0;
}

long olmfast_soak_calls(void) { return calls; }

static int fails(const char* path) {
  if (!folder[0] || strncmp(path, folder, strlen(folder)) != 0) return 0;
  long call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
  if (!first || call < first) return 0;
  errno = ENOSPC;
  return 1;
}

static int fails_fd(int fd) {
  char link[64], path[PATH_MAX];
  if (!folder[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return fails(path);
}

#define NEXT(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void* from, size_t n) { return fails_fd(fd) ? -1 : NEXT(write)(fd, from, n); }

ssize_t pwrite(int fd, const void* from, size_t n, off_t at) {
  return fails_fd(fd) ? -1 : NEXT(pwrite)(fd, from, n, at);
}

ssize_t pwrite64(int fd, const void* from, size_t n, off64_t at) {
  return fails_fd(fd) ? -1 : NEXT(pwrite64)(fd, from, n, at);
}

ssize_t copy_file_range(int in, off64_t* at, int out, off64_t* to, size_t n, unsigned flags) {
  return fails_fd(out) ? -1 : NEXT(copy_file_range)(in, at, out, to, n, flags);
}

ssize_t sendfile(int out, int in, off_t* at, size_t n);
ssize_t sendfile(int out, int in, off_t* at, size_t n) { return fails_fd(out) ? -1 : NEXT(sendfile)(out, in, at, n); }

int fallocate(int fd, int mode, off_t at, off_t n) { return fails_fd(fd) ? -1 : NEXT(fallocate)(fd, mode, at, n); }

int fallocate64(int fd, int mode, off64_t at, off64_t n) {
  return fails_fd(fd) ? -1 : NEXT(fallocate64)(fd, mode, at, n);
}

int fsync(int fd) { return fails_fd(fd) ? -1 : NEXT(fsync)(fd); }

int mkdir(const char* path, mode_t mode) { return fails(path) ? -1 : NEXT(mkdir)(path, mode); }

int open(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return (flags & O_CREAT) && fails(path) ? -1 : NEXT(open)(path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return (flags & O_CREAT) && fails(path) ? -1 : NEXT(open64)(path, flags, mode);
}
