// The part of cuBLAS and cuBLASLt that torch's matrix products call; types are written as what is passed.
#include "runtime.h"

#include <cstring>

struct Handle {
  cudaStream_t stream;
  int math, pointers;
};
static int product(Handle *handle) { return fake_launch(handle->stream, "matrix product") ? 13 : 0; }

extern "C" {
int cublasCreate_v2(Handle **out) { *out = new Handle{}; return 0; }
int cublasDestroy_v2(Handle *handle) { delete handle; return 0; }
int cublasSetStream_v2(Handle *handle, cudaStream_t stream) { handle->stream = stream; return 0; }
int cublasGetStream_v2(Handle *handle, cudaStream_t *out) { *out = handle->stream; return 0; }
int cublasSetMathMode(Handle *handle, int mode) { handle->math = mode; return 0; }
int cublasGetMathMode(Handle *handle, int *out) { *out = handle->math; return 0; }
int cublasSetPointerMode_v2(Handle *handle, int mode) { handle->pointers = mode; return 0; }
int cublasGetPointerMode_v2(Handle *handle, int *out) { *out = handle->pointers; return 0; }
int cublasGetVersion_v2(Handle *, int *out) { *out = 130100; return 0; }
int cublasGemmEx(Handle *handle) { return product(handle); }
int cublasSgemm_v2(Handle *handle) { return product(handle); }
int cublasGemmStridedBatchedEx(Handle *handle) { return product(handle); }
int cublasSgemmStridedBatched(Handle *handle) { return product(handle); }

int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, void *results, int *found) {
  memset(results, 0, 96);  // a cublasLtMatmulHeuristicResult_t
  *found = 1;
  return 0;
}
int cublasLtMatmul(void *, void *, const void *, const void *, void *, const void *, void *, const void *, const void *, void *, void *, void *, const void *, void *, size_t, cudaStream_t stream) {
  return fake_launch(stream, "matrix product") ? 13 : 0;
}
}
