// Which instruction set this CPU runs.
#include <cstdlib>
#include <cstring>

#define OARLOCK_ISA plain
#include "common/dispatch.h"

namespace oarlock {

static Isa find_isa() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("OARLOCK_ISA");
  const bool only_plain = wanted && !std::strcmp(wanted, "plain");
  const bool at_most_avx2 = only_plain || (wanted && !std::strcmp(wanted, "avx2"));
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && !at_most_avx2) return Isa::kAvx512;
  if (avx2 && !only_plain) return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

Isa best_isa() {
  static const Isa isa = find_isa();
  return isa;
}

}  // namespace oarlock
