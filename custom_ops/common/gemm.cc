#include "common/gemm.h"

#include <dlfcn.h>

#include <algorithm>

namespace oarlock {
namespace {

enum Order { kRowMajor = 101 };
enum Transpose { kAsIs = 111, kTransposed = 112 };
using Sgemm = void (*)(Order, Transpose, Transpose, int m, int n, int k, float alpha, const float* a, int lda,
                       const float* b, int ldb, float beta, float* c, int ldc);

Sgemm find() {
  // What Paddle itself multiplies with: MKL, or what llm/oarlock/environment/matmul_library.py has put before it. They are loaded for
  // themselves alone, so they are asked for by name; neither is loaded anew.
  void* library = dlopen("oarlock_gemm.so", RTLD_NOW | RTLD_NOLOAD);
  if (!library) library = dlopen("libmklml_intel.so", RTLD_NOW | RTLD_NOLOAD);
  return library ? reinterpret_cast<Sgemm>(dlsym(library, "cblas_sgemm")) : nullptr;
}

Sgemm sgemm() {
  static const Sgemm found = find();
  return found;
}

}  // namespace

bool has_gemm() { return sgemm(); }

void gemm(const Gemm& args) {
  const int m = int(args.m), n = int(args.n), k = int(args.k), lda = args.transpose_a ? m : k,
            ldb = args.transpose_b ? k : n;
  const auto product = sgemm();
  // MKL goes over C once for each of its blocks of k. A C beyond its caches (16 MB) is made in pieces of 8 MB and more
  // that stay there: up to 15% faster for scores of a large vocabulary, 1% slower at worst, where A is not too tall.
  const bool in_pieces = m <= 2048 && args.m * args.n > 1 << 22;
  const int columns = in_pieces ? std::max(2048, (1 << 21) / m) : n;
  for (int j = 0; j < n; j += columns)
    product(kRowMajor, args.transpose_a ? kTransposed : kAsIs, args.transpose_b ? kTransposed : kAsIs, m,
            std::min(columns, n - j), k, args.alpha, args.a, lda,
            args.b + int64_t(j) * (args.transpose_b ? ldb : 1), ldb, args.beta, args.c + j, n);
}

}  // namespace oarlock
