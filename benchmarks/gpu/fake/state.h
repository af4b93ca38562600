// What the fake runtime knows: streams, events, captures, memory; under one lock.
#pragma once
#include "runtime.h"

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <set>
#include <string>
#include <vector>

namespace fake {

struct Capture;
using Clock = std::map<struct Stream *, long>;  // how much of each stream's captured work comes before
using Work = std::shared_ptr<struct Task>;      // see late.cpp

struct Stream {
  bool blocking;  // by the legacy stream
  int priority = 0;
  Capture *capture = nullptr;
  long work = 0;
  Clock clock;
  Work last;  // what it was given last
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
  Work work;  // behind which it was recorded
};

extern std::recursive_mutex &mutex;
extern std::map<std::string, long> &counts;
extern std::map<unsigned long long, Capture *> &captures;  // those that go on
extern Stream &legacy;
extern thread_local cudaStreamCaptureMode thread_mode;

struct Lock : std::lock_guard<std::recursive_mutex> {
  Lock() : std::lock_guard<std::recursive_mutex>(mutex) {}
};

// runtime.cpp; whoever calls holds the lock
Stream *of(cudaStream_t stream);
cudaError_t fail(cudaError_t error, const std::string &what);
cudaError_t broken(Capture *capture, cudaError_t error, const std::string &what);
cudaError_t implicit(Stream *stream, const std::string &what);
cudaError_t wait(const std::string &what);
cudaError_t launch(Stream *stream, const std::string &what);

// late.cpp
bool late();
void give(Stream *stream, std::function<void()> run, const Work &behind = nullptr);  // whoever calls holds the lock
bool finished(const Work &work);                                                     // so here
void finish(const Work &work);                                                       // nobody holds it
void finish_all();                                                                   // so here

}  // namespace fake

using namespace fake;
