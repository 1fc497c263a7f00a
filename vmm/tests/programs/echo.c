/* An echo server for many clients at a time; a line `end` ends it. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kage_socket.h"

#define MOST 64

int main(int argc, char **argv) {
    struct pollfd waits[MOST];
    int count = 1;
    struct kage_endpoint at = {KAGE_INET6, {0}, (uint16_t)atoi(argv[argc - 1])};
    int listener = kage_socket(KAGE_INET6, KAGE_STREAM);
    if (listener < 0 || kage_bind(listener, &at) || kage_listen(listener, 16)) {
        perror("listen");
        return 1;
    }
    waits[0].fd = listener;
    waits[0].events = POLLIN;
    printf("listening\n");
    fflush(stdout);
    for (;;) {
        if (poll(waits, (nfds_t)count, -1) < 0) {
            perror("poll");
            return 1;
        }
        if (waits[0].revents && count < MOST) {
            waits[count].fd = kage_accept(listener);
            waits[count].events = POLLIN;
            waits[count].revents = 0;
            count += waits[count].fd >= 0;
        }
        for (int index = 1; index < count; index++) {
            char text[256];
            if (!waits[index].revents)
                continue;
            ssize_t length = read(waits[index].fd, text, sizeof text);
            if (length > 0 && write(waits[index].fd, text, (size_t)length) == length) {
                if (length == 4 && memcmp(text, "end\n", 4) == 0)
                    return 0;
                continue;
            }
            close(waits[index].fd);
            waits[index--] = waits[--count];
        }
    }
}
