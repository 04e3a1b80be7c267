#include "common/gemm.h"

#include <dlfcn.h>

namespace oarlock {
namespace {

enum Order { kRowMajor = 101 };
enum Transpose { kAsIs = 111, kTransposed = 112 };
using Sgemm = void (*)(Order, Transpose, Transpose, int m, int n, int k, float alpha, const float* a, int lda,
                       const float* b, int ldb, float beta, float* c, int ldc);

Sgemm find() {
  // Paddle loads it for itself alone, so it is asked for by name; it is never loaded anew.
  void* library = dlopen("libmklml_intel.so", RTLD_NOW | RTLD_NOLOAD);
  return library ? reinterpret_cast<Sgemm>(dlsym(library, "cblas_sgemm")) : nullptr;
}

Sgemm sgemm() {
  static const Sgemm found = find();
  return found;
}

}  // namespace

bool has_gemm() { return sgemm(); }

void gemm(const Gemm& args) {
  const int m = int(args.m), n = int(args.n), k = int(args.k);
  sgemm()(kRowMajor, args.transpose_a ? kTransposed : kAsIs, args.transpose_b ? kTransposed : kAsIs, m, n, k,
          args.alpha, args.a, args.transpose_a ? m : k, args.b, args.transpose_b ? k : n, args.beta, args.c, n);
}

}  // namespace oarlock
