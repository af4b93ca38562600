// CUDA's runtime without a GPU: an H200 whose memory is the host's, whose kernels do nothing, and whose rules hold.
//
// Kept are the rules of the CUDA programming guide that a program can break: what may not be asked for while a stream is
// captured, streams and events that cross a capture, captures that end with work in other streams, and sizes of launches.
// Copies copy at once. Everything is counted by name (fake_counts). What torch links besides is a stub that returns 0.
#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <pthread.h>
#include <set>
#include <string>
#include <sys/mman.h>

namespace {

constexpr size_t RESERVED = size_t(1) << 29;  // as a driver takes some

struct Capture;
using Clock = std::map<struct Stream *, long>;  // how much of each stream's captured work comes before

struct Stream {
  bool blocking;  // by the legacy stream
  int priority = 0;
  Capture *capture = nullptr;
  long work = 0;
  Clock clock;
};

struct Capture {
  Stream *origin;
  cudaStreamCaptureMode mode;
  pthread_t thread;
  unsigned long long id;
  std::set<Stream *> streams;
  size_t *nodes = new size_t(0);  // the graph, as it is handed out
  std::string broken;             // by what
};

struct Event {
  bool recorded = false;
  unsigned long long capture = 0;  // the id of the one that it was recorded in
  Clock clock;
};

struct Memory {
  size_t size;
  int kind;
};

// Never destroyed: libraries end in any order.
auto &mutex = *new std::recursive_mutex;
auto &counts = *new std::map<std::string, long>;
auto &captures = *new std::map<unsigned long long, Capture *>;  // those that go on
auto &memory = *new std::map<uintptr_t, Memory>;
auto &symbols = *new std::map<const void *, void *>;
Stream legacy{true};
size_t used = 0;
unsigned long long begun = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local struct { dim3 grid, block; size_t shared; cudaStream_t stream; } configured;
// Copies of more than this are left out: with numbers that mean nothing they would only take the host's time.
const size_t MOST_COPIED = getenv("FAKE_CUDA_COPIES") ? strtoull(getenv("FAKE_CUDA_COPIES"), nullptr, 10) : ~size_t(0);

struct Lock : std::lock_guard<std::recursive_mutex> {
  Lock() : std::lock_guard<std::recursive_mutex>(mutex) {}
};

Stream *of(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread ? &legacy : reinterpret_cast<Stream *>(stream);
}

cudaError_t fail(cudaError_t error, const std::string &what) {
  last = error;
  counts["ERROR " + std::to_string(error) + " " + what]++;
  if (getenv("FAKE_CUDA_ERRORS")) fprintf(stderr, "fake CUDA: error %d in %s\n", error, what.c_str());
  return error;
}

cudaError_t broken(Capture *capture, cudaError_t error, const std::string &what) {
  if (capture->broken.empty()) capture->broken = what;
  return fail(error, what);
}

// The legacy stream waits for every blocking stream, so it may not be used while one of these is captured.
cudaError_t implicit(Stream *stream, const std::string &what) {
  if (stream == &legacy)
    for (auto &[id, capture] : captures)
      if (capture->origin->blocking) return broken(capture, cudaErrorStreamCaptureImplicit, what);
  return cudaSuccess;
}

cudaError_t wait(const std::string &what) {
  counts[what]++;
  cudaError_t error = cudaSuccess;
  if (thread_mode == cudaStreamCaptureModeRelaxed) return error;
  for (auto &[id, capture] : captures) {
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    bool everywhere = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (everywhere || pthread_equal(capture->thread, pthread_self())) error = broken(capture, cudaErrorStreamCaptureUnsupported, what);
  }
  return error;
}

cudaError_t launch(Stream *stream, const std::string &what) {
  counts[what]++;
  if (cudaError_t error = implicit(stream, what)) return error;
  if (!stream->capture) return cudaSuccess;
  if (!stream->capture->broken.empty()) return fail(cudaErrorStreamCaptureInvalidated, what);
  stream->clock[stream] = ++stream->work;
  ++*stream->capture->nodes;
  counts["captured: " + what]++;
  return cudaSuccess;
}

int kind(const void *address) {
  auto found = memory.upper_bound(uintptr_t(address));
  if (found == memory.begin()) return 0;
  --found;
  return uintptr_t(address) < found->first + found->second.size ? found->second.kind : 0;
}

void *take(size_t size, int of_kind) {
  size = std::max<size_t>((size + 4095) & ~size_t(4095), 4096);
  void *made = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return nullptr;
  memory[uintptr_t(made)] = {size, of_kind};
  used += of_kind == 2 ? size : 0;
  return made;
}

cudaError_t allocate(void **out, size_t size, int of_kind, const char *what) {
  Lock lock;
  if (cudaError_t error = wait(what)) return error;
  bool room = of_kind != 2 || used + size + RESERVED <= DEVICE_BYTES;
  *out = room ? take(size, of_kind) : nullptr;
  return *out ? cudaSuccess : fail(cudaErrorMemoryAllocation, what);
}

cudaError_t release(void *address, const char *what) {
  Lock lock;
  if (cudaError_t error = wait(what)) return error;
  auto found = memory.find(uintptr_t(address));
  if (found == memory.end()) return cudaSuccess;
  used -= found->second.kind == 2 ? found->second.size : 0;
  munmap(address, found->second.size);
  memory.erase(found);
  return cudaSuccess;
}

cudaError_t copy(void *to, const void *from, size_t size, Stream *stream, bool waits) {
  const char *names[] = {"pageable", "pinned", "device"};
  int source = kind(from), target = kind(to);
  std::string what = std::string("copy ") + names[source] + " to " + names[target];
  if (stream->capture && size && !(source && target)) return broken(stream->capture, cudaErrorStreamCaptureUnsupported, what);
  if (cudaError_t error = waits ? wait(what) : launch(stream, what)) return error;
  if (!stream->capture && size <= MOST_COPIED) memmove(to, from, size);
  return cudaSuccess;
}

cudaError_t launch_sized(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const char *what) {
  Lock lock;
  bool fits = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535 && block.x && block.x * block.y * block.z <= 1024;
  return fits && shared <= MOST_SHARED ? launch(of(stream), what) : fail(cudaErrorInvalidConfiguration, what);
}

Capture *recorded_in(Event *event) {
  auto found = captures.find(event->capture);
  return found == captures.end() ? nullptr : found->second;
}

cudaError_t look(Event *event, const char *what) {
  if (!event->capture) return wait(what);
  Capture *capture = recorded_in(event);
  return capture ? broken(capture, cudaErrorCapturedEvent, what) : fail(cudaErrorCapturedEvent, what);
}

}  // namespace

extern "C" {

// For the other libraries, and for whoever reads the counts.
void fake_note(const char *what) { Lock lock; counts[what]++; }
cudaError_t fake_fail(cudaError_t error, const char *what) { Lock lock; return fail(error, what); }
cudaError_t fake_launch(cudaStream_t stream, const char *what) { Lock lock; return launch(of(stream), what); }
cudaError_t fake_wait(const char *what) { Lock lock; return wait(what); }
int fake_kind(const void *address) { Lock lock; return kind(address); }
void fake_reset() { Lock lock; counts.clear(); }
const char *fake_counts() {
  Lock lock;
  static auto &lines = *new std::string;
  lines.clear();
  for (auto &[what, count] : counts) lines += what + "\t" + std::to_string(count) + "\n";
  return lines.c_str();
}

// Errors.
const char *cudaGetErrorName(cudaError_t error) {
  static thread_local char name[32];
  snprintf(name, sizeof name, error ? "cudaError %d" : "cudaSuccess", error);
  return name;
}
const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaGetLastError() { cudaError_t error = last; last = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError() { return last; }

// Memory.
cudaError_t cudaMalloc(void **out, size_t size) { return allocate(out, size, 2, "cudaMalloc"); }
cudaError_t cudaMallocAsync(void **out, size_t size, cudaStream_t) { return allocate(out, size, 2, "cudaMalloc"); }
cudaError_t cudaHostAlloc(void **out, size_t size, unsigned) { return allocate(out, size, 1, "cudaHostAlloc"); }
cudaError_t cudaFree(void *address) { return release(address, "cudaFree"); }
cudaError_t cudaFreeAsync(void *address, cudaStream_t) { return release(address, "cudaFree"); }
cudaError_t cudaFreeHost(void *address) { return release(address, "cudaFreeHost"); }
cudaError_t cudaHostRegister(void *address, size_t size, unsigned) {
  Lock lock;
  if (cudaError_t error = wait("cudaHostRegister")) return error;
  memory[uintptr_t(address)] = {size, 1};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *address) {
  Lock lock;
  if (cudaError_t error = wait("cudaHostUnregister")) return error;
  memory.erase(uintptr_t(address));
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { Lock lock; *free = DEVICE_BYTES - RESERVED - used; *total = DEVICE_BYTES; return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *address) {
  int found = fake_kind(address);
  *out = {};
  out->type = found == 2 ? cudaMemoryTypeDevice : found ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  out->device = found ? 0 : -2;
  out->devicePointer = found ? const_cast<void *>(address) : nullptr;
  out->hostPointer = found == 2 ? nullptr : const_cast<void *>(address);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t stream) { Lock lock; return copy(to, from, size, of(stream), false); }
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t stream) { Lock lock; return copy(to, from, size, of(stream), false); }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) { Lock lock; return copy(to, from, size, &legacy, true); }
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_row, const void *from, size_t from_row, size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  Lock lock;
  for (size_t row = 0; row < height; row++)
    if (cudaError_t error = copy((char *)to + row * to_row, (const char *)from + row * from_row, width, of(stream), false)) return error;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  Lock lock;
  cudaError_t error = launch(of(stream), "memset");
  if (!error && !of(stream)->capture && size <= MOST_COPIED) memset(to, value, size);
  return error;
}
cudaError_t cudaGetSymbolAddress(void **out, const void *symbol) {
  Lock lock;
  if (!symbols[symbol]) symbols[symbol] = take(1 << 20, 2);
  *out = symbols[symbol];
  return cudaSuccess;
}

// Streams and events.
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
  *out = reinterpret_cast<cudaStream_t>(new Stream{flags != cudaStreamNonBlocking, priority});
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, cudaStreamDefault, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *out) { *out = of(stream)->priority; return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Lock lock;
  Capture *capture = of(stream)->capture;
  return capture ? broken(capture, cudaErrorStreamCaptureUnsupported, "cudaStreamQuery") : wait("cudaStreamQuery");
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Lock lock;
  counts["WAIT for a stream"]++;
  if (Capture *capture = of(stream)->capture) return broken(capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
  return implicit(of(stream), "cudaStreamSynchronize");
}
cudaError_t cudaDeviceSynchronize() {
  Lock lock;
  counts["WAIT for the device"]++;
  cudaError_t error = cudaSuccess;
  for (auto &[id, capture] : captures) error = broken(capture, cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize");
  return error;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
  {
    Lock lock;
    if (cudaError_t error = launch(of(stream), "host function")) return error;
  }
  if (!of(stream)->capture) call(data);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) { *out = reinterpret_cast<cudaEvent_t>(new Event); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { delete reinterpret_cast<Event *>(event); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *out, cudaEvent_t, cudaEvent_t) { *out = 0.01f; return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { Lock lock; return look(reinterpret_cast<Event *>(event), "cudaEventQuery"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { Lock lock; return look(reinterpret_cast<Event *>(event), "WAIT for an event"); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  Lock lock;
  auto *made = reinterpret_cast<Event *>(event);
  Capture *capture = of(stream)->capture;
  if (capture && !capture->broken.empty()) return fail(cudaErrorStreamCaptureInvalidated, "cudaEventRecord");
  if (cudaError_t error = implicit(of(stream), "cudaEventRecord")) return error;
  bool inside = capture && flags != cudaEventRecordExternal;
  *made = {true, inside ? capture->id : 0, of(stream)->clock};
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Lock lock;
  Stream *waiting = of(stream);
  auto *before = reinterpret_cast<Event *>(event);
  if (!before->recorded) return cudaSuccess;
  if (!before->capture) {
    if (!waiting->capture || flags == cudaEventWaitExternal) return cudaSuccess;
    return broken(waiting->capture, cudaErrorStreamCaptureIsolation, "a wait for what was not captured");
  }
  Capture *capture = recorded_in(before);
  if (!capture) return fail(cudaErrorCapturedEvent, "a wait for what was captured");
  if (!capture->broken.empty()) return fail(cudaErrorStreamCaptureInvalidated, "cudaStreamWaitEvent");
  if (waiting == &legacy) return broken(capture, cudaErrorStreamCaptureImplicit, "cudaStreamWaitEvent");
  if (waiting->capture && waiting->capture != capture) return broken(capture, cudaErrorStreamCaptureMerge, "cudaStreamWaitEvent");
  if (!waiting->capture) {
    waiting->capture = capture, waiting->work = 0, waiting->clock.clear();
    capture->streams.insert(waiting);
  }
  for (auto &[other, work] : before->clock) waiting->clock[other] = std::max(waiting->clock[other], work);
  return cudaSuccess;
}

// Captures and graphs. A graph is the number of its nodes.
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) { std::swap(*mode, thread_mode); return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  Lock lock;
  Stream *origin = of(stream);
  if (origin == &legacy || origin->capture) return fail(cudaErrorIllegalState, "cudaStreamBeginCapture");
  ++begun;
  origin->capture = captures[begun] = new Capture{origin, mode, pthread_self(), begun, {origin}};
  origin->work = 0, origin->clock.clear();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
  Lock lock;
  Stream *origin = of(stream);
  Capture *capture = origin->capture;
  *out = nullptr;
  if (!capture) return fail(cudaErrorIllegalState, "cudaStreamEndCapture");
  if (capture->origin != origin) return broken(capture, cudaErrorStreamCaptureUnmatched, "cudaStreamEndCapture");
  if (capture->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(capture->thread, pthread_self()))
    return fail(cudaErrorStreamCaptureWrongThread, "cudaStreamEndCapture");
  cudaError_t error = capture->broken.empty() ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
  for (Stream *each : capture->streams) {
    if (!error && origin->clock[each] < each->work) error = cudaErrorStreamCaptureUnjoined;
    each->capture = nullptr;
  }
  captures.erase(capture->id);
  if (error) return fail(error, "cudaStreamEndCapture, after " + capture->broken);
  *out = reinterpret_cast<cudaGraph_t>(capture->nodes);
  delete capture;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  Lock lock;
  if (cudaError_t error = implicit(of(stream), "cudaStreamGetCaptureInfo")) return error;
  Capture *capture = of(stream)->capture;
  *status = !capture ? cudaStreamCaptureStatusNone : capture->broken.empty() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture ? capture->nodes : nullptr);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) { return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr); }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long) { *out = reinterpret_cast<cudaGraphExec_t>(new size_t(*reinterpret_cast<size_t *>(graph))); fake_note("graph made"); return cudaSuccess; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags) { return cudaGraphInstantiateWithFlags(out, graph, flags); }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) { *count = *reinterpret_cast<size_t *>(graph); return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) { return fake_launch(stream, "graph launched"); }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { delete reinterpret_cast<size_t *>(graph); return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { delete reinterpret_cast<size_t *>(graph); fake_note("graph dropped"); return cudaSuccess; }
cudaError_t cudaUserObjectCreate(cudaUserObject_t *out, void *, cudaHostFn_t, unsigned, unsigned) { *out = reinterpret_cast<cudaUserObject_t>(&begun); return cudaSuccess; }

// Kernels.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) { configured = {grid, block, shared, stream}; return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared, *static_cast<cudaStream_t *>(stream) = configured.stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) { return launch_sized(grid, block, shared, stream, "kernel"); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) { return launch_sized(grid, block, shared, stream, "kernel"); }
cudaError_t cudaLaunchCooperativeKernel(const void *, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) { return launch_sized(grid, block, shared, stream, "kernel"); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *, void **) { return launch_sized(how->gridDim, how->blockDim, how->dynamicSmemBytes, how->stream, "kernel"); }
cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *function) { *out = reinterpret_cast<cudaKernel_t>(const_cast<void *>(function)); return cudaSuccess; }
void **__cudaRegisterFatBinary(void *) { return reinterpret_cast<void **>(&begun); }
}
