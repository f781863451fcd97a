/* delaynet DELAY_US MBIT NAMESPACE...: a second network between namespaces, with a delay and a rate.
 *
 * Every namespace gets a device tun0 with the address 10.78.0.1, .2, ... Each packet waits until its
 * sender's line is free (at MBIT, 0: no limit), takes its time on it, and arrives DELAY_US later. The
 * kernel's netem does the same, where the kernel has it. Prints "up" when all devices are there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MAX_HOSTS = 16, MAX_BYTES = 70000, AT_ONCE = 64 };

typedef struct Packet {
    struct Packet *next;
    int64_t due;
    int length;
    char bytes[];
} Packet;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Packets of up to 64 KB pass whole (TUN_F_TSO4), as a network card takes them. */
static int device(const char *name, int number) {
    char text[200];
    snprintf(text, sizeof text, "/var/run/netns/%s", name);
    int space = open(text, O_RDONLY), file;
    if (space < 0 || setns(space, CLONE_NEWNET)) { perror(text); exit(1); }
    close(space);
    struct ifreq request = {0};
    request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
    strcpy(request.ifr_name, "tun0");
    file = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (file < 0 || ioctl(file, TUNSETIFF, &request)) { perror("/dev/net/tun"); exit(1); }
    if (ioctl(file, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)) perror("TUNSETOFFLOAD");
    snprintf(text, sizeof text,
             "ip addr add 10.78.0.%d/24 dev tun0 && ip link set tun0 up txqueuelen 20000", number);
    if (system(text)) exit(1);
    return file;
}

int main(int count, char **words) {
    int hosts = count - 3;
    if (hosts < 2 || hosts > MAX_HOSTS) { fputs("delaynet DELAY_US MBIT NAMESPACE...\n", stderr); return 2; }
    int64_t delay = atoll(words[1]) * 1000, free_at[MAX_HOSTS] = {0};
    double mbit = atof(words[2]);
    Packet *first[MAX_HOSTS] = {0}, *last[MAX_HOSTS] = {0};
    struct pollfd files[MAX_HOSTS];
    char buffer[MAX_BYTES];
    prctl(PR_SET_TIMERSLACK, 1); /* else every wait is 50 us longer */
    for (int i = 0; i < hosts; i++) files[i] = (struct pollfd){device(words[3 + i], i + 1), POLLIN, 0};
    puts("up");
    fflush(stdout);
    for (;;) {
        int64_t t = now(), next = -1;
        for (int i = 0; i < hosts; i++)
            if (first[i] && (next < 0 || first[i]->due < next)) next = first[i]->due;
        int64_t wait = next > t ? next - t : 0;
        struct timespec limit = {wait / 1000000000, wait % 1000000000};
        ppoll(files, hosts, next < 0 ? NULL : &limit, NULL);
        for (int i = 0; i < hosts; i++)
            for (int k = 0; k < AT_ONCE && (files[i].revents & POLLIN); k++) {
                int length = read(files[i].fd, buffer, MAX_BYTES);
                if (length <= 0) break;
                unsigned char *ip = (unsigned char *)buffer + sizeof(struct virtio_net_hdr);
                int to = ip[19] - 1; /* the last number of the destination, 10.78.0.x */
                if (ip[0] >> 4 != 4 || ip[16] != 10 || ip[17] != 78 || to < 0 || to >= hosts) continue;
                Packet *packet = malloc(sizeof(Packet) + length);
                memcpy(packet->bytes, buffer, length);
                packet->length = length;
                packet->next = NULL;
                t = now();
                free_at[i] = (free_at[i] > t ? free_at[i] : t) + (mbit > 0 ? length * 8e3 / mbit : 0);
                packet->due = free_at[i] + delay;
                if (last[to]) last[to]->next = packet; else first[to] = packet;
                last[to] = packet;
            }
        t = now();
        for (int i = 0; i < hosts; i++)
            while (first[i] && first[i]->due <= t) {
                Packet *packet = first[i];
                if (write(files[i].fd, packet->bytes, packet->length) < 0 && errno == EAGAIN) break;
                first[i] = packet->next;
                if (!first[i]) last[i] = NULL;
                free(packet);
            }
    }
}
