// CUDA's runtime without a GPU: an H200 whose memory is the host's, whose kernels do nothing, and whose rules hold.
//
// Kept are the rules of the CUDA programming guide that a program can break: what may not be asked for while a stream is
// captured, streams and events that cross a capture, captures that end with work in other streams, and sizes of launches.
// Everything is counted by name (fake_counts). What torch links besides is a stub that returns 0.
//
// Here is what all have in common; memory and copies are in memory.cpp, streams, events and graphs in streams.cpp, work that
// waits to be done in late.cpp.
#include "state.h"

#include <cstdio>
#include <cstdlib>

static thread_local cudaError_t last = cudaSuccess;
static thread_local struct { dim3 grid, block; size_t shared; cudaStream_t stream; } configured;

namespace fake {

// Never destroyed: libraries end in any order.
std::recursive_mutex &mutex = *new std::recursive_mutex;
std::map<std::string, long> &counts = *new std::map<std::string, long>;
std::map<unsigned long long, Capture *> &captures = *new std::map<unsigned long long, Capture *>;
Stream &legacy = *new Stream{true};
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

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

}  // namespace fake

static cudaError_t launch_sized(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const char *what) {
  Lock lock;
  bool fits = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535 && block.x && block.x * block.y * block.z <= 1024;
  return fits && shared <= MOST_SHARED ? launch(of(stream), what) : fail(cudaErrorInvalidConfiguration, what);
}

extern "C" {

// For the other libraries, and for whoever reads the counts.
void fake_note(const char *what) { Lock lock; counts[what]++; }
cudaError_t fake_fail(cudaError_t error, const char *what) { Lock lock; return fail(error, what); }
cudaError_t fake_launch(cudaStream_t stream, const char *what) { Lock lock; return launch(of(stream), what); }
cudaError_t fake_wait(const char *what) { Lock lock; return wait(what); }
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
void **__cudaRegisterFatBinary(void *) { return reinterpret_cast<void **>(&mutex); }
}
