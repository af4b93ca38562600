// What the fake device says of itself: an H200, on which two blocks of any kernel fit on a processor.
#include "runtime.h"

#include <cstdio>
#include <cstring>

namespace {
int nothing;  // handles point here
}

extern "C" {

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? fake_fail(cudaErrorInvalidDevice, "cudaSetDevice") : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int) { snprintf(out, size, "0000:01:00.0"); return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int) {
  cudaDeviceProp made{};
  strcpy(made.name, "no GPU, as an H200");
  made.totalGlobalMem = DEVICE_BYTES;
  made.major = 9, made.minor = 0;
  made.multiProcessorCount = 132;
  made.warpSize = 32;
  made.maxThreadsPerBlock = 1024, made.maxThreadsPerMultiProcessor = 2048, made.maxBlocksPerMultiProcessor = 32;
  made.maxThreadsDim[0] = made.maxThreadsDim[1] = 1024, made.maxThreadsDim[2] = 64;
  made.maxGridSize[0] = 2147483647, made.maxGridSize[1] = made.maxGridSize[2] = 65535;
  made.regsPerBlock = made.regsPerMultiprocessor = 65536;
  made.sharedMemPerBlock = 49152, made.sharedMemPerBlockOptin = MOST_SHARED, made.sharedMemPerMultiprocessor = 233472;
  made.reservedSharedMemPerBlock = 1024;
  made.l2CacheSize = 60 << 20;
  made.memoryBusWidth = 6144;
  made.asyncEngineCount = 3;
  made.unifiedAddressing = made.canMapHostMemory = made.concurrentKernels = made.cooperativeLaunch = made.hostRegisterSupported = 1;
  *out = made;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *out, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp all;
  cudaGetDeviceProperties(&all, device);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *out = all.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *out = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *out = 64; break;
    case cudaDevAttrMaxGridDimX: *out = all.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *out = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *out = all.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *out = all.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *out = all.sharedMemPerMultiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *out = 1024; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *out = 65536; break;
    case cudaDevAttrWarpSize: *out = 32; break;
    case cudaDevAttrClockRate: *out = 1980000; break;
    case cudaDevAttrMemoryClockRate: *out = 3201000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *out = all.memoryBusWidth; break;
    case cudaDevAttrMultiProcessorCount: *out = all.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *out = all.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *out = all.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *out = 32; break;
    case cudaDevAttrComputeCapabilityMajor: *out = all.major; break;
    case cudaDevAttrAsyncEngineCount: *out = 3; break;
    case cudaDevAttrConcurrentKernels: case cudaDevAttrUnifiedAddressing: case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrStreamPrioritiesSupported: *out = 1; break;
    default: *out = 0;
  }
  return cudaSuccess;
}

// Kernels, of which nothing is known.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *) {
  *out = {};
  out->maxThreadsPerBlock = 1024, out->numRegs = 32, out->ptxVersion = out->binaryVersion = 90, out->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *, int, size_t, unsigned) { *out = 2; return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *out, const void *, int, size_t) { *out = 2; return cudaSuccess; }
cudaError_t cudaLibraryLoadData(cudaLibrary_t *out, const void *, cudaJitOption *, void **, unsigned, cudaLibraryOption *, void **, unsigned) { *out = reinterpret_cast<cudaLibrary_t>(&nothing); return cudaSuccess; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t *out, cudaLibrary_t, const char *) { *out = reinterpret_cast<cudaKernel_t>(&nothing); return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **out, unsigned, unsigned long long, cudaDriverEntryPointQueryResult *found) {
  *out = nullptr;
  if (found) *found = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
