#include "rotary/rotary.h"

#include "common/parallel.h"
#include "common/vector.h"

namespace oarlock {
namespace OARLOCK_ISA {

template <bool backward>
static void rotate(const Rotary& args) {
  const int64_t half = args.dim / 2, token_size = args.heads * args.dim;
  parallel_for(args.batch * args.length, 16 * 1024 / (token_size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = args.positions ? args.positions[token] : token % args.length;
      const float *cos = args.cos + position * args.dim, *sin = args.sin + position * args.dim;
      for (int64_t head = 0; head < args.heads; ++head) {
        const float* x = args.x + token * token_size + head * args.dim;
        float* y = args.y + token * token_size + head * args.dim;
        for_columns(half, [&](auto unit, int64_t i) {
          const auto first = unit.load(x + i), second = unit.load(x + half + i);
          const auto sin_first = unit.load(sin + i), sin_second = unit.load(sin + half + i);
          const auto with_cos_first = first * unit.load(cos + i), with_cos_second = second * unit.load(cos + half + i);
          unit.store(y + i, backward ? with_cos_first + second * sin_second : with_cos_first - second * sin_first);
          unit.store(y + half + i,
                     backward ? with_cos_second - first * sin_first : with_cos_second + first * sin_second);
        });
      }
    }
  });
}

void rotary_cpu(const Rotary& args) { args.backward ? rotate<true>(args) : rotate<false>(args); }

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(rotary_cpu, Rotary)
