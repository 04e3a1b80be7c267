// Copies of matrices between float types on the CPU, turned or not, for the loading of weights.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace oarlock {

// to[i][j] = from[i][j], or from[j][i] where `from` is turned. Rows (of each as it lies in memory) begin every stride
// elements. Types are rounded to nearest even; equal types keep every bit.
struct CopyMatrix {
  int64_t rows, cols;  // of `to`
  const void* from;
  int64_t from_stride;
  DType from_type;
  bool turned;
  void* to;
  int64_t to_stride;
  DType to_type;
};

// In the calling thread alone.
void copy_matrix_cpu(const CopyMatrix& args);

}  // namespace oarlock

// For callers that know no C++ (ctypes); types are DType's numbers.
extern "C" __attribute__((visibility("default"))) void oarlock_copy_matrix(
    int64_t rows, int64_t cols, const void* from, int64_t from_stride, int32_t from_type, int32_t turned, void* to,
    int64_t to_stride, int32_t to_type);
