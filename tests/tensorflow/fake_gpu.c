/* GPUs that are not there, for TensorFlow: a pluggable device (StreamExecutor's C API) of the type GPU.

   A GPU's memory is the host's, its streams do at once what they are told, and it has no kernel of its own. Variables,
   copies and messages are therefore on it, and all computing is on the CPU, by soft placement. FAKE_GPUS says how many. */

#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/experimental/stream_executor/stream_executor.h"

#define DEVICE const SP_Device *device
#define STATUS TF_Status *status
#define MEMORY SP_DeviceMemoryBase
#define OK TF_SetStatus(status, TF_OK, "")

static const int64_t TOTAL_BYTES = 1ll << 33;
static int64_t in_use[64];

static void allocate(DEVICE, uint64_t size, int64_t space, MEMORY *memory) {
  memory->struct_size = SP_DEVICE_MEMORY_BASE_STRUCT_SIZE;
  memory->opaque = aligned_alloc(256, (size + 255) / 256 * 256);
  memory->size = size;
  in_use[device->ordinal] += size;
}

static void deallocate(DEVICE, MEMORY *memory) {
  in_use[device->ordinal] -= memory->size;
  free(memory->opaque);
}

static void *host_allocate(DEVICE, uint64_t size) { return aligned_alloc(64, (size + 63) / 64 * 64); }
static void host_free(DEVICE, void *memory) { free(memory); }

static TF_Bool no_statistics(DEVICE, SP_AllocatorStats *made) { return 0; }

static TF_Bool memory_usage(DEVICE, int64_t *available, int64_t *total) {
  *total = TOTAL_BYTES;
  *available = TOTAL_BYTES - in_use[device->ordinal];
  return 1;
}

/* Streams and events: all is done at once, so none has to wait for another. */
static void new_stream(DEVICE, SP_Stream *stream, STATUS) { *stream = malloc(1); OK; }
static void free_stream(DEVICE, SP_Stream stream) { free(stream); }
static void stream_after(DEVICE, SP_Stream one, SP_Stream other, STATUS) { OK; }
static void stream_nothing(DEVICE, SP_Stream stream, STATUS) { OK; }
static void new_event(DEVICE, SP_Event *event, STATUS) { *event = malloc(1); OK; }
static void free_event(DEVICE, SP_Event event) { free(event); }
static SE_EventStatus event_status(DEVICE, SP_Event event) { return SE_EVENT_COMPLETE; }
static void stream_event(DEVICE, SP_Stream stream, SP_Event event, STATUS) { OK; }
static void wait_for_event(DEVICE, SP_Event event, STATUS) { OK; }
static void wait_for_all(DEVICE, STATUS) { OK; }
static void new_timer(DEVICE, SP_Timer *timer, STATUS) { *timer = malloc(1); OK; }
static void free_timer(DEVICE, SP_Timer timer) { free(timer); }
static void stream_timer(DEVICE, SP_Stream stream, SP_Timer timer, STATUS) { OK; }
static uint64_t nanoseconds(SP_Timer timer) { return 0; }

static TF_Bool call_host(DEVICE, SP_Stream stream, SE_StatusCallbackFn call, void *argument) {
  TF_Status *status = TF_NewStatus();
  call(argument, status);
  TF_DeleteStatus(status);
  return 1;
}

/* Copies, with a stream and without. */
static void to_host_now(DEVICE, void *to, const MEMORY *from, uint64_t n, STATUS) { memcpy(to, from->opaque, n); OK; }
static void to_device_now(DEVICE, MEMORY *to, const void *from, uint64_t n, STATUS) { memcpy(to->opaque, from, n); OK; }
static void between_now(DEVICE, MEMORY *to, const MEMORY *from, uint64_t n, STATUS) { memmove(to->opaque, from->opaque, n); OK; }
static void to_host(DEVICE, SP_Stream stream, void *to, const MEMORY *from, uint64_t n, STATUS) { memcpy(to, from->opaque, n); OK; }
static void to_device(DEVICE, SP_Stream stream, MEMORY *to, const void *from, uint64_t n, STATUS) { memcpy(to->opaque, from, n); OK; }
static void between(DEVICE, SP_Stream stream, MEMORY *to, const MEMORY *from, uint64_t n, STATUS) { memmove(to->opaque, from->opaque, n); OK; }
static void zero(DEVICE, SP_Stream stream, MEMORY *to, uint64_t n, STATUS) { memset(to->opaque, 0, n); OK; }
static void set(DEVICE, SP_Stream stream, MEMORY *to, uint8_t byte, uint64_t n, STATUS) { memset(to->opaque, byte, n); OK; }

static void set32(DEVICE, SP_Stream stream, MEMORY *to, uint32_t word, uint64_t n, STATUS) {
  for (uint64_t i = 0; i < n / 4; i++) ((uint32_t *)to->opaque)[i] = word;
  OK;
}

/* What TensorFlow asks of the plugin itself. */
static void count(const SP_Platform *platform, int *devices, STATUS) { *devices = atoi(getenv("FAKE_GPUS")); OK; }

static void new_device(const SP_Platform *platform, SE_CreateDeviceParams *made, STATUS) {
  made->device->struct_size = SP_DEVICE_STRUCT_SIZE;
  made->device->ordinal = made->ordinal;
  OK;
}

static int32_t numa_node(DEVICE) { return 0; }
static void new_device_functions(const SP_Platform *platform, SE_CreateDeviceFnsParams *made, STATUS) {
  made->device_fns->get_numa_node = numa_node;
  OK;
}

static void new_executor(const SP_Platform *platform, SE_CreateStreamExecutorParams *made, STATUS) {
  *made->stream_executor = (SP_StreamExecutor){
      .struct_size = SP_STREAMEXECUTOR_STRUCT_SIZE,
      .allocate = allocate, .deallocate = deallocate,
      .host_memory_allocate = host_allocate, .host_memory_deallocate = host_free, .device_memory_usage = memory_usage,
      .get_allocator_stats = no_statistics,
      .create_stream = new_stream, .destroy_stream = free_stream, .create_stream_dependency = stream_after,
      .get_stream_status = stream_nothing, .block_host_until_done = stream_nothing,
      .create_event = new_event, .destroy_event = free_event, .get_event_status = event_status,
      .record_event = stream_event, .wait_for_event = stream_event,
      .block_host_for_event = wait_for_event, .synchronize_all_activity = wait_for_all,
      .create_timer = new_timer, .destroy_timer = free_timer, .start_timer = stream_timer, .stop_timer = stream_timer,
      .memcpy_dtoh = to_host, .memcpy_htod = to_device, .memcpy_dtod = between,
      .sync_memcpy_dtoh = to_host_now, .sync_memcpy_htod = to_device_now, .sync_memcpy_dtod = between_now,
      .mem_zero = zero, .memset = set, .memset32 = set32, .host_callback = call_host};
  OK;
}

static void new_timer_functions(const SP_Platform *platform, SP_TimerFns *made, STATUS) { made->nanoseconds = nanoseconds; OK; }
static void free_device(const SP_Platform *platform, SP_Device *device) {}
static void free_device_functions(const SP_Platform *platform, SP_DeviceFns *functions) {}
static void free_executor(const SP_Platform *platform, SP_StreamExecutor *executor) {}
static void free_timer_functions(const SP_Platform *platform, SP_TimerFns *functions) {}
static void free_platform(SP_Platform *platform) {}
static void free_platform_functions(SP_PlatformFns *functions) {}

void SE_InitPlugin(SE_PlatformRegistrationParams *const made, TF_Status *const status) {
  made->platform->struct_size = SP_PLATFORM_STRUCT_SIZE;
  made->platform->name = "FAKE_GPU";
  made->platform->type = "GPU";
  made->platform->use_bfc_allocator = 1;
  *made->platform_fns = (SP_PlatformFns){
      .struct_size = SP_PLATFORM_FNS_STRUCT_SIZE, .get_device_count = count,
      .create_device = new_device, .destroy_device = free_device,
      .create_device_fns = new_device_functions, .destroy_device_fns = free_device_functions,
      .create_stream_executor = new_executor, .destroy_stream_executor = free_executor,
      .create_timer_fns = new_timer_functions, .destroy_timer_fns = free_timer_functions};
  made->destroy_platform = free_platform;
  made->destroy_platform_fns = free_platform_functions;
  OK;
}

void TF_InitKernel(void) {}
