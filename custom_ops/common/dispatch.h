// One source, several instruction sets: a kernel file is compiled once per set, with OARLOCK_ISA naming the namespace
// that its code goes to (plain, avx2, avx512). The plain object also holds the entry points, which choose at run time.
//
// A kernel file must not use templates or inline functions of the standard library (std::max, std::vector, ...): the
// linker keeps one copy of those, and that may be the one with AVX-512 in it.
#pragma once

#ifndef OARLOCK_ISA
#error "OARLOCK_ISA has to be plain, avx2 or avx512 (see custom_ops/build.py)"
#endif

namespace oarlock {

enum class Isa : int { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The best set of this CPU; the environment's OARLOCK_ISA (plain, avx2) asks for a lower one, for tests.
Isa best_isa();

}  // namespace oarlock

// OARLOCK_ENTRY(f, Args): `void oarlock::f(const Args&)` calls `void oarlock::<isa>::f(const Args&)` of the best set.
#if !defined(OARLOCK_ISA_PLAIN)
#define OARLOCK_ENTRY(function, Args)
#elif defined(__x86_64__)
#define OARLOCK_ENTRY(function, Args)                       \
  namespace oarlock {                                       \
  namespace avx2 {                                          \
  void function(const Args&);                               \
  }                                                         \
  namespace avx512 {                                        \
  void function(const Args&);                               \
  }                                                         \
  void function(const Args& args) {                         \
    switch (best_isa()) {                                   \
      case Isa::kAvx512: return avx512::function(args);     \
      case Isa::kAvx2: return avx2::function(args);         \
      case Isa::kPlain: return plain::function(args);       \
    }                                                       \
  }                                                         \
  }
#else
#define OARLOCK_ENTRY(function, Args)                                       \
  namespace oarlock {                                                       \
  void function(const Args& args) { plain::function(args); }                \
  }
#endif
