/* A link between two network namespaces: rate, delay and loss in each direction, for kernels without netem.

       cc -O2 -o link_emulator link_emulator.c
       link_emulator NAMESPACE NAMESPACE MBIT DELAY_MS LOSS_PERCENT QUEUE_MS

   Makes a TUN device "link0" in the first namespace and "link1" in the second, says "ready", and passes packets between
   them until it is killed: each waits for its share of the rate, then DELAY_MS (one way), and is lost with the given
   chance. A direction in which packets would wait longer than QUEUE_MS drops them, as a router's full queue does. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { LONGEST = 65536 };

struct packet {
    struct packet *next;
    long long due;
    int size;
    char data[];
};

struct direction {
    int from, to;
    long long free_at; /* when the packets that were taken so far have left */
    struct packet *first, **last;
};

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int device(const char *namespace, const char *name)
{
    char path[256];
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    snprintf(path, sizeof path, "/var/run/netns/%s", namespace);
    int space = open(path, O_RDONLY), file;
    if (space < 0 || setns(space, CLONE_NEWNET) || (file = open("/dev/net/tun", O_RDWR | O_NONBLOCK)) < 0) {
        perror(path);
        exit(1);
    }
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (ioctl(file, TUNSETIFF, &request)) {
        perror(name);
        exit(1);
    }
    close(space);
    return file;
}

static void take(struct direction *way, double ns_per_byte, long long delay, long long queue, double loss)
{
    char data[LONGEST];
    for (int count = 0; count < 64; count++) {
        int size = read(way->from, data, sizeof data);
        if (size <= 0)
            return;
        long long time = now(), start = way->free_at > time ? way->free_at : time;
        if (start - time > queue)
            continue;
        way->free_at = start + (long long)(size * ns_per_byte);
        if (drand48() < loss)
            continue;
        struct packet *packet = malloc(sizeof *packet + size);
        packet->next = NULL, packet->due = way->free_at + delay, packet->size = size;
        memcpy(packet->data, data, size);
        *way->last = packet, way->last = &packet->next;
    }
}

/* Nanoseconds until the next packet is due; -1 if there is none. */
static long long deliver(struct direction *way)
{
    long long time = now();
    for (struct packet *packet; (packet = way->first); free(packet)) {
        if (packet->due > time)
            return packet->due - time;
        if (write(way->to, packet->data, packet->size) < 0 && errno == EAGAIN)
            return 100000;
        way->first = packet->next;
        if (!way->first)
            way->last = &way->first;
    }
    return -1;
}

int main(int count, char **args)
{
    if (count != 7) {
        fprintf(stderr, "usage: %s NAMESPACE NAMESPACE MBIT DELAY_MS LOSS_PERCENT QUEUE_MS\n", args[0]);
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, 9);
    setpriority(PRIO_PROCESS, 0, -20); /* a link waits for nobody's processor */
    int ends[2] = {device(args[1], "link0"), device(args[2], "link1")};
    double ns_per_byte = 8000 / atof(args[3]), loss = atof(args[5]) / 100;
    long long delay = atof(args[4]) * 1e6, queue = atof(args[6]) * 1e6;
    struct direction ways[2];
    for (int i = 0; i < 2; i++)
        ways[i] = (struct direction){ends[i], ends[1 - i], 0, NULL, &ways[i].first};
    puts("ready");
    fflush(stdout);
    for (;;) {
        long long wait = 1000000000;
        for (int i = 0; i < 2; i++) {
            take(&ways[i], ns_per_byte, delay, queue, loss);
            long long next = deliver(&ways[i]);
            if (next >= 0 && next < wait)
                wait = next;
        }
        struct pollfd files[2] = {{ends[0], POLLIN, 0}, {ends[1], POLLIN, 0}};
        struct timespec timeout = {wait / 1000000000, wait % 1000000000};
        ppoll(files, 2, &timeout, NULL);
    }
}
