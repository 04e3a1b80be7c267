#include "training_step/cross_entropy.h"

#include "common/exp.h"
#include "common/parallel.h"

namespace oarlock {
namespace OARLOCK_ISA {

OARLOCK_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
OARLOCK_INLINE float larger(float a, float b) { return a > b ? a : b; }

static float largest(const float* values, int64_t count) {
  Vector wide = splat(values[0]);
  float one = values[0];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) wide = larger(wide, load(values + i));
  for (; i < count; ++i) one = larger(one, values[i]);
  for (int64_t lane = 0; lane < kLanes; ++lane) one = larger(one, wide[lane]);
  return one;
}

static float one_row(float* scores, int64_t classes, int64_t label, float scale, bool with_gradient) {
  const float most = largest(scores, classes), at_label = scores[label];
  Sum total;
  for_columns(classes, [&](auto unit, int64_t i) {
    const auto power = exponential(unit.load(scores + i) - most);
    total.add(power);
    unit.store(scores + i, power);
  });
  const float sum = total.total();
  if (with_gradient) {
    const float factor = scale / sum;
    for_columns(classes, [&](auto unit, int64_t i) { unit.store(scores + i, unit.load(scores + i) * factor); });
    scores[label] -= scale;
  }
  return std::log(sum) + (most - at_label);
}

void cross_entropy_cpu(const CrossEntropy& args) {
  parallel_for(args.rows, 4 * 1024 / (args.classes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* scores = args.scores + row * args.classes;
      const int64_t label = args.labels[row];
      if (label == args.ignored) {
        args.losses[row] = 0;
        for (int64_t i = 0; args.with_gradient && i < args.classes; ++i) scores[i] = 0;
      } else {
        args.losses[row] = one_row(scores, args.classes, label, args.scale, args.with_gradient);
      }
    }
  });
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(cross_entropy_cpu, CrossEntropy)
