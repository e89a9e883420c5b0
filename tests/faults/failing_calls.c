/* Preloaded into a process, this makes the n-th call of one kind fail, as a full disk, a failing one or too little memory would.

Calls on files count where the file lies below a folder, allocations from a size on. The count is shared with forks, so that
the work of a process and of its children is one sequence of calls.
*/

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, READ, WRITE, RENAME, SYNC, MEMORY };

static struct {
    atomic_int kind;
    atomic_long calls;
    long first;
    int lasting, error;
    size_t smallest;
    char folder[512];
} *state;

__attribute__((constructor)) static void start(void) {
    state = (void *)syscall(SYS_mmap, NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0L);
}

/* The first of `calls` that fails, 0 for none; `lasting`: all after it fail, too. */
void fail_calls(int kind, long first, int lasting, int error, size_t smallest, const char *folder) {
    atomic_store(&state->kind, NONE);
    atomic_store(&state->calls, 0);
    state->first = first, state->lasting = lasting, state->error = error, state->smallest = smallest;
    snprintf(state->folder, sizeof state->folder, "%s/", folder);
    atomic_store(&state->kind, kind);
}

long counted_calls(void) { return atomic_load(&state->calls); }

static int fails(void) {
    long call = atomic_fetch_add(&state->calls, 1) + 1;
    if (!state->first || call < state->first || (call > state->first && !state->lasting)) return 0;
    errno = state->error;
    return 1;
}

static int is(int kind) { return state && atomic_load_explicit(&state->kind, memory_order_relaxed) == kind; }

static int below(const char *path) { return path && !strncmp(path, state->folder, strlen(state->folder)); }

static int is_ours(int file) {
    char link[64], path[512];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long length = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int path_fails(int kind, int at, const char *path) {
    return is(kind) && (below(path) || (at != AT_FDCWD && *path != '/' && is_ours(at))) && fails();
}

static int file_fails(int kind, int file) { return is(kind) && is_ours(file) && fails(); }

static int allocation_fails(size_t bytes) { return is(MEMORY) && bytes >= state->smallest && fails(); }

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define ON_FILE(kind, type, name, parameters, ...)                                                                     \
    type name parameters {                                                                                             \
        static __typeof__(&name) next;                                                                                 \
        if (!next) next = NEXT(name);                                                                                  \
        return file_fails(kind, file) ? -1 : next(__VA_ARGS__);                                                        \
    }

#define ON_PATH(kind, name, at, parameters, ...)                                                                       \
    int name parameters {                                                                                              \
        static __typeof__(&name) next;                                                                                 \
        if (!next) next = NEXT(name);                                                                                  \
        return path_fails(kind, at, path) ? -1 : next(__VA_ARGS__);                                                    \
    }

#define MANY const struct iovec *parts, int count
ON_FILE(READ, ssize_t, read, (int file, void *to, size_t bytes), file, to, bytes)
ON_FILE(READ, ssize_t, pread, (int file, void *to, size_t bytes, off_t at), file, to, bytes, at)
ON_FILE(READ, ssize_t, pread64, (int file, void *to, size_t bytes, off64_t at), file, to, bytes, at)
ON_FILE(READ, ssize_t, readv, (int file, MANY), file, parts, count)
ON_FILE(READ, ssize_t, preadv, (int file, MANY, off_t at), file, parts, count, at)
ON_FILE(READ, ssize_t, preadv64, (int file, MANY, off64_t at), file, parts, count, at)
ON_FILE(READ, ssize_t, preadv2, (int file, MANY, off_t at, int flags), file, parts, count, at, flags)
ON_FILE(READ, ssize_t, preadv64v2, (int file, MANY, off64_t at, int flags), file, parts, count, at, flags)
ON_FILE(WRITE, ssize_t, write, (int file, const void *from, size_t bytes), file, from, bytes)
ON_FILE(WRITE, ssize_t, pwrite, (int file, const void *from, size_t bytes, off_t at), file, from, bytes, at)
ON_FILE(WRITE, ssize_t, pwrite64, (int file, const void *from, size_t bytes, off64_t at), file, from, bytes, at)
ON_FILE(WRITE, ssize_t, writev, (int file, MANY), file, parts, count)
ON_FILE(WRITE, ssize_t, sendfile, (int file, int from, off_t *at, size_t bytes), file, from, at, bytes)
ON_FILE(WRITE, ssize_t, sendfile64, (int file, int from, off64_t *at, size_t bytes), file, from, at, bytes)
ON_FILE(WRITE, int, ftruncate, (int file, off_t bytes), file, bytes)
ON_FILE(WRITE, int, ftruncate64, (int file, off64_t bytes), file, bytes)
ON_FILE(SYNC, int, fsync, (int file), file)
ON_FILE(SYNC, int, fdatasync, (int file), file)
ON_PATH(WRITE, mkdir, AT_FDCWD, (const char *path, mode_t mode), path, mode)
ON_PATH(WRITE, symlink, AT_FDCWD, (const char *to, const char *path), to, path)
ON_PATH(RENAME, rename, AT_FDCWD, (const char *path, const char *to), path, to)
ON_PATH(RENAME, renameat, from, (int from, const char *path, int at, const char *to), from, path, at, to)
ON_PATH(RENAME, unlink, AT_FDCWD, (const char *path), path)
ON_PATH(RENAME, unlinkat, at, (int at, const char *path, int flags), at, path, flags)
ON_PATH(RENAME, rmdir, AT_FDCWD, (const char *path), path)

#define OPENING(name, at, parameters, ...)                                                                             \
    int name parameters {                                                                                              \
        static __typeof__(&name) next;                                                                                 \
        if (!next) next = NEXT(name);                                                                                  \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                  \
        return path_fails(flags & O_ACCMODE || flags & O_CREAT ? WRITE : READ, at, path) ? -1                          \
                                                                                         : next(__VA_ARGS__, mode);    \
    }

OPENING(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENING(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENING(openat, at, (int at, const char *path, int flags, ...), at, path, flags)
OPENING(openat64, at, (int at, const char *path, int flags, ...), at, path, flags)

/* The heap: glibc exports its own functions under these names, so that nothing is looked up while it starts. */
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

void *malloc(size_t bytes) { return allocation_fails(bytes) ? NULL : __libc_malloc(bytes); }
void *calloc(size_t count, size_t bytes) { return allocation_fails(count * bytes) ? NULL : __libc_calloc(count, bytes); }
void *realloc(void *old, size_t bytes) { return allocation_fails(bytes) ? NULL : __libc_realloc(old, bytes); }
void *memalign(size_t to, size_t bytes) { return allocation_fails(bytes) ? NULL : __libc_memalign(to, bytes); }
void *aligned_alloc(size_t to, size_t bytes) { return memalign(to, bytes); }

int posix_memalign(void **found, size_t to, size_t bytes) {
    void *block = memalign(to, bytes);
    if (block) *found = block;
    return block ? 0 : ENOMEM;
}

static void *mapped(void *at, size_t bytes, int protection, int flags, int file, off_t offset) {
    int refused = flags & MAP_ANONYMOUS ? allocation_fails(bytes) : file_fails(READ, file);
    return refused ? MAP_FAILED : (void *)syscall(SYS_mmap, at, bytes, protection, flags, file, offset);
}

void *mmap(void *at, size_t bytes, int protection, int flags, int file, off_t offset) {
    return mapped(at, bytes, protection, flags, file, offset);
}

void *mmap64(void *at, size_t bytes, int protection, int flags, int file, off64_t offset) {
    return mapped(at, bytes, protection, flags, file, offset);
}
