// The part of CUDA's driver that torch and Triton call: kernels are loaded and launched by name, and do nothing.
#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cuda.h>

struct Kernel {
  char name[200];
};

extern "C" {
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *out, CUdevice_attribute attribute, CUdevice device) { return CUresult(cudaDeviceGetAttribute(out, cudaDeviceAttr(attribute), device)); }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = reinterpret_cast<CUcontext>(1); return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *out, CUlimit) { *out = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **out) { *out = cudaGetErrorName(cudaError_t(error)); return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **out) { *out = cudaGetErrorName(cudaError_t(error)); return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *out, const void *) { *out = reinterpret_cast<CUmodule>(1); return CUresult(fake_wait("triton: a kernel is loaded")); }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *out, CUmodule, const char *name) {
  auto *made = new Kernel;
  snprintf(made->name, sizeof made->name, "triton: %s", name);
  *out = reinterpret_cast<CUfunction>(made);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *out, CUfunction_attribute attribute, CUfunction) {
  *out = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *out, CUfunction, const CUlaunchConfig *) { *out = 1; return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **, void **) {
  const char *name = reinterpret_cast<Kernel *>(function)->name;
  bool fits = how->gridDimX && how->gridDimY && how->gridDimZ && how->gridDimY <= 65535 && how->gridDimZ <= 65535;
  fits = fits && how->blockDimX <= 1024 && how->sharedMemBytes <= MOST_SHARED;
  return CUresult(fits ? fake_launch(how->hStream, name) : fake_fail(cudaErrorInvalidConfiguration, name));
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared, CUstream stream, void **, void **) {
  CUlaunchConfig how{};
  how.gridDimX = x, how.gridDimY = y, how.gridDimZ = z, how.blockDimX = threads, how.sharedMemBytes = shared, how.hStream = stream;
  return cuLaunchKernelEx(&how, function, nullptr, nullptr);
}

// Triton asks for every pointer whether the device can read it.
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr address) {
  int kind = fake_kind(reinterpret_cast<void *>(address));
  if (!kind) return CUresult(fake_fail(cudaErrorInvalidValue, "cuPointerGetAttribute: the device cannot read it"));
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *static_cast<CUdeviceptr *>(out) = address;
  if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *static_cast<unsigned *>(out) = kind == 2 ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  return CUDA_SUCCESS;
}
}
