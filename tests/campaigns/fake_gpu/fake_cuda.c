// A CUDA runtime for a machine without a GPU, preloaded under PyTorch's CUDA build.
//
// Memory of a "GPU" is host memory, and a stream is a thread that does its tasks in their order, each a random moment
// late. So the host runs ahead as it does with a GPU, and whatever no event orders happens in any order. Kernels are
// queued by late_kernels.py through `fake_queue`; one that CUDA itself is asked to start is an error.
//
// FAKE_GPUS: how many devices (8). FAKE_LATE_US: tasks are up to this late, and one of 16 up to ten times as late (20).
// FAKE_SEED: other moments (0). FAKE_IDLE=1: nothing is done, and tasks are only counted, to time the host alone.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MOST 64
#define FAKE(name, ...) cudaError_t name(__VA_ARGS__)

typedef struct Task {
    enum { KERNEL, COPY, FILL, RECORD, WAIT } kind;
    void (*kernel)(long);
    long token;
    void *to;
    const void *from;
    void *own;  // a copy of what pageable host memory held when the task was queued
    size_t bytes;
    int value;
    cudaEvent_t event;
    unsigned long count;
    struct Task *next;
} Task;

struct CUstream_st {
    int device, started;
    Task *first, *last;
    unsigned long queued, done;
    unsigned seed;
    struct CUstream_st *other;  // all streams form a list
};

// An event may be recorded again: `recorded` and `reached` count, and who waits, waits for the count of that moment.
struct CUevent_st {
    int device;
    unsigned long recorded, reached;
    double milliseconds;
};

typedef struct Block {
    char *begin;
    size_t bytes;
    int device;  // or -1: pinned host memory
    struct Block *next;
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // of all below; `changed` says that a task is queued or done
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct CUstream_st *streams, defaults[MOST];
static Block *blocks;
static size_t used_bytes[MOST];
static pid_t first_process;
static __thread int current;

static double number(const char *name, double otherwise) {
    const char *given = getenv(name);
    return given ? atof(given) : otherwise;
}

long fake_counts[5];  // tasks so far, by their kind

static int is_idle(void) {
    static int is = -1;
    if (is < 0) is = (int)number("FAKE_IDLE", 0);
    return is;
}

static int devices(void) { return (int)number("FAKE_GPUS", 8); }

// CUDA refuses a process that was forked after its start.
static int forked(void) {
    if (!first_process) first_process = getpid();
    return first_process != getpid();
}
#define START() if (forked()) return cudaErrorInitializationError

static double now_milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

// ---------------------------------------------------------------------------------------------------- streams

static void be_late(struct CUstream_st *stream) {
    double microseconds = number("FAKE_LATE_US", 20) * (rand_r(&stream->seed) % 1000) / 1000;
    if (rand_r(&stream->seed) % 16 == 0) microseconds *= 10;
    usleep((useconds_t)microseconds);
}

static void *work(void *given) {
    struct CUstream_st *stream = given;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!stream->first) pthread_cond_wait(&changed, &lock);
        Task *task = stream->first;
        while (task->kind == WAIT && task->event->reached < task->count) pthread_cond_wait(&changed, &lock);
        pthread_mutex_unlock(&lock);
        if (task->kind < RECORD) be_late(stream);
        if (task->kind == KERNEL) task->kernel(task->token);
        if (task->kind == COPY) memcpy(task->to, task->from, task->bytes);
        if (task->kind == FILL) memset(task->to, task->value, task->bytes);
        free(task->own);
        pthread_mutex_lock(&lock);
        if (task->kind == RECORD && task->event->reached < task->count) {
            task->event->reached = task->count;
            task->event->milliseconds = now_milliseconds();
        }
        stream->first = task->next;
        stream->done++;
        free(task);
        pthread_cond_broadcast(&changed);
    }
    return NULL;
}

static struct CUstream_st *found(cudaStream_t stream) {
    int is_default = !stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
    if (is_default) defaults[current].device = current;
    return is_default ? &defaults[current] : stream;
}

static cudaError_t queue(struct CUstream_st *stream, Task given) {
    __atomic_add_fetch(&fake_counts[given.kind], 1, __ATOMIC_RELAXED);
    if (is_idle()) {
        if (given.kind == RECORD) given.event->reached = given.count;
        return cudaSuccess;
    }
    Task *task = malloc(sizeof *task);
    *task = given;
    pthread_mutex_lock(&lock);
    if (!stream->started) {
        pthread_t thread;
        stream->started = 1;
        stream->other = streams;
        stream->seed = (unsigned)number("FAKE_SEED", 0) * 7919 + (streams ? streams->seed + 1 : 1);
        streams = stream;
        pthread_create(&thread, NULL, work, stream);
    }
    if (stream->first) stream->last->next = task;
    else stream->first = task;
    stream->last = task;
    stream->queued++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static void drain(struct CUstream_st *stream) {
    pthread_mutex_lock(&lock);
    for (unsigned long all = stream->queued; stream->done < all;) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static void drain_device(int device) {
    for (struct CUstream_st *stream = streams; stream; stream = stream->other)
        if (stream->device == device) drain(stream);
}

void fake_queue(int device, cudaStream_t stream, void (*kernel)(long), long token) {
    defaults[device].device = device;
    queue(stream ? stream : &defaults[device], (Task){.kind = KERNEL, .kernel = kernel, .token = token});
}

FAKE(cudaStreamCreateWithPriority, cudaStream_t *made, unsigned flags, int priority) {
    START();
    *made = calloc(1, sizeof **made);
    (*made)->device = current;
    return cudaSuccess;
}
FAKE(cudaStreamSynchronize, cudaStream_t stream) {
    START();
    drain(found(stream));
    return cudaSuccess;
}
FAKE(cudaStreamQuery, cudaStream_t stream) {
    return found(stream)->done == found(stream)->queued ? cudaSuccess : cudaErrorNotReady;
}
FAKE(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    START();
    return queue(found(stream), (Task){.kind = WAIT, .event = event, .count = event->recorded});
}
FAKE(cudaStreamIsCapturing, cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
FAKE(cudaStreamGetCaptureInfo, cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    return cudaStreamIsCapturing(stream, status);
}
FAKE(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode) { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------------- events

FAKE(cudaEventCreateWithFlags, cudaEvent_t *made, unsigned flags) {
    START();
    *made = calloc(1, sizeof **made);  // never freed: a queued task may still name it
    (*made)->device = current;
    return cudaSuccess;
}
FAKE(cudaEventCreate, cudaEvent_t *made) { return cudaEventCreateWithFlags(made, 0); }
FAKE(cudaEventDestroy, cudaEvent_t event) { return cudaSuccess; }
FAKE(cudaEventRecord, cudaEvent_t event, cudaStream_t stream) {
    START();
    if (found(stream)->device != event->device) return cudaErrorInvalidResourceHandle;
    return queue(found(stream), (Task){.kind = RECORD, .event = event, .count = ++event->recorded});
}
FAKE(cudaEventRecordWithFlags, cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
FAKE(cudaEventQuery, cudaEvent_t event) { return event->reached < event->recorded ? cudaErrorNotReady : cudaSuccess; }
FAKE(cudaEventSynchronize, cudaEvent_t event) {
    START();
    pthread_mutex_lock(&lock);
    for (unsigned long last = event->recorded; event->reached < last;) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
FAKE(cudaEventElapsedTime, float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    *milliseconds = (float)(end->milliseconds - begin->milliseconds);
    return cudaEventQuery(begin) || cudaEventQuery(end) ? cudaErrorNotReady : cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------- memory

static int device_of(const void *place) {  // -1: pinned, -2: any other host memory
    int device = -2;
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block; block = block->next)
        if ((char *)place >= block->begin && (char *)place < block->begin + block->bytes) device = block->device;
    pthread_mutex_unlock(&lock);
    return device;
}

static cudaError_t take(void **place, size_t bytes, int device) {
    START();
    Block *block = malloc(sizeof *block);
    *place = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pthread_mutex_lock(&lock);
    *block = (Block){*place, bytes, device, blocks};
    blocks = block;
    if (device >= 0) used_bytes[device] += bytes;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static cudaError_t give_back(void *place) {
    START();
    if (device_of(place) >= 0) drain_device(device_of(place));
    pthread_mutex_lock(&lock);
    for (Block **at = &blocks, *block; (block = *at); at = &block->next) {
        if (block->begin != place) continue;
        if (block->device >= 0) used_bytes[block->device] -= block->bytes;
        munmap(place, block->bytes);
        *at = block->next;
        free(block);
        break;
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

FAKE(cudaMalloc, void **place, size_t bytes) { return take(place, bytes, current); }
FAKE(cudaFree, void *place) { return give_back(place); }
FAKE(cudaHostAlloc, void **place, size_t bytes, unsigned flags) { return take(place, bytes, -1); }
FAKE(cudaFreeHost, void *place) { return give_back(place); }
FAKE(cudaMemGetInfo, size_t *unused, size_t *all) {
    *all = 80ull << 30;
    *unused = *all - used_bytes[current];
    return cudaSuccess;
}
FAKE(cudaPointerGetAttributes, struct cudaPointerAttributes *found, const void *place) {
    START();
    int device = device_of(place);
    *found = (struct cudaPointerAttributes){
        .type = device >= 0 ? cudaMemoryTypeDevice : device == -1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered,
        .device = device >= 0 ? device : current,
        .devicePointer = device == -2 ? NULL : (void *)place,
        .hostPointer = device >= 0 ? NULL : (void *)place,
    };
    return cudaSuccess;
}

// As with a GPU: what is in pageable memory is copied at once, and to pageable memory the host waits for the copy.
FAKE(cudaMemcpyAsync, void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    START();
    Task task = {.kind = COPY, .to = to, .from = from, .bytes = bytes};
    if (device_of(from) == -2) task.from = task.own = memcpy(malloc(bytes), from, bytes);
    queue(found(stream), task);
    if (device_of(to) == -2) drain(found(stream));
    return cudaSuccess;
}
FAKE(cudaMemsetAsync, void *place, int value, size_t bytes, cudaStream_t stream) {
    START();
    return queue(found(stream), (Task){.kind = FILL, .to = place, .value = value, .bytes = bytes});
}

// ---------------------------------------------------------------------------------------------------- devices

FAKE(cudaGetDeviceCount, int *count) {
    START();
    *count = devices();
    return cudaSuccess;
}
FAKE(cudaGetDevice, int *device) {
    START();
    *device = current;
    return cudaSuccess;
}
FAKE(cudaSetDevice, int device) {
    START();
    if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
    current = device;
    return cudaSuccess;
}
FAKE(cudaDeviceSynchronize, void) {
    START();
    drain_device(current);
    return cudaSuccess;
}
FAKE(cudaGetDeviceProperties, struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    snprintf(found->name, sizeof found->name, "fake GPU %d", device);
    found->major = 9;
    found->totalGlobalMem = 80ull << 30;
    found->multiProcessorCount = 132;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    return cudaSuccess;
}
FAKE(cudaDeviceGetAttribute, int *value, enum cudaDeviceAttr attribute, int device) {
    *value = 0;
    return cudaSuccess;
}
FAKE(cudaDeviceGetStreamPriorityRange, int *lowest, int *highest) {
    *lowest = *highest = 0;
    return cudaSuccess;
}
FAKE(cudaDeviceCanAccessPeer, int *can, int device, int other) {
    *can = 1;
    return cudaSuccess;
}
FAKE(cudaDeviceEnablePeerAccess, int device, unsigned flags) { return cudaSuccess; }
FAKE(cudaDriverGetVersion, int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
FAKE(cudaDeviceGetPCIBusId, char *found, int size, int device) {
    snprintf(found, size, "0000:%02x:00.0", device);
    return cudaSuccess;
}
FAKE(cudaGetLastError, void) { return cudaSuccess; }
FAKE(cudaPeekAtLastError, void) { return cudaSuccess; }

static cudaError_t no_kernel(void) {
    if (is_idle()) return cudaSuccess;
    fprintf(stderr, "fake GPU: a kernel of CUDA was started; late_kernels.py has nothing in its place\n");
    abort();
}
FAKE(cudaLaunchKernel, const void *kernel, dim3 grid, dim3 block, void **given, size_t bytes, cudaStream_t stream) {
    return no_kernel();
}
FAKE(__cudaLaunchKernel, cudaKernel_t kernel, dim3 grid, dim3 block, void **given, size_t bytes, cudaStream_t stream) {
    return no_kernel();
}
FAKE(cudaLaunchKernelExC, const cudaLaunchConfig_t *how, const void *kernel, void **given) { return no_kernel(); }

// The driver, libcuda.so.1, is this library too. PyTorch asks it whether a device is in use; the rest only has to exist.
FAKE(cudaGetDriverEntryPointByVersion, const char *name, void **entry, unsigned version, unsigned long long flags,
     enum cudaDriverEntryPointQueryResult *result) {
    *entry = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *entry ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}
#define NEVER_CALLED(name) int name(void) { return cudaErrorNotSupported; }
NEVER_CALLED(cuCtxGetCurrent)
NEVER_CALLED(cuCtxSetCurrent)
NEVER_CALLED(cuDeviceGet)
NEVER_CALLED(cuDeviceGetAttribute)
NEVER_CALLED(cuDevicePrimaryCtxRetain)
NEVER_CALLED(cuFuncGetAttribute)
NEVER_CALLED(cuFuncSetAttribute)
NEVER_CALLED(cuFuncSetCacheConfig)
NEVER_CALLED(cuGetErrorString)
NEVER_CALLED(cuLaunchCooperativeKernel)
NEVER_CALLED(cuLaunchKernel)
NEVER_CALLED(cuLinkAddData_v2)
NEVER_CALLED(cuLinkComplete)
NEVER_CALLED(cuLinkCreate_v2)
NEVER_CALLED(cuModuleGetFunction)
NEVER_CALLED(cuModuleLoad)
NEVER_CALLED(cuModuleLoadData)
NEVER_CALLED(cuModuleLoadDataEx)
NEVER_CALLED(cuModuleUnload)
NEVER_CALLED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NEVER_CALLED(cuPointerGetAttribute)
NEVER_CALLED(cuTensorMapEncodeTiled)
