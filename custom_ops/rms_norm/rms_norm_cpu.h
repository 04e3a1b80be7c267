// Norms on the CPU. The work is split over OpenMP's threads; results do not depend on their number.
#pragma once

#include "rms_norm/rms_norm.h"

namespace oarlock {

void norm_forward_cpu(const NormForward& args);
void norm_backward_cpu(const NormBackward& args);

// Floats of workspace that norm_backward_cpu needs.
int64_t norm_cpu_workspace(int64_t rows, int64_t cols, bool with_bias);

}  // namespace oarlock
