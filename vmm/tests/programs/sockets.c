/* Sockets, as a program in C has them. Given an address and a port, it asks an echo service there, too. */
#include "kage_socket.h"
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <fcntl.h>
#include <poll.h>
#define CHECK(what) do { if (!(what)) { printf("FAILED %s line %d errno %d\n", #what, __LINE__, errno); return 1; } } while (0)
int main(int argc, char **argv) {
    struct kage_endpoint at = {0}, found, peer;
    at.family = KAGE_INET6;
    int listener = kage_socket(KAGE_INET6, KAGE_STREAM);
    CHECK(listener > 2);
    CHECK(kage_bind(listener, &at) == 0);
    CHECK(kage_listen(listener, 8) == 0);
    CHECK(kage_local(listener, &found) == 0 && found.port >= 49152);
    int value = 0;
    CHECK(kage_getsockopt(listener, KAGE_SO_ACCEPTCONN, &value) == 0 && value == 1);
    fcntl(listener, F_SETFL, O_NONBLOCK);
    CHECK(kage_accept(listener) == -1 && errno == EAGAIN);
    struct kage_endpoint to;
    CHECK(kage_endpoint_of("localhost", found.port, &to) == 0);
    int client = kage_socket(KAGE_INET6, KAGE_STREAM);
    CHECK(kage_connect(client, &to) == 0);
    struct pollfd p = { .fd = listener, .events = POLLIN };
    CHECK(poll(&p, 1, 1000) == 1);
    int server = kage_accept(listener);
    CHECK(server > client);
    CHECK(kage_peer(client, &peer) == 0 && peer.port == found.port);
    CHECK(write(client, "hello", 5) == 5);
    char buffer[64] = {0};
    CHECK(kage_recv_from(server, buffer, 64, KAGE_PEEK, NULL) == 5);
    CHECK(read(server, buffer, 64) == 5 && memcmp(buffer, "hello", 5) == 0);
    CHECK(kage_shutdown(client, KAGE_SHUT_WR) == 0);
    CHECK(read(server, buffer, 64) == 0);
    CHECK(write(server, "bye", 3) == 3);
    CHECK(kage_recv_from(client, buffer, 3, KAGE_WAIT_ALL, &peer) == 3);
    close(server); close(client); close(listener);
    /* Nobody listens there now. */
    client = kage_socket(KAGE_INET6, KAGE_STREAM);
    CHECK(kage_connect(client, &to) == -1 && errno == ECONNREFUSED);
    close(client);

    /* Datagrams. */
    int a = kage_socket(KAGE_INET6, KAGE_DATAGRAM), b = kage_socket(KAGE_INET6, KAGE_DATAGRAM);
    struct kage_endpoint five = {KAGE_INET6, {0}, 5555};
    CHECK(kage_bind(a, &five) == 0);
    int c = kage_socket(KAGE_INET6, KAGE_DATAGRAM);
    CHECK(kage_bind(c, &five) == -1 && errno == EADDRINUSE);
    close(c);
    CHECK(kage_endpoint_of("::1", 5555, &to) == 0);
    CHECK(kage_send_to(b, "datagram", 8, &to) == 8);
    memset(buffer, 0, 64);
    CHECK(kage_recv_from(a, buffer, 4, 0, &peer) == 4 && memcmp(buffer, "data", 4) == 0);
    CHECK(kage_send_to(a, "back", 4, &peer) == 4);
    CHECK(kage_recv_from(b, buffer, 64, 0, NULL) == 4);
    fcntl(a, F_SETFL, O_NONBLOCK);
    CHECK(kage_recv_from(a, buffer, 64, 0, NULL) == -1 && errno == EAGAIN);
    p.fd = a; CHECK(poll(&p, 1, 50) == 0);
    CHECK(kage_send_to(b, "x", 1, NULL) == -1 && errno == EDESTADDRREQ);
    if (argc > 2) {
        CHECK(kage_endpoint_of(argv[1], atoi(argv[2]), &to) == 0);
        client = kage_socket(KAGE_INET6, KAGE_STREAM);
        CHECK(kage_connect(client, &to) == 0);
        CHECK(write(client, "echo\n", 5) == 5);
        CHECK(read(client, buffer, 64) == 5);
    }
    int many = 0;
    while (kage_socket(KAGE_INET6, KAGE_STREAM) >= 0) many++;
    CHECK(errno == ENFILE && many > 100);
    printf("sockets work, %d\n", many);
    return 0;
}
