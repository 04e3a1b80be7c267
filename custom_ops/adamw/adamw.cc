#include "adamw/adamw.h"

#include <cmath>

#include "common/parallel.h"
#include "common/vector.h"

namespace oarlock {
namespace OARLOCK_ISA {

OARLOCK_INLINE Vector root(Vector x) {
#if defined(OARLOCK_ISA_AVX512)
  return (Vector)_mm512_sqrt_ps((__m512)x);
#elif defined(OARLOCK_ISA_AVX2)
  return (Vector)_mm256_sqrt_ps((__m256)x);
#else
  for (int64_t i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
OARLOCK_INLINE float root(float x) { return std::sqrt(x); }

static void update(const AdamW& args, const AdamWTensor& tensor, int64_t begin, int64_t end) {
  const float correction = std::sqrt(1 - tensor.beta2_power), epsilon = args.epsilon * correction;
  const float rate = tensor.learning_rate * correction / (1 - tensor.beta1_power);
  const float kept = 1 - tensor.learning_rate * tensor.decay;
  const float beta1 = args.beta1, beta2 = args.beta2;
  float *parameter = tensor.parameter + begin, *moment1 = tensor.moment1 + begin, *moment2 = tensor.moment2 + begin;
  const float* gradient = tensor.gradient + begin;
  for_columns(end - begin, [&](auto unit, int64_t i) {
    const auto g = unit.load(gradient + i);
    const auto m = unit.load(moment1 + i) * beta1 + g * (1 - beta1);
    const auto v = unit.load(moment2 + i) * beta2 + g * g * (1 - beta2);
    unit.store(moment1 + i, m);
    unit.store(moment2 + i, v);
    unit.store(parameter + i, unit.load(parameter + i) * kept - m / (root(v) + epsilon) * rate);
  });
}

void adamw_cpu(const AdamW& args) {
  int64_t total = 0;
  for (int64_t t = 0; t < args.num_tensors; ++t) total += args.tensors[t].count;
  parallel_for(total, 16 * 1024, [&](int64_t begin, int64_t end) {  // of all tensors, laid end to end
    int64_t first = 0;
    for (int64_t t = 0; t < args.num_tensors; ++t) {
      const int64_t count = args.tensors[t].count;
      const int64_t from = begin > first ? begin - first : 0, to = end - first < count ? end - first : count;
      if (from < to) update(args, args.tensors[t], from, to);
      first += count;
    }
  });
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(adamw_cpu, AdamW)
