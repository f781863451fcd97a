// Fake GPUs for Paddle, as a device plugin (paddle/phi/backends/device_ext.h).
//
//   memory        the host's; Paddle has no kernel for the device, so each runs on the CPU with a
//                 copy of its inputs before it and of its outputs after it
//   stream        a thread that does what was queued, each piece at most FAKE_LATE_US late
//   fork          as CUDA has it: whatever was started before a fork does not work after it
//   communicator  as NCCL has it: it is made when all its ranks ask for it; each operation holds up
//                 its stream, and a send ends only with its receive
//
// FAKE_GPUS says how many there are. Ranks find each other through sockets in TMPDIR.
#include "paddle/phi/backends/device_ext.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

using Work = std::function<void()>;

int number(const char* variable, int otherwise) {
  const char* said = getenv(variable);
  return said ? atoi(said) : otherwise;
}

pid_t started_in = 0;

C_Status alive() {
  if (started_in == getpid()) return C_SUCCESS;
  fprintf(stderr, "fake GPU: this process was forked after the runtime had started\n");
  return C_FAILED;
}

[[noreturn]] void lost(const char* what) {
  fprintf(stderr, "fake GPU: %s\n", what);
  _exit(9);
}

// ------------------------------------------------------------------------------ streams and events

class Stream {
 public:
  void queue(Work work) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!queued_++) std::thread([this] { run(); }).detach();
    waiting_.push_back(std::move(work));
    changed_.notify_all();
  }

  void wait_until_done() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this, until = queued_] { return done_ >= until; });
  }

 private:
  void run() {
    const int late = number("FAKE_LATE_US", 0);
    unsigned seed = getpid();
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return !waiting_.empty(); });
      Work work = std::move(waiting_.front());
      waiting_.pop_front();
      lock.unlock();
      if (late) usleep(rand_r(&seed) % late);
      work();
      lock.lock();
      done_++;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> waiting_;
  size_t queued_ = 0, done_ = 0;
};

// They are never destroyed: their threads run until the process has ended.
std::mutex& streams_mutex = *new std::mutex;
std::deque<Stream>& streams = *new std::deque<Stream>(1);

Stream& of(C_Stream stream) {
  return stream ? *reinterpret_cast<Stream*>(stream) : streams.front();
}

class Event {
 public:
  size_t record() {
    std::lock_guard<std::mutex> lock(mutex_);
    return ++recorded_;
  }

  void reach(size_t record) {
    std::lock_guard<std::mutex> lock(mutex_);
    seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    reached_ = std::max(reached_, record);
    changed_.notify_all();
  }

  size_t last() {
    std::lock_guard<std::mutex> lock(mutex_);
    return recorded_;
  }

  void wait(size_t record) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return reached_ >= record; });
  }

  bool is_done() {
    std::lock_guard<std::mutex> lock(mutex_);
    return reached_ >= recorded_;
  }

  double seconds() {
    std::lock_guard<std::mutex> lock(mutex_);
    return seconds_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t recorded_ = 0, reached_ = 0;
  double seconds_ = 0;
};

using Shared = std::shared_ptr<Event>;  // what is queued may outlive Paddle's handle

Shared& of(C_Event event) { return *reinterpret_cast<Shared*>(event); }

// -------------------------------------------------------------------------------- the communicators

struct Communicator {
  size_t rank;
  std::vector<int> to, from;  // a socket for each direction, by rank
};

std::atomic<int> communicators_made{0};

size_t width_bytes(C_DataType type) {
  switch (type) {
    case FLOAT64: case INT64: case UINT64: return 8;
    case FLOAT32: case INT32: case UINT32: return 4;
    case FLOAT16: case BFLOAT16: case INT16: case UINT16: return 2;
    default: return 1;
  }
}

void write_all(int socket, const void* from, size_t bytes) {
  for (auto* p = static_cast<const char*>(from); bytes;) {
    ssize_t n = write(socket, p, bytes);
    if (n <= 0) lost("another rank has ended");
    p += n, bytes -= n;
  }
}

void read_all(int socket, void* into, size_t bytes) {
  for (auto* p = static_cast<char*>(into); bytes;) {
    ssize_t n = read(socket, p, bytes);
    if (n <= 0) lost("another rank has ended");
    p += n, bytes -= n;
  }
}

sockaddr_un address(const std::string& name, size_t rank) {
  sockaddr_un found{};
  found.sun_family = AF_UNIX;
  snprintf(found.sun_path, sizeof found.sun_path, "%s.%zu", name.c_str(), rank);
  return found;
}

int call(const sockaddr_un& where) {
  for (;; usleep(10000)) {  // until that rank listens
    int caller = socket(AF_UNIX, SOCK_STREAM, 0);
    if (!connect(caller, reinterpret_cast<const sockaddr*>(&where), sizeof where)) return caller;
    close(caller);
  }
}

void send_now(Communicator* with, size_t rank, const void* from, size_t bytes) {
  char ready;
  read_all(with->to[rank], &ready, 1);  // the receive has begun
  write_all(with->to[rank], from, bytes);
}

void receive_now(Communicator* with, size_t rank, void* into, size_t bytes) {
  write_all(with->from[rank], "r", 1);
  read_all(with->from[rank], into, bytes);
}

thread_local int group_depth = 0;
thread_local std::vector<std::pair<C_Stream, Work>> group;

void submit(C_Stream stream, Work work) {
  if (group_depth) {
    group.push_back({stream, std::move(work)});
  } else {
    of(stream).queue(std::move(work));
  }
}

template <class T>
void add(void* to, const void* what, size_t count, C_CCLReduceOp op) {
  T* a = static_cast<T*>(to);
  auto* b = static_cast<const T*>(what);
  for (size_t i = 0; i < count; i++) {
    a[i] = op == MAX ? std::max(a[i], b[i]) : op == MIN ? std::min(a[i], b[i]) : a[i] + b[i];
  }
}

void reduce(void* to, const void* what, size_t count, C_DataType type, C_CCLReduceOp op) {
  if (op == PRODUCT || op == AVG) lost("a reduction that nobody has needed so far");
  switch (type) {
    case FLOAT64: return add<double>(to, what, count, op);
    case FLOAT32: return add<float>(to, what, count, op);
    case INT64: return add<int64_t>(to, what, count, op);
    case INT32: return add<int32_t>(to, what, count, op);
    default: lost("a reduction of a type that nobody has needed so far");
  }
}

// ------------------------------------------------------------------------------ what Paddle calls

thread_local int current_device = 0;

C_Status on_device(const C_Device) { return alive(); }

C_Status set_device(const C_Device device) {
  current_device = device->id;
  return alive();
}

C_Status get_device(const C_Device device) {
  device->id = current_device;
  return C_SUCCESS;
}

C_Status device_count(size_t* count) {
  *count = number("FAKE_GPUS", 8);
  return C_SUCCESS;
}

C_Status device_list(size_t* ids) {
  for (int i = 0; i < number("FAKE_GPUS", 8); i++) ids[i] = i;
  return C_SUCCESS;
}

C_Status create_stream(const C_Device, C_Stream* stream) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  *stream = reinterpret_cast<C_Stream>(&streams.emplace_back());
  return alive();
}

C_Status keep_stream(const C_Device, C_Stream) { return C_SUCCESS; }

C_Status synchronize_stream(const C_Device, C_Stream stream) {
  of(stream).wait_until_done();
  return C_SUCCESS;
}

C_Status synchronize_device(const C_Device) {
  for (size_t i = 0;; i++) {
    Stream* next;
    {
      std::lock_guard<std::mutex> lock(streams_mutex);
      if (i == streams.size()) return C_SUCCESS;
      next = &streams[i];
    }
    next->wait_until_done();
  }
}

C_Status create_event(const C_Device, C_Event* event) {
  *event = reinterpret_cast<C_Event>(new Shared(new Event));
  return C_SUCCESS;
}

C_Status destroy_event(const C_Device, C_Event event) {
  delete &of(event);
  return C_SUCCESS;
}

C_Status record_event(const C_Device, C_Stream stream, C_Event event) {
  of(stream).queue([e = of(event), record = of(event)->record()] { e->reach(record); });
  return C_SUCCESS;
}

C_Status stream_wait_event(const C_Device, C_Stream stream, C_Event event) {
  of(stream).queue([e = of(event), record = of(event)->last()] { e->wait(record); });
  return C_SUCCESS;
}

C_Status synchronize_event(const C_Device, C_Event event) {
  of(event)->wait(of(event)->last());
  return C_SUCCESS;
}

C_Status query_event(const C_Device, C_Event event) {
  return of(event)->is_done() ? C_SUCCESS : C_FAILED;
}

C_Status allocate(const C_Device, void** memory, size_t bytes) {
  if (posix_memalign(memory, 512, bytes ? bytes : 1)) return C_FAILED;
  return alive();
}

C_Status deallocate(const C_Device, void* memory, size_t) {
  free(memory);
  return C_SUCCESS;
}

C_Status copy(const C_Device, void* to, const void* from, size_t bytes) {
  memcpy(to, from, bytes);
  return C_SUCCESS;
}

C_Status copy_between(const C_Device, const C_Device, void* to, const void* from, size_t bytes) {
  memcpy(to, from, bytes);
  return C_SUCCESS;
}

C_Status copy_from_host(const C_Device, C_Stream stream, void* to, const void* from, size_t bytes) {
  auto* first = static_cast<const char*>(from);  // pageable memory: CUDA stages it before it returns
  of(stream).queue([to, staged = std::vector<char>(first, first + bytes)] {
    memcpy(to, staged.data(), staged.size());
  });
  return C_SUCCESS;
}

C_Status copy_on_device(const C_Device, C_Stream stream, void* to, const void* from, size_t bytes) {
  of(stream).queue([=] { memcpy(to, from, bytes); });
  return C_SUCCESS;
}

C_Status copy_to_host(const C_Device, C_Stream stream, void* to, const void* from, size_t bytes) {
  of(stream).queue([=] { memcpy(to, from, bytes); });
  of(stream).wait_until_done();
  return C_SUCCESS;
}

C_Status fill(const C_Device, void* memory, unsigned char value, size_t bytes) {
  memset(memory, value, bytes);
  return C_SUCCESS;
}

C_Status memory_stats(const C_Device, size_t* total, size_t* free) {
  *total = *free = size_t{16} << 30;
  return C_SUCCESS;
}

C_Status chunk_bytes(const C_Device, size_t* bytes) {
  *bytes = 512;
  return C_SUCCESS;
}

C_Status communicator_name(C_CCLComm, char* name) {
  strcpy(name, "fake");
  return C_SUCCESS;
}

C_Status id_bytes(size_t* bytes) {
  *bytes = sizeof(sockaddr_un::sun_path);
  return C_SUCCESS;
}

C_Status unique_id(C_CCLRootId* id) {
  static std::atomic<int> made{0};
  const char* folder = getenv("TMPDIR");
  snprintf(reinterpret_cast<char*>(id->data), sizeof(sockaddr_un::sun_path) - 8, "%s/%d-%d",
           folder ? folder : P_tmpdir, getpid(), made++);
  return C_SUCCESS;
}

C_Status create_communicator(size_t ranks, C_CCLRootId* id, size_t rank, C_CCLComm* made) {
  std::string name = reinterpret_cast<char*>(id->data);
  auto* own = new Communicator{rank, std::vector<int>(ranks, -1), std::vector<int>(ranks, -1)};
  sockaddr_un mine = address(name, rank);
  int server = socket(AF_UNIX, SOCK_STREAM, 0);
  if (bind(server, reinterpret_cast<sockaddr*>(&mine), sizeof mine) || listen(server, 64)) {
    lost("no socket in TMPDIR");
  }
  for (size_t peer = 0; peer < ranks; peer++) {
    if (peer == rank) continue;
    own->to[peer] = call(address(name, peer));
    write_all(own->to[peer], &rank, sizeof rank);
  }
  for (size_t i = 1; i < ranks; i++) {
    int peer_socket = accept(server, nullptr, nullptr);
    size_t peer;
    read_all(peer_socket, &peer, sizeof peer);
    own->from[peer] = peer_socket;
  }
  close(server);
  unlink(mine.sun_path);
  *made = reinterpret_cast<C_CCLComm>(own);
  communicators_made++;
  return alive();
}

C_Status keep_communicator(C_CCLComm) { return C_SUCCESS; }

Communicator* of(C_CCLComm communicator) { return reinterpret_cast<Communicator*>(communicator); }

C_Status group_start() {
  group_depth++;
  return C_SUCCESS;
}

C_Status group_end() {  // all of a stream's at once
  if (--group_depth) return C_SUCCESS;
  std::map<C_Stream, std::vector<Work>> by_stream;
  for (auto& [stream, work] : group) by_stream[stream].push_back(std::move(work));
  group.clear();
  for (auto& [stream, works] : by_stream) {
    of(stream).queue([works = std::move(works)] {
      std::vector<std::thread> threads;
      for (auto& work : works) threads.emplace_back(work);
      for (auto& thread : threads) thread.join();
    });
  }
  return C_SUCCESS;
}

C_Status send(void* from, size_t count, C_DataType type, size_t rank, C_CCLComm with, C_Stream stream) {
  submit(stream, [=] { send_now(of(with), rank, from, count * width_bytes(type)); });
  return C_SUCCESS;
}

C_Status receive(void* into, size_t count, C_DataType type, size_t rank, C_CCLComm with, C_Stream stream) {
  submit(stream, [=] { receive_now(of(with), rank, into, count * width_bytes(type)); });
  return C_SUCCESS;
}

void broadcast_now(Communicator* with, size_t root, void* memory, size_t bytes) {
  if (with->rank != root) return receive_now(with, root, memory, bytes);
  for (size_t rank = 0; rank < with->to.size(); rank++) {
    if (rank != root) send_now(with, rank, memory, bytes);
  }
}

C_Status broadcast(void* memory, size_t count, C_DataType type, size_t root, C_CCLComm with, C_Stream stream) {
  submit(stream, [=] { broadcast_now(of(with), root, memory, count * width_bytes(type)); });
  return C_SUCCESS;
}

C_Status all_reduce(void* from, void* into, size_t count, C_DataType type, C_CCLReduceOp op, C_CCLComm with,
                    C_Stream stream) {
  submit(stream, [=] {  // in the order of the ranks, on the first one, as sockets.py has it
    size_t bytes = count * width_bytes(type);
    if (into != from) memmove(into, from, bytes);
    if (of(with)->rank) {
      send_now(of(with), 0, into, bytes);
    } else {
      std::vector<char> other(bytes);
      for (size_t rank = 1; rank < of(with)->from.size(); rank++) {
        receive_now(of(with), rank, other.data(), bytes);
        reduce(into, other.data(), count, type, op);
      }
    }
    broadcast_now(of(with), 0, into, bytes);
  });
  return C_SUCCESS;
}

C_Status all_gather(void* from, void* into, size_t count, C_DataType type, C_CCLComm with, C_Stream stream) {
  submit(stream, [=] {
    size_t bytes = count * width_bytes(type);
    auto piece = [&](size_t rank) { return static_cast<char*>(into) + rank * bytes; };
    memmove(piece(of(with)->rank), from, bytes);
    for (size_t root = 0; root < of(with)->to.size(); root++) {
      broadcast_now(of(with), root, piece(root), bytes);
    }
  });
  return C_SUCCESS;
}

C_Status initialize() {
  started_in = getpid();
  return C_SUCCESS;
}

C_Status finalize() { return C_SUCCESS; }

}  // namespace

// What Paddle does not ask a plugin for; for Python.
extern "C" double fake_event_seconds(C_Event event) { return of(event)->seconds(); }
extern "C" int fake_communicators() { return communicators_made; }

extern "C" void InitPlugin(CustomRuntimeParams* params) {
  PADDLE_CUSTOM_RUNTIME_CHECK_VERSION(params);
  params->device_type = const_cast<char*>("fakegpu");
  params->sub_device_type = const_cast<char*>("v1");
  C_DeviceInterface* i = params->interface;
  memset(static_cast<void*>(i), 0, sizeof *i);
  i->initialize = initialize;
  i->finalize = finalize;
  i->init_device = i->deinit_device = on_device;
  i->set_device = set_device;
  i->get_device = get_device;
  i->get_device_count = device_count;
  i->get_device_list = device_list;
  i->create_stream = create_stream;
  i->destroy_stream = keep_stream;
  i->synchronize_stream = synchronize_stream;
  i->synchronize_device = synchronize_device;
  i->create_event = create_event;
  i->destroy_event = destroy_event;
  i->record_event = record_event;
  i->query_event = query_event;
  i->synchronize_event = synchronize_event;
  i->stream_wait_event = stream_wait_event;
  i->memory_copy_h2d = i->memory_copy_d2d = i->memory_copy_d2h = copy;
  i->memory_copy_p2p = copy_between;
  i->async_memory_copy_h2d = copy_from_host;
  i->async_memory_copy_d2d = copy_on_device;
  i->async_memory_copy_d2h = copy_to_host;
  i->device_memory_allocate = i->host_memory_allocate = i->unified_memory_allocate = allocate;
  i->device_memory_deallocate = i->host_memory_deallocate = i->unified_memory_deallocate = deallocate;
  i->device_memory_set = fill;
  i->device_memory_stats = memory_stats;
  i->device_min_chunk_size = chunk_bytes;
  i->xccl_get_comm_name = communicator_name;
  i->xccl_get_unique_id_size = id_bytes;
  i->xccl_get_unique_id = unique_id;
  i->xccl_comm_init_rank = create_communicator;
  i->xccl_destroy_comm = keep_communicator;
  i->xccl_group_start = group_start;
  i->xccl_group_end = group_end;
  i->xccl_send = send;
  i->xccl_recv = receive;
  i->xccl_broadcast = broadcast;
  i->xccl_all_reduce = all_reduce;
  i->xccl_all_gather = all_gather;
}
