// Work that streams were given and that is not done yet, where FAKE_CUDA_LATE is set.
//
// It is done when somebody waits for it, with what has to come before it and nothing else, and of that first what was given last.
// Whoever does not wait for what he reads, or overwrites or gives away too early what is still read, finds wrong numbers. With a
// number other than 0 some is done before, too, and in any order that streams and events allow: the number decides.
#include "state.h"

#include <algorithm>
#include <cstdlib>
#include <dlfcn.h>
#include <list>
#include <random>

struct fake::Task {
  Stream *stream;
  std::vector<Work> before;
  std::function<void()> run;
  long number;
  bool done = false;
};

namespace {

const char *const SEED = getenv("FAKE_CUDA_LATE");
auto &pending = *new std::list<Work>;  // in the order in which it was given: what comes before stands in front
auto &running = *new std::recursive_mutex;
std::mt19937 chance(SEED ? strtoul(SEED, nullptr, 10) : 0);

// Tasks may need Python's lock, so whoever holds it lets it go while he waits for others' tasks.
struct WithoutPython {
  void *state = nullptr;
  WithoutPython() {
    static auto held = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    static auto leave = reinterpret_cast<void *(*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    if (held && held()) state = leave();
  }
  ~WithoutPython() {
    static auto enter = reinterpret_cast<void (*)(void *)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
    if (state) enter(state);
  }
};

// What has to be done for what is wanted, in an order that streams and events allow: what was given last first, or any.
std::vector<Work> due(std::set<Task *> wanted) {
  Lock lock;
  std::map<Stream *, std::list<Work>> streams;
  for (auto work = pending.rbegin(); work != pending.rend(); ++work)
    if (wanted.count(work->get())) {
      streams[(*work)->stream].push_front(*work);
      for (auto &before : (*work)->before) wanted.insert(before.get());
    }
  std::vector<Work> order;
  while (!streams.empty()) {
    std::vector<Stream *> ready;
    for (auto &[stream, works] : streams) {
      auto &before = works.front()->before;
      if (std::none_of(before.begin(), before.end(), [&](const Work &work) { return !work->done && wanted.count(work.get()); }))
        ready.push_back(stream);
    }
    auto newer = [&](Stream *one, Stream *other) { return streams[one].front()->number < streams[other].front()->number; };
    Stream *next = *SEED == '0' ? *std::max_element(ready.begin(), ready.end(), newer) : ready[chance() % ready.size()];
    order.push_back(streams[next].front());
    wanted.erase(order.back().get());
    streams[next].pop_front();
    if (streams[next].empty()) streams.erase(next);
  }
  return order;
}

void carry_out(const std::set<Task *> &wanted) {
  WithoutPython without;
  std::lock_guard<std::recursive_mutex> one(running);
  for (auto &work : due(wanted)) {
    if (work->run) work->run();
    Lock lock;
    work->done = true, work->before.clear();
  }
  Lock lock;
  pending.remove_if([](const Work &work) { return work->done; });
}

Task *any() {
  Lock lock;
  std::vector<Stream *> streams;
  for (auto &work : pending)
    if (std::find(streams.begin(), streams.end(), work->stream) == streams.end()) streams.push_back(work->stream);
  if (streams.empty()) return nullptr;
  std::vector<Task *> tasks;
  Stream *stream = streams[chance() % streams.size()];
  for (auto &work : pending)
    if (work->stream == stream) tasks.push_back(work.get());
  return tasks[chance() % tasks.size()];
}

}  // namespace

namespace fake {

bool late() { return SEED != nullptr; }

void give(Stream *stream, std::function<void()> run, const Work &behind) {
  if (!late()) return run();
  static long number = 0;
  auto work = std::make_shared<Task>(Task{stream, {}, run, ++number});
  for (auto &before : {stream->last, behind})
    if (before && !before->done) work->before.push_back(before);
  pending.push_back(stream->last = work);
}

bool finished(const Work &work) { return !work || work->done; }
void finish(const Work &work) { if (work) carry_out({work.get()}); }
void finish_all() {
  std::set<Task *> all;
  {
    Lock lock;
    for (auto &work : pending) all.insert(work.get());
  }
  carry_out(all);
}

}  // namespace fake

extern "C" {
// What Python does in a stream: call(number).
void fake_give(cudaStream_t stream, void (*call)(long), long number) {
  {
    Lock lock;
    give(of(stream), [=] { call(number); });
  }
  while (*SEED != '0' && chance() % 2)
    if (Task *task = any()) carry_out({task});
}
}
