/* A disk that fails on demand: preloaded, it makes the n-th call that changes files return an error and do nothing, or
   ends the process there.

       cc -shared -fPIC -o faults.so tests/faults.c -ldl
       LD_PRELOAD=./faults.so python tests/test_resume.py FOLDER

   Nothing fails before arm(n, errno); the process ends for an errno of 0. Opening a file counts only when it is for writing.
   Left out: system calls made without libc (safetensors renames its temporary file that way), and threads. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int chosen, error, calls; /* chosen: the call to fail, 0 for none */
static const char *failed = "";

void arm(int n, int code) { chosen = n, error = code, calls = 0, failed = ""; }
const char *disarm(void) { return chosen = 0, failed; } /* the name of the call that failed, or "" */

static int fails(const char *name) {
    if (chosen == 0 || ++calls != chosen) return 0;
    if (error == 0) _exit(9);
    failed = name;
    errno = error;
    return 1;
}

#define WRAP(type, name, parameters, arguments)                   \
    type name parameters {                                        \
        static type (*real) parameters;                           \
        if (!real) real = (type (*) parameters)dlsym(RTLD_NEXT, #name); \
        return fails(#name) ? -1 : real arguments;                \
    }

WRAP(ssize_t, write, (int file, const void *data, size_t size), (file, data, size))
WRAP(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count))
WRAP(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
WRAP(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
WRAP(ssize_t, sendfile, (int to, int from, off_t *at, size_t size), (to, from, at, size))
WRAP(ssize_t, sendfile64, (int to, int from, off64_t *at, size_t size), (to, from, at, size))
WRAP(ssize_t, copy_file_range, (int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags),
     (from, at, to, there, size, flags))
WRAP(int, ftruncate, (int file, off_t size), (file, size))
WRAP(int, ftruncate64, (int file, off64_t size), (file, size))
WRAP(int, fdatasync, (int file), (file))
WRAP(int, rename, (const char *old, const char *new), (old, new))
WRAP(int, renameat, (int at, const char *old, int to, const char *new), (at, old, to, new))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode))
WRAP(int, unlink, (const char *path), (path))
WRAP(int, unlinkat, (int at, const char *path, int flags), (at, path, flags))
WRAP(int, rmdir, (const char *path), (path))

int fsync(int file) { return (void)file, fails("fsync") ? -1 : 0; } /* the real one takes most of the time */

#define WRAP_OPEN(name)                                                \
    int name(const char *path, int flags, ...) {                       \
        static int (*real)(const char *, int, ...);                    \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest;                                                  \
        va_start(rest, flags);                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                  \
        int writes = (flags & O_ACCMODE) != O_RDONLY;                  \
        return writes && fails(#name) ? -1 : real(path, flags, mode);  \
    }

WRAP_OPEN(open)
WRAP_OPEN(open64)
