#include "linear_cross_entropy/linear_cross_entropy.h"

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

static float exponentials(float* logits, int64_t classes, float most) {
  Sum total;
  for_columns(classes, [&](auto unit, int64_t i) {
    const auto power = exponential(unit.load(logits + i) - most);
    total.add(power);
    unit.store(logits + i, power);
  });
  return total.total();
}

constexpr int64_t kElsewhere = -1, kIgnored = -2;

// Calls work(row, its logits, its label) for all rows. The label is an index into this rank's classes, or one of the
// above.
template <typename Work>
static void for_labels(const ClassLogits& args, const Work& work) {
  for_rows(args.rows, args.classes, 4 * 1024, [&](int64_t row) {
    const int64_t label = args.labels[row], own = label - args.first;
    const bool is_own = own >= 0 && own < args.classes;
    work(row, args.logits + row * args.classes, label == args.ignored ? kIgnored : is_own ? own : kElsewhere);
  });
}

void softmax_cpu(const Softmax& args) {
  for_labels(args, [&](int64_t row, float* logits, int64_t label) {
    if (label == kIgnored) {
      args.largest[row] = args.at_label[row] = 0;
      args.sums[row] = 1;
      return;
    }
    args.at_label[row] = label == kElsewhere ? -__builtin_inff() : logits[label];
    args.largest[row] = largest(logits, args.classes);
    args.sums[row] = exponentials(logits, args.classes, args.largest[row]);
  });
}

void softmax_gradient_cpu(const SoftmaxGradient& args) {
  for_labels(args, [&](int64_t row, float* logits, int64_t label) {
    if (label == kIgnored) {
      for (int64_t i = 0; i < args.classes; ++i) logits[i] = 0;
      return;
    }
    const float factor = args.factors[row];
    for_columns(args.classes, [&](auto unit, int64_t i) { unit.store(logits + i, unit.load(logits + i) * factor); });
    if (label != kElsewhere) logits[label] -= args.scale;
  });
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(softmax_cpu, Softmax)
OARLOCK_ENTRY(softmax_gradient_cpu, SoftmaxGradient)
