#include "swiglu/swiglu.h"

#include "common/exp.h"
#include "common/parallel.h"

namespace oarlock {
namespace OARLOCK_ISA {

static constexpr int64_t kGrain = 4 * 1024;  // values for a second thread

void swiglu_cpu(const SwiGlu& args) {
  for_rows(args.rows, args.cols, kGrain, [&](int64_t row) {
    const float *gate = args.gate + row * args.stride, *up = args.up + row * args.stride;
    float* y = args.y + row * args.cols;
    for_columns(args.cols, [&](auto unit, int64_t i) {
      const auto g = unit.load(gate + i);
      unit.store(y + i, g / (1.0f + exponential(-g)) * unit.load(up + i));
    });
  });
}

void swiglu_backward_cpu(const SwiGluBackward& args) {
  for_rows(args.rows, args.cols, kGrain, [&](int64_t row) {
    const float *gate = args.gate + row * args.stride, *up = args.up + row * args.stride;
    const float* grad_y = args.grad_y + row * args.cols;
    float *grad_gate = args.grad_gate + row * args.stride, *grad_up = args.grad_up + row * args.stride;
    float* y = args.y ? args.y + row * args.cols : nullptr;
    for_columns(args.cols, [&](auto unit, int64_t i) {
      const auto g = unit.load(gate + i), grad = unit.load(grad_y + i);
      const auto u = unit.load(up + i), sigmoid = 1.0f / (1.0f + exponential(-g)), silu = g * sigmoid;
      unit.store(grad_up + i, grad * silu);
      unit.store(grad_gate + i, grad * u * (sigmoid + silu * (1.0f - sigmoid)));
      if (y) unit.store(y + i, silu * u);
    });
  });
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(swiglu_cpu, SwiGlu)
OARLOCK_ENTRY(swiglu_backward_cpu, SwiGluBackward)
