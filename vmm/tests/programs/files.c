/* Files, pipes, clocks and arguments, as a program in C has them. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define CHECK(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            printf("%s: line %d, errno %d\n", #what, __LINE__, errno);                                                 \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

static int names(const char *path) {
    DIR *directory = opendir(path);
    int count = 0;
    if (directory == NULL)
        return -1;
    while (readdir(directory) != NULL)
        count++;
    closedir(directory);
    return count;
}

static char big[3 << 20], back[3 << 20];
static unsigned char random_bytes[2][256];

int main(int argc, char **argv) {
    struct stat facts, other;
    char text[64] = {0};

    CHECK(argc == 3 && strcmp(argv[1], "one") == 0 && strcmp(argv[2], "two words") == 0);
    CHECK(getenv("PWD") != NULL && getenv("NOTHING") == NULL);

    /* Both relative and absolute paths, up from the working directory too. */
    CHECK(mkdir("d", 0755) == 0 && mkdir("d", 0755) == -1 && errno == EEXIST);
    FILE *file = fopen("d/f", "w+");
    CHECK(file != NULL && fputs("first\nsecond\n", file) >= 0 && fflush(file) == 0);
    snprintf(text, sizeof text, "%s/d/f", getenv("PWD"));
    CHECK(stat(text, &facts) == 0 && facts.st_size == 13 && S_ISREG(facts.st_mode));
    CHECK(stat("d/../d/f", &other) == 0 && other.st_ino == facts.st_ino);
    CHECK(stat("..", &other) == 0 && S_ISDIR(other.st_mode));
    CHECK(stat("/etc/motd", &other) == 0 && stat("/etc", &other) == 0 && stat("/nowhere", &other) == -1);
    CHECK(errno == ENOENT);
    int outside = open("/tmp/from-program", O_CREAT | O_RDWR | O_EXCL, 0644);
    CHECK(outside >= 0 && write(outside, "tmp", 3) == 3 && close(outside) == 0);
    CHECK(open("/tmp/from-program", O_CREAT | O_RDWR | O_EXCL, 0644) == -1 && errno == EEXIST);

    /* What is open stays, whatever becomes of its name. */
    CHECK(rename("d/f", "d/g") == 0 && unlink("d/g") == 0);
    rewind(file);
    CHECK(fgets(text, sizeof text, file) != NULL && strcmp(text, "first\n") == 0);
    CHECK(fstat(fileno(file), &facts) == 0 && facts.st_size == 13);
    fclose(file);
    CHECK(rmdir("d") == 0 && rmdir("d") == -1 && errno == ENOENT);

    /* Large, at offsets, with holes, appended. */
    for (size_t at = 0; at < sizeof big; at++)
        big[at] = (char)(at * 7 + at / 251);
    int fd = open("big", O_CREAT | O_RDWR | O_TRUNC, 0644);
    size_t done = 0;
    while (done < sizeof big) {
        ssize_t count = write(fd, big + done, sizeof big - done);
        CHECK(count > 0);
        done += (size_t)count;
    }
    CHECK(lseek(fd, 0, SEEK_SET) == 0);
    for (done = 0; done < sizeof back;) {
        ssize_t count = read(fd, back + done, sizeof back - done);
        CHECK(count > 0);
        done += (size_t)count;
    }
    CHECK(memcmp(big, back, sizeof big) == 0);
    CHECK(pwrite(fd, "!", 1, 10000000) == 1 && pread(fd, text, 2, 9999999) == 2);
    CHECK(text[0] == 0 && text[1] == '!');
    CHECK(ftruncate(fd, 5) == 0 && lseek(fd, 0, SEEK_END) == 5);
    CHECK(fcntl(fd, F_SETFL, O_APPEND) == 0 && lseek(fd, 0, SEEK_SET) == 0 && write(fd, "x", 1) == 1);
    CHECK(fstat(fd, &facts) == 0 && facts.st_size == 6);
    close(fd);
    CHECK(write(fd, "x", 1) == -1 && errno == EBADF);
    CHECK(symlink("big", "link") == 0 && readlink("link", text, sizeof text) == 3);
    CHECK(lstat("link", &facts) == 0 && S_ISLNK(facts.st_mode) && stat("link", &facts) == 0);
    CHECK(link("big", "twin") == 0 && stat("twin", &facts) == 0 && facts.st_nlink == 2);
    CHECK(names(".") == 5 && names("/etc") >= 4 && names("big") == -1 && errno == ENOTDIR);
    CHECK(unlink("link") == 0 && unlink("twin") == 0 && unlink("big") == 0);

    /* Times and waiting. */
    struct timespec before, after, pause = {0, 30000000};
    CHECK(clock_gettime(CLOCK_MONOTONIC, &before) == 0 && nanosleep(&pause, NULL) == 0);
    CHECK(clock_gettime(CLOCK_MONOTONIC, &after) == 0);
    long long waited = (after.tv_sec - before.tv_sec) * 1000000000LL + after.tv_nsec - before.tv_nsec;
    CHECK(waited >= 30000000 && waited < 2000000000);
    CHECK(time(NULL) > 1700000000);
    struct pollfd input = {0, POLLIN, 0};
    CHECK(poll(&input, 1, 20) == 0);
    printf("ready\n");
    fflush(stdout);
    CHECK(poll(&input, 1, 20000) == 1 && fgets(text, sizeof text, stdin) != NULL);
    CHECK(strcmp(text, "typed\n") == 0);
    CHECK(getentropy(random_bytes[0], 256) == 0 && getentropy(random_bytes[1], 256) == 0);
    CHECK(memcmp(random_bytes[0], random_bytes[1], 256) != 0);
    fprintf(stderr, "all well\n");
    return 7;
}
