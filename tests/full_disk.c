/* A disk that is full from a given write on, for tests: preloaded into a process, it has what would write, create,
 * make or rename under a folder fail with ENOSPC, as of call number AT. The file that FULL_DISK names holds "AT FOLDER",
 * and is read once by each process; AT 0 only counts. Calls that succeeded or failed are counted in FULL_DISK.count.
 *
 *     cc -shared -fPIC -o full_disk.so full_disk.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static pid_t reader;
static long at, calls;
static char folder[4096];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void read_orders(void) {
    if (reader == getpid()) return;
    reader = getpid();
    at = -1, calls = 0, folder[0] = 0;
    const char *path = getenv("FULL_DISK");
    int fd = path ? REAL(open)(path, O_RDONLY) : -1;
    if (fd < 0) return;
    char text[4200];
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    text[length > 0 ? length : 0] = 0;
    if (sscanf(text, "%ld %4095[^\n]", &at, folder) != 2) at = -1;
}

static int is_full(const char *path) {
    pthread_mutex_lock(&lock);
    read_orders();
    int full = 0;
    if (at >= 0 && path && strncmp(path, folder, strlen(folder)) == 0) {
        calls++;
        full = at > 0 && calls >= at;
        char name[4200], number[32];
        snprintf(name, sizeof name, "%s.count", getenv("FULL_DISK"));
        int fd = REAL(open)(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (fd >= 0) {
            int length = snprintf(number, sizeof number, "%ld", calls);
            if (REAL(write)(fd, number, length) < 0) {}
            close(fd);
        }
    }
    pthread_mutex_unlock(&lock);
    if (full) errno = ENOSPC;
    return full;
}

static int is_full_behind(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_full(path);
}

ssize_t write(int fd, const void *data, size_t size) { return is_full_behind(fd) ? -1 : REAL(write)(fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t start) {
    return is_full_behind(fd) ? -1 : REAL(pwrite)(fd, data, size, start);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t start) {
    return is_full_behind(fd) ? -1 : REAL(pwrite64)(fd, data, size, start);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return is_full_behind(fd) ? -1 : REAL(writev)(fd, parts, count);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    return is_full_behind(out) ? -1 : REAL(copy_file_range)(in, from, out, to, size, flags);
}
int mkdir(const char *path, mode_t mode) { return is_full(path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return is_full(to) ? -1 : REAL(rename)(from, to); }

#define OPENER(name, parameters, arguments)                                   \
    int name parameters {                                                     \
        mode_t mode = 0;                                                      \
        if (flags & O_CREAT) {                                                \
            va_list rest;                                                     \
            va_start(rest, flags);                                            \
            mode = va_arg(rest, mode_t);                                      \
            va_end(rest);                                                     \
            if (is_full(path)) return -1;                                     \
        }                                                                     \
        return REAL(name) arguments;                                          \
    }
OPENER(open, (const char *path, int flags, ...), (path, flags, mode))
OPENER(open64, (const char *path, int flags, ...), (path, flags, mode))
OPENER(openat, (int at_fd, const char *path, int flags, ...), (at_fd, path, flags, mode))
OPENER(openat64, (int at_fd, const char *path, int flags, ...), (at_fd, path, flags, mode))
