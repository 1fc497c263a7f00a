/* Sockets for programs in C, compiled by clang --target=wasm32-wasi: TCP and UDP, IPv6, and IPv4 where the machine has
 * an address of it. Everything here is inline; there is nothing to link.
 *
 * The functions are those of WasmEdge's extension of WASI preview 1, so programs built for that run too. A socket is
 * a descriptor: read(), write(), close(), fcntl(F_SETFL, O_NONBLOCK) and poll() of the C library work on it.
 *
 * Every function returns -1 and sets errno when it fails, as its namesake elsewhere does. */
#ifndef KAGE_SOCKET_H
#define KAGE_SOCKET_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Address families and kinds of socket, as the machine numbers them. */
#define KAGE_INET4 1
#define KAGE_INET6 2
#define KAGE_DATAGRAM 1
#define KAGE_STREAM 2

/* Flags of kage_recv_from, and for kage_shutdown. */
#define KAGE_PEEK 1
#define KAGE_WAIT_ALL 2
#define KAGE_SHUT_RD 1
#define KAGE_SHUT_WR 2
#define KAGE_SHUT_RDWR 3

/* Options for kage_getsockopt and kage_setsockopt. */
#define KAGE_SO_REUSEADDR 0
#define KAGE_SO_TYPE 1
#define KAGE_SO_ERROR 2
#define KAGE_SO_SNDBUF 5
#define KAGE_SO_RCVBUF 6
#define KAGE_SO_KEEPALIVE 7
#define KAGE_SO_ACCEPTCONN 13

/* An address and a port; all zeros is every address of the machine. IPv4 uses the first four bytes. */
struct kage_endpoint {
    uint8_t family;
    uint8_t address[16];
    uint16_t port;
};

/* What the machine's functions take; prefer what follows them. */
struct kage_buffer {
    void *bytes;
    uint32_t size;
};

struct kage_sockaddr {
    uint8_t family;
    uint32_t length;
    uint8_t *data;
};

struct kage_addrinfo {
    uint16_t flags;
    uint8_t family;
    uint8_t kind;
    uint32_t protocol;
    uint32_t address_length;
    struct kage_sockaddr *address;
    char *name;
    uint32_t name_length;
    struct kage_addrinfo *next;
};

#define KAGE_IMPORT(name)                                                                                              \
    __attribute__((__import_module__("wasi_snapshot_preview1"), __import_name__(name))) extern

KAGE_IMPORT("sock_open") int32_t kage_raw_open(uint32_t family, uint32_t kind, uint32_t *fd);
KAGE_IMPORT("sock_bind") int32_t kage_raw_bind(uint32_t fd, const struct kage_buffer *address, uint32_t port);
KAGE_IMPORT("sock_listen") int32_t kage_raw_listen(uint32_t fd, uint32_t backlog);
KAGE_IMPORT("sock_accept") int32_t kage_raw_accept(uint32_t fd, uint32_t flags, uint32_t *accepted);
KAGE_IMPORT("sock_connect") int32_t kage_raw_connect(uint32_t fd, const struct kage_buffer *address, uint32_t port);
KAGE_IMPORT("sock_recv_from")
int32_t kage_raw_recv_from(uint32_t fd, const struct kage_buffer *into, uint32_t count, struct kage_buffer *address,
                           uint32_t flags, uint32_t *port, uint32_t *length, uint16_t *out_flags);
KAGE_IMPORT("sock_send")
int32_t kage_raw_send(uint32_t fd, const struct kage_buffer *from, uint32_t count, uint32_t flags, uint32_t *length);
KAGE_IMPORT("sock_send_to")
int32_t kage_raw_send_to(uint32_t fd, const struct kage_buffer *from, uint32_t count, const struct kage_buffer *address,
                         uint32_t port, uint32_t flags, uint32_t *length);
KAGE_IMPORT("sock_shutdown") int32_t kage_raw_shutdown(uint32_t fd, uint32_t how);
KAGE_IMPORT("sock_getlocaladdr")
int32_t kage_raw_local(uint32_t fd, struct kage_buffer *address, uint32_t *family, uint32_t *port);
KAGE_IMPORT("sock_getpeeraddr")
int32_t kage_raw_peer(uint32_t fd, struct kage_buffer *address, uint32_t *family, uint32_t *port);
KAGE_IMPORT("sock_getsockopt")
int32_t kage_raw_getsockopt(uint32_t fd, uint32_t level, uint32_t name, void *value, uint32_t *size);
KAGE_IMPORT("sock_setsockopt")
int32_t kage_raw_setsockopt(uint32_t fd, uint32_t level, uint32_t name, const void *value, uint32_t size);
KAGE_IMPORT("sock_getaddrinfo")
int32_t kage_raw_getaddrinfo(const char *node, uint32_t node_length, const char *service, uint32_t service_length,
                             const struct kage_addrinfo *hint, struct kage_addrinfo **list, uint32_t most,
                             uint32_t *count);

static inline int kage_result(int32_t error) {
    if (error == 0)
        return 0;
    errno = error;
    return -1;
}

static inline struct kage_buffer kage_address_of(const struct kage_endpoint *endpoint) {
    struct kage_buffer buffer = {(void *)endpoint->address, endpoint->family == KAGE_INET4 ? 4 : 16};
    return buffer;
}

/* A new socket: KAGE_INET6 or KAGE_INET4, KAGE_STREAM or KAGE_DATAGRAM. */
static inline int kage_socket(int family, int kind) {
    uint32_t fd = 0;
    return kage_result(kage_raw_open((uint32_t)family, (uint32_t)kind, &fd)) ? -1 : (int)fd;
}

/* Port 0: a free one; kage_local tells which. */
static inline int kage_bind(int fd, const struct kage_endpoint *to) {
    struct kage_buffer address = kage_address_of(to);
    return kage_result(kage_raw_bind((uint32_t)fd, &address, to->port));
}

static inline int kage_listen(int fd, int backlog) {
    return kage_result(kage_raw_listen((uint32_t)fd, (uint32_t)backlog));
}

static inline int kage_accept(int fd) {
    uint32_t accepted = 0;
    return kage_result(kage_raw_accept((uint32_t)fd, 0, &accepted)) ? -1 : (int)accepted;
}

/* EINPROGRESS on a non-blocking socket: poll() for writing, then ask for KAGE_SO_ERROR. */
static inline int kage_connect(int fd, const struct kage_endpoint *to) {
    struct kage_buffer address = kage_address_of(to);
    return kage_result(kage_raw_connect((uint32_t)fd, &address, to->port));
}

/* To where the socket is connected if `to` is NULL. */
static inline long kage_send_to(int fd, const void *bytes, size_t length, const struct kage_endpoint *to) {
    struct kage_buffer from = {(void *)bytes, (uint32_t)length}, address;
    uint32_t sent = 0;
    if (to == NULL)
        return kage_result(kage_raw_send((uint32_t)fd, &from, 1, 0, &sent)) ? -1 : (long)sent;
    address = kage_address_of(to);
    return kage_result(kage_raw_send_to((uint32_t)fd, &from, 1, &address, to->port, 0, &sent)) ? -1 : (long)sent;
}

/* `from` may be NULL. */
static inline long kage_recv_from(int fd, void *bytes, size_t length, int flags, struct kage_endpoint *from) {
    uint8_t place[128];
    struct kage_buffer into = {bytes, (uint32_t)length}, address = {place, sizeof place};
    uint32_t received = 0, port = 0;
    uint16_t out = 0;
    if (kage_result(
            kage_raw_recv_from((uint32_t)fd, &into, 1, &address, (uint32_t)flags, &port, &received, &out)))
        return -1;
    if (from != NULL) {
        memset(from, 0, sizeof *from);
        from->family = place[0];
        memcpy(from->address, place + 2, place[0] == KAGE_INET4 ? 4 : 16);
        from->port = (uint16_t)port;
    }
    return (long)received;
}

static inline int kage_shutdown(int fd, int how) {
    return kage_result(kage_raw_shutdown((uint32_t)fd, (uint32_t)how));
}

static inline int kage_local(int fd, struct kage_endpoint *endpoint) {
    struct kage_buffer address = {endpoint->address, sizeof endpoint->address};
    uint32_t family = 0, port = 0;
    if (kage_result(kage_raw_local((uint32_t)fd, &address, &family, &port)))
        return -1;
    endpoint->family = family == 4 ? KAGE_INET4 : KAGE_INET6;
    endpoint->port = (uint16_t)port;
    return 0;
}

static inline int kage_peer(int fd, struct kage_endpoint *endpoint) {
    struct kage_buffer address = {endpoint->address, sizeof endpoint->address};
    uint32_t family = 0, port = 0;
    if (kage_result(kage_raw_peer((uint32_t)fd, &address, &family, &port)))
        return -1;
    endpoint->family = family == 4 ? KAGE_INET4 : KAGE_INET6;
    endpoint->port = (uint16_t)port;
    return 0;
}

static inline int kage_getsockopt(int fd, int name, int *value) {
    uint32_t size = sizeof *value;
    return kage_result(kage_raw_getsockopt((uint32_t)fd, 0, (uint32_t)name, value, &size));
}

static inline int kage_setsockopt(int fd, int name, int value) {
    return kage_result(kage_raw_setsockopt((uint32_t)fd, 0, (uint32_t)name, &value, sizeof value));
}

/* Reads an address as text; `localhost` is ::1. There is no resolver. */
static inline int kage_endpoint_of(const char *text, uint16_t port, struct kage_endpoint *endpoint) {
    uint8_t data[26];
    struct kage_sockaddr address = {0, 0, data};
    struct kage_addrinfo entry, hint, *list = &entry;
    uint32_t count = 0;
    memset(&entry, 0, sizeof entry);
    memset(&hint, 0, sizeof hint);
    entry.address = &address;
    if (kage_result(kage_raw_getaddrinfo(text, (uint32_t)strlen(text), "", 0, &hint, &list, 1, &count)))
        return -1;
    if (count == 0)
        return kage_result(ENOENT);
    memset(endpoint, 0, sizeof *endpoint);
    endpoint->family = address.family;
    endpoint->port = port;
    if (address.family == KAGE_INET4)
        memcpy(endpoint->address, data + 2, 4);
    else
        memcpy(endpoint->address, data + 6, 16);
    return 0;
}

#ifdef __cplusplus
}
#endif

#endif
