/* Calls every function of the machine with nonsense, for ever or so many times; prints how many calls were taken. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define IMPORT(name) __attribute__((__import_module__("wasi_snapshot_preview1"), __import_name__(#name))) extern
typedef uint32_t u;
typedef uint64_t l;

IMPORT(args_get) u x_args_get(u, u);
IMPORT(args_sizes_get) u x_args_sizes_get(u, u);
IMPORT(environ_get) u x_environ_get(u, u);
IMPORT(environ_sizes_get) u x_environ_sizes_get(u, u);
IMPORT(clock_res_get) u x_clock_res_get(u, u);
IMPORT(clock_time_get) u x_clock_time_get(u, l, u);
IMPORT(random_get) u x_random_get(u, u);
IMPORT(sched_yield) u x_sched_yield(void);
IMPORT(fd_advise) u x_fd_advise(u, l, l, u);
IMPORT(fd_allocate) u x_fd_allocate(u, l, l);
IMPORT(fd_close) u x_fd_close(u);
IMPORT(fd_datasync) u x_fd_datasync(u);
IMPORT(fd_fdstat_get) u x_fd_fdstat_get(u, u);
IMPORT(fd_fdstat_set_flags) u x_fd_fdstat_set_flags(u, u);
IMPORT(fd_fdstat_set_rights) u x_fd_fdstat_set_rights(u, l, l);
IMPORT(fd_filestat_get) u x_fd_filestat_get(u, u);
IMPORT(fd_filestat_set_size) u x_fd_filestat_set_size(u, l);
IMPORT(fd_filestat_set_times) u x_fd_filestat_set_times(u, l, l, u);
IMPORT(fd_pread) u x_fd_pread(u, u, u, l, u);
IMPORT(fd_prestat_get) u x_fd_prestat_get(u, u);
IMPORT(fd_prestat_dir_name) u x_fd_prestat_dir_name(u, u, u);
IMPORT(fd_pwrite) u x_fd_pwrite(u, u, u, l, u);
IMPORT(fd_read) u x_fd_read(u, u, u, u);
IMPORT(fd_readdir) u x_fd_readdir(u, u, u, l, u);
IMPORT(fd_renumber) u x_fd_renumber(u, u);
IMPORT(fd_seek) u x_fd_seek(u, l, u, u);
IMPORT(fd_sync) u x_fd_sync(u);
IMPORT(fd_tell) u x_fd_tell(u, u);
IMPORT(fd_write) u x_fd_write(u, u, u, u);
IMPORT(path_create_directory) u x_path_create_directory(u, u, u);
IMPORT(path_filestat_get) u x_path_filestat_get(u, u, u, u, u);
IMPORT(path_filestat_set_times) u x_path_filestat_set_times(u, u, u, u, l, l, u);
IMPORT(path_link) u x_path_link(u, u, u, u, u, u, u);
IMPORT(path_open) u x_path_open(u, u, u, u, u, l, l, u, u);
IMPORT(path_readlink) u x_path_readlink(u, u, u, u, u, u);
IMPORT(path_remove_directory) u x_path_remove_directory(u, u, u);
IMPORT(path_rename) u x_path_rename(u, u, u, u, u, u);
IMPORT(path_symlink) u x_path_symlink(u, u, u, u, u);
IMPORT(path_unlink_file) u x_path_unlink_file(u, u, u);
IMPORT(poll_oneoff) u x_poll_oneoff(u, u, u, u);
IMPORT(sock_accept) u x_sock_accept(u, u, u);
IMPORT(sock_recv) u x_sock_recv(u, u, u, u, u, u);
IMPORT(sock_send) u x_sock_send(u, u, u, u, u);
IMPORT(sock_shutdown) u x_sock_shutdown(u, u);
IMPORT(sock_open) u x_sock_open(u, u, u);
IMPORT(sock_bind) u x_sock_bind(u, u, u);
IMPORT(sock_listen) u x_sock_listen(u, u);
IMPORT(sock_connect) u x_sock_connect(u, u, u);
IMPORT(sock_recv_from) u x_sock_recv_from(u, u, u, u, u, u, u, u);
IMPORT(sock_send_to) u x_sock_send_to(u, u, u, u, u, u, u);
IMPORT(sock_getlocaladdr) u x_sock_getlocaladdr(u, u, u, u);
IMPORT(sock_getpeeraddr) u x_sock_getpeeraddr(u, u, u, u);
IMPORT(sock_getsockopt) u x_sock_getsockopt(u, u, u, u, u);
IMPORT(sock_setsockopt) u x_sock_setsockopt(u, u, u, u, u);
IMPORT(sock_getaddrinfo) u x_sock_getaddrinfo(u, u, u, u, u, u, u, u);

static uint64_t state;

static uint32_t draw(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

/* Where vectors, paths, addresses and subscriptions are found, valid and not. */
static union {
    uint32_t words[4096];
    uint64_t longs[2048];
    char text[16384];
} pool;

static const char *const texts[] = {"a", "a/b", "../x", "/etc/motd", "a/../..", "", "b/", "\xff\xfe", "::1", "127.0.0.1"};

static uint32_t at(void) {
    switch (draw() % 8) {
    case 0:
        return draw();
    case 1:
        return 0xfffffff8u + draw() % 8;
    default:
        return (uint32_t)(uintptr_t)&pool.words[draw() % 4080];
    }
}

static uint32_t fd(void) { return draw() % 16 == 0 ? draw() : 3 + draw() % 24; }
static uint32_t few(void) { return draw() % 32 == 0 ? draw() : draw() % 6; }
static uint32_t length(void) { return draw() % 16 == 0 ? draw() : draw() % 80; }
static uint32_t flag(void) { return draw() % 8 == 0 ? draw() : draw() % 32; }

static uint64_t wide(void) {
    switch (draw() % 4) {
    case 0:
        return ((uint64_t)draw() << 32) | draw();
    case 1:
        return ~(uint64_t)(draw() % 4);
    default:
        return draw() % 70000;
    }
}

static uint32_t text(uint32_t *size) {
    const char *chosen = texts[draw() % (sizeof texts / sizeof *texts)];
    if (draw() % 8 == 0) {
        *size = length();
        return at();
    }
    for (*size = 0; chosen[*size] != 0; ++*size)
        ;
    return (uint32_t)(uintptr_t)chosen;
}

/* Nothing is to wait for ever: what is opened does not block, and a poll ends soon. */
static void gentle(void) {
    for (uint32_t number = 5; number < 40; number++)
        x_fd_fdstat_set_flags(number, 4);
}

static uint32_t poll(void) {
    uint32_t clock = (uint32_t)(uintptr_t)&pool.longs[0];
    uint32_t count = 1 + draw() % 8;
    for (uint32_t index = 0; index < count; index++) {
        pool.longs[index * 6 + 1] = draw() % 4;
        pool.words[index * 12 + 4] = fd();
        pool.longs[index * 6 + 3] = draw() % 1000000;
    }
    pool.longs[1] = 0;
    pool.words[4] = 1;
    pool.longs[3] = 1000;
    pool.longs[5] = 0;
    return x_poll_oneoff(clock, draw() % 4 == 0 ? at() : clock + 8192, count, clock + 16000);
}

int main(int argc, char **argv) {
    uint32_t most = argc > 2 ? (uint32_t)atoi(argv[2]) : 100000;
    uint32_t taken = 0, first, second, size, other;
    state = 0x9e3779b97f4a7c15u * (uint64_t)(argc > 1 ? atoi(argv[1]) + 1 : 1);
    for (uint32_t call = 0; call < most; call++) {
        uint32_t result = 0;
        if (call % 64 == 0) {
            for (uint32_t index = 0; index < 4096; index++)
                pool.words[index] = index % 2 ? draw() % 64 : (uint32_t)(uintptr_t)&pool.text[draw() % 8000];
            gentle();
        }
        first = text(&size);
        second = text(&other);
        switch (draw() % 54) {
        case 0: result = x_args_get(at(), at()); break;
        case 1: result = x_args_sizes_get(at(), at()); break;
        case 2: result = x_environ_get(at(), at()); break;
        case 3: result = x_environ_sizes_get(at(), at()); break;
        case 4: result = x_clock_res_get(few(), at()); break;
        case 5: result = x_clock_time_get(few(), wide(), at()); break;
        case 6: result = x_random_get(at(), length()); break;
        case 7: result = x_sched_yield(); break;
        case 8: result = x_fd_advise(fd(), wide(), wide(), few()); break;
        case 9: result = x_fd_allocate(fd(), wide(), wide()); break;
        case 10: result = x_fd_close(5 + draw() % 30); break;
        case 11: result = x_fd_datasync(fd()); break;
        case 12: result = x_fd_fdstat_get(fd(), at()); break;
        case 13: result = x_fd_fdstat_set_flags(fd(), flag() | 4); break;
        case 14: result = draw() % 16 ? 0 : x_fd_fdstat_set_rights(5 + draw() % 30, wide(), wide()); break;
        case 15: result = x_fd_filestat_get(fd(), at()); break;
        case 16: result = x_fd_filestat_set_size(fd(), wide()); break;
        case 17: result = x_fd_filestat_set_times(fd(), wide(), wide(), flag()); break;
        case 18: result = x_fd_pread(fd(), at(), few(), wide(), at()); break;
        case 19: result = x_fd_prestat_get(fd(), at()); break;
        case 20: result = x_fd_prestat_dir_name(fd(), at(), length()); break;
        case 21: result = x_fd_pwrite(fd(), at(), few(), wide(), at()); break;
        case 22: result = x_fd_read(fd(), at(), few(), at()); break;
        case 23: result = x_fd_readdir(fd(), at(), length(), wide(), at()); break;
        case 24: result = x_fd_renumber(5 + draw() % 30, 5 + draw() % 30); break;
        case 25: result = x_fd_seek(fd(), wide(), few(), at()); break;
        case 26: result = x_fd_sync(fd()); break;
        case 27: result = x_fd_tell(fd(), at()); break;
        case 28: result = x_fd_write(fd(), at(), few(), at()); break;
        case 29: result = x_path_create_directory(fd(), first, size); break;
        case 30: result = x_path_filestat_get(fd(), few(), first, size, at()); break;
        case 31: result = x_path_filestat_set_times(fd(), few(), first, size, wide(), wide(), flag()); break;
        case 32: result = x_path_link(fd(), 0, first, size, fd(), second, other); break;
        case 33:
        case 34: result = x_path_open(fd(), few(), first, size, flag() % 16, ~0ull, ~0ull, flag() | 4, at()); break;
        case 35: result = x_path_readlink(fd(), first, size, at(), length(), at()); break;
        case 36: result = x_path_remove_directory(fd(), first, size); break;
        case 37: result = x_path_rename(fd(), first, size, fd(), second, other); break;
        case 38: result = x_path_symlink(first, size, fd(), second, other); break;
        case 39: result = x_path_unlink_file(fd(), first, size); break;
        case 40: result = poll(); break;
        case 41: result = x_sock_accept(fd(), 4, at()); break;
        case 42: result = x_sock_recv(fd(), at(), few(), few(), at(), at()); break;
        case 43: result = x_sock_send(fd(), at(), few(), 0, at()); break;
        case 44: result = x_sock_shutdown(fd(), few()); break;
        case 45: {
            uint32_t opened = 0;
            result = x_sock_open(few(), few(), (uint32_t)(uintptr_t)&opened);
            if (result == 0)
                x_fd_fdstat_set_flags(opened, 4);
            break;
        }
        case 46: result = x_sock_bind(fd(), at(), draw() % 4 ? draw() % 3000 : draw()); break;
        case 47: result = x_sock_listen(fd(), few()); break;
        case 48: result = x_sock_connect(fd(), at(), draw() % 4 ? draw() % 3000 : draw()); break;
        case 49: result = x_sock_recv_from(fd(), at(), few(), at(), few(), at(), at(), at()); break;
        case 50: result = x_sock_send_to(fd(), at(), few(), at(), draw() % 3000, 0, at()); break;
        case 51: result = x_sock_getlocaladdr(fd(), at(), at(), at()) & x_sock_getpeeraddr(fd(), at(), at(), at()); break;
        case 52: result = x_sock_getsockopt(fd(), few() / 4, few(), at(), at()) & x_sock_setsockopt(fd(), 0, few(), at(), few()); break;
        default: result = x_sock_getaddrinfo(first, size, second, other, at(), at(), few(), at()); break;
        }
        taken += result == 0;
        if (result > 76)
            return 9;
    }
    printf("%u of %u\n", taken, most);
    return 0;
}
