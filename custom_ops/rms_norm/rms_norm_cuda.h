// Norms on a GPU, behind an interface without CUDA's types. Results are the same every time (no atomics).
#pragma once

#include "rms_norm/rms_norm.h"

namespace oarlock {

extern "C" {

// On `stream` (a cudaStream_t) of the current device. They return a cudaError_t: 0 is success.
int norm_forward_cuda(const NormForward& args, void* stream);
int norm_backward_cuda(const NormBackward& args, void* stream);

// Floats of workspace that norm_backward_cuda needs on the current device.
int64_t norm_cuda_workspace(int64_t rows, int64_t cols, bool with_bias);

// Of a code that they returned.
const char* norm_cuda_error(int code);

}  // extern "C"

}  // namespace oarlock
