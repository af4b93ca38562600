// Memory, which is the host's, and copies.
#include "state.h"

#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

namespace {

constexpr size_t RESERVED = size_t(1) << 29;  // as a driver takes some

struct Memory {
  size_t size;
  int kind;
};

auto &memory = *new std::map<uintptr_t, Memory>;
auto &symbols = *new std::map<const void *, void *>;
size_t used = 0;
// Copies of more than this are left out: with numbers that mean nothing they would only take the host's time.
const size_t MOST_COPIED = getenv("FAKE_CUDA_COPIES") ? strtoull(getenv("FAKE_CUDA_COPIES"), nullptr, 10) : ~size_t(0);

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
  if (late()) return cudaSuccess;  // something may still go there
  munmap(address, found->second.size);
  memory.erase(found);
  return cudaSuccess;
}

// Returns what has to be done before the call returns.
Work copied(void *to, const void *from, size_t size, Stream *stream, bool waits, cudaError_t *error) {
  Lock lock;
  const char *names[] = {"pageable", "pinned", "device"};
  int source = kind(from), target = kind(to);
  std::string what = std::string("copy ") + names[source] + " to " + names[target];
  if (stream->capture && size && !(source && target)) *error = broken(stream->capture, cudaErrorStreamCaptureUnsupported, what);
  else *error = waits ? wait(what) : launch(stream, what);
  if (*error || stream->capture || size > MOST_COPIED) return nullptr;
  auto taken = std::make_shared<std::string>();
  if (late() && !source) taken->assign(static_cast<const char *>(from), size), from = nullptr;  // CUDA takes a copy of it
  give(stream, [=] { memmove(to, from ? from : taken->data(), size); });
  return waits || !target ? stream->last : nullptr;
}

cudaError_t copy(void *to, const void *from, size_t size, cudaStream_t stream, bool waits) {
  cudaError_t error = cudaSuccess;
  finish(copied(to, from, size, of(stream), waits, &error));
  return error;
}

}  // namespace

extern "C" {

int fake_kind(const void *address) { Lock lock; return kind(address); }
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
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t stream) { return copy(to, from, size, stream, false); }
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t stream) { return copy(to, from, size, stream, false); }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) { return copy(to, from, size, nullptr, true); }
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_row, const void *from, size_t from_row, size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++)
    if (cudaError_t error = copy((char *)to + row * to_row, (const char *)from + row * from_row, width, stream, false)) return error;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  Lock lock;
  cudaError_t error = launch(of(stream), "memset");
  if (!error && !of(stream)->capture && size <= MOST_COPIED) give(of(stream), [=] { memset(to, value, size); });
  return error;
}
cudaError_t cudaGetSymbolAddress(void **out, const void *symbol) {
  Lock lock;
  if (!symbols[symbol]) symbols[symbol] = take(1 << 20, 2);
  *out = symbols[symbol];
  return cudaSuccess;
}
}
