/* For LD_PRELOAD: a wall clock that is an hour behind. Who waits until a time of it waits as long as
 * with any other. The kernel can give a process another CLOCK_MONOTONIC (a time namespace), but not
 * another CLOCK_REALTIME.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/time.h>
#include <time.h>

enum { BEHIND_SECONDS = 3600, WALL_CLOCK_SECONDS = 1000000000 };

#define THE_REAL(name, ...) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
    return real(__VA_ARGS__)

static int read_clock(clockid_t clock, struct timespec *t) { THE_REAL(clock_gettime, clock, t); }

int clock_gettime(clockid_t clock, struct timespec *t) {
    int failed = read_clock(clock, t);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        t->tv_sec -= BEHIND_SECONDS;
    return failed;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    *t = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}

/* Deadlines of the wall clock are its own, those of CLOCK_MONOTONIC are much smaller numbers. */
static struct timespec due(const struct timespec *t) {
    return (struct timespec){t->tv_sec + (t->tv_sec > WALL_CLOCK_SECONDS ? BEHIND_SECONDS : 0),
                             t->tv_nsec};
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict t) {
    struct timespec until = due(t);
    THE_REAL(pthread_cond_timedwait, condition, mutex, &until);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict t) {
    struct timespec until = due(t);
    THE_REAL(pthread_mutex_timedlock, mutex, &until);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict t) {
    struct timespec until = due(t);
    THE_REAL(sem_timedwait, semaphore, &until);
}
