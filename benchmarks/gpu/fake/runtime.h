// What the fake libraries share; see runtime.cpp.
#pragma once
#include <cuda_runtime_api.h>

extern "C" {
void fake_note(const char *what);                               // counts it
cudaError_t fake_fail(cudaError_t error, const char *what);     // counts it as an error and returns it
cudaError_t fake_launch(cudaStream_t stream, const char *what);  // work in a stream, recorded where it is captured
cudaError_t fake_wait(const char *what);                        // what may wait for the device, refused while something is captured
int fake_kind(const void *address);                             // 0: the host's own, 1: pinned, 2: the device's
}

constexpr size_t DEVICE_BYTES = size_t(139) << 30;
constexpr size_t MOST_SHARED = 232448;  // bytes of shared memory that a block of an H200 may take
