// Streams, events, captures and graphs.
#include "state.h"

#include <algorithm>

namespace {

unsigned long long begun = 0;  // captures

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
  if (Capture *capture = of(stream)->capture) return broken(capture, cudaErrorStreamCaptureUnsupported, "cudaStreamQuery");
  cudaError_t error = wait("cudaStreamQuery");
  return error || finished(of(stream)->last) ? error : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Work last;
  {
    Lock lock;
    counts["WAIT for a stream"]++;
    if (Capture *capture = of(stream)->capture) return broken(capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
    if (cudaError_t error = implicit(of(stream), "cudaStreamSynchronize")) return error;
    last = of(stream)->last;
  }
  finish(last);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  cudaError_t error = cudaSuccess;
  {
    Lock lock;
    counts["WAIT for the device"]++;
    for (auto &[id, capture] : captures) error = broken(capture, cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize");
  }
  if (!error) finish_all();
  return error;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
  Lock lock;
  cudaError_t error = launch(of(stream), "host function");
  if (!error && !of(stream)->capture) give(of(stream), [=] { call(data); });
  return error;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) { *out = reinterpret_cast<cudaEvent_t>(new Event); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { delete reinterpret_cast<Event *>(event); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *out, cudaEvent_t, cudaEvent_t) { *out = 0.01f; return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) {
  Lock lock;
  cudaError_t error = look(reinterpret_cast<Event *>(event), "cudaEventQuery");
  return error || finished(reinterpret_cast<Event *>(event)->work) ? error : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Work work;
  {
    Lock lock;
    if (cudaError_t error = look(reinterpret_cast<Event *>(event), "WAIT for an event")) return error;
    work = reinterpret_cast<Event *>(event)->work;
  }
  finish(work);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  Lock lock;
  auto *made = reinterpret_cast<Event *>(event);
  Capture *capture = of(stream)->capture;
  if (capture && !capture->broken.empty()) return fail(cudaErrorStreamCaptureInvalidated, "cudaEventRecord");
  if (cudaError_t error = implicit(of(stream), "cudaEventRecord")) return error;
  bool inside = capture && flags != cudaEventRecordExternal;
  *made = {true, inside ? capture->id : 0, of(stream)->clock, of(stream)->last};
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Lock lock;
  Stream *waiting = of(stream);
  auto *before = reinterpret_cast<Event *>(event);
  if (!before->recorded) return cudaSuccess;
  if (!before->capture) {
    if (waiting->capture && flags != cudaEventWaitExternal)
      return broken(waiting->capture, cudaErrorStreamCaptureIsolation, "a wait for what was not captured");
    if (!finished(before->work)) give(waiting, nullptr, before->work);
    return cudaSuccess;
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
}
