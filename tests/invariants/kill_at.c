/* Ends the process, by SIGKILL, at the n-th call by which it changes what is below a folder: writing, syncing, renaming,
 * removing. Of what it was about to write, half is written. Preloaded; asks the environment at each call:
 *
 *   KILL_IN  the folder
 *   KILL_AT  n, from 1; 0 only counts, for kill_at_calls()
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

static int below(const char *path) {
  const char *folder = getenv("KILL_IN");
  return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int of_file(int fd) {
  char link[64], path[PATH_MAX];
  if (!getenv("KILL_IN")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

static int now(void) {
  const char *at = getenv("KILL_AT");
  long call = atomic_fetch_add(&calls, 1) + 1;
  return at && atol(at) == call;
}

static void end(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

__attribute__((visibility("default"))) long kill_at_calls(void) { return atomic_load(&calls); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
  if (of_file(fd) && now()) { REAL(write)(fd, data, size / 2); end(); }
  return REAL(write)(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  if (of_file(fd) && now()) { REAL(pwrite)(fd, data, size / 2, at); end(); }
  return REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  if (of_file(fd) && now()) { REAL(pwrite64)(fd, data, size / 2, at); end(); }
  return REAL(pwrite64)(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  if (of_file(fd) && now()) end();
  return REAL(writev)(fd, parts, count);
}

int fsync(int fd) {
  if (of_file(fd) && now()) end();
  return REAL(fsync)(fd);
}

int fdatasync(int fd) {
  if (of_file(fd) && now()) end();
  return REAL(fdatasync)(fd);
}

int ftruncate(int fd, off_t size) {
  if (of_file(fd) && now()) end();
  return REAL(ftruncate)(fd, size);
}

int rename(const char *from, const char *to) {
  if ((below(from) || below(to)) && now()) end();
  return REAL(rename)(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
  if ((below(from) || below(to)) && now()) end();
  return REAL(renameat)(a, from, b, to);
}

int mkdir(const char *path, mode_t mode) {
  if (below(path) && now()) end();
  return REAL(mkdir)(path, mode);
}

int unlink(const char *path) {
  if (below(path) && now()) end();
  return REAL(unlink)(path);
}

int unlinkat(int folder, const char *path, int flags) {
  if ((below(path) || of_file(folder)) && now()) end();
  return REAL(unlinkat)(folder, path, flags);
}

int rmdir(const char *path) {
  if (below(path) && now()) end();
  return REAL(rmdir)(path);
}
