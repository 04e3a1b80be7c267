// MKL's two products of float matrices, by oneDNN or by MKL itself: a library that stands before MKL. Whoever looks for
// cblas_sgemm in it finds these, and all else in the MKL that it is linked to. llm/oarlock/environment/matmul_library.py puts it there, on
// processors that are not Intel's: Paddle's MKL is of 2019 and runs its slowest code on them.
#include <dlfcn.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

// oneDNN's (https://oneapi-src.github.io/oneDNN, dnnl.h); the headers in Paddle's wheel are stubs. Row-major.
extern "C" int dnnl_sgemm(char transa, char transb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);

namespace {

enum Order : int { kRowMajor = 101, kColumnMajor = 102 };  // as in cblas.h
enum Transpose : int { kAsIs = 111, kTransposed = 112, kConjugate = 113 };

using Sgemm = void (*)(Order, Transpose, Transpose, int m, int n, int k, float alpha, const float* a, int lda,
                       const float* b, int ldb, float beta, float* c, int ldc);
using SgemmBatch = void (*)(Order, const Transpose*, const Transpose*, const int* m, const int* n, const int* k,
                            const float* alpha, const float** a, const int* lda, const float** b, const int* ldb,
                            const float* beta, float** c, const int* ldc, int groups, const int* sizes);

// MKL's own: Paddle has loaded it.
template <typename Function>
Function of_mkl(const char* name) {
  void* library = dlopen("libmklml_intel.so", RTLD_NOW | RTLD_NOLOAD);
  return library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
}

std::atomic<bool> uses_mkl{false};

// A team of threads costs more than so little work: about 10 microseconds for one of them.
constexpr double kLeastForTwo = 1 << 20;  // multiplications

std::atomic<int64_t> calls{0};

// In this thread alone.
class Alone {
 public:
  explicit Alone(bool is_alone) : before_(is_alone ? omp_get_max_threads() : 0) {
    if (before_ > 1) omp_set_num_threads(1);
  }
  ~Alone() {
    if (before_ > 1) omp_set_num_threads(before_);
  }
  Alone(const Alone&) = delete;

 private:
  int before_;
};

int product(Order order, Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
            const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  if (order == kColumnMajor)  // C^T = B^T A^T, by rows
    return product(kRowMajor, transpose_b, transpose_a, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
  if (m == 0 || n == 0) return 0;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = beta == 0 ? 0 : beta * c[i * ldc + j];
    return 0;
  }
  return dnnl_sgemm(transpose_a == kAsIs ? 'N' : 'T', transpose_b == kAsIs ? 'N' : 'T', m, n, k, alpha, a, lda, b, ldb,
                    beta, c, ldc);
}

void check(int status) {
  if (status) throw std::runtime_error("oneDNN refused a product: dnnl_sgemm gave status " + std::to_string(status));
}

}  // namespace

// Which of the two makes them from now on.
EXPORTED void oarlock_multiply_by_mkl(int yes) { uses_mkl = yes; }
EXPORTED int oarlock_multiplies_by_mkl() { return uses_mkl; }

// How many there have been: whether Paddle asks here.
EXPORTED int64_t oarlock_num_products() { return calls; }

EXPORTED void cblas_sgemm(Order order, Transpose transpose_a, Transpose transpose_b, int m, int n, int k, float alpha,
                          const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  calls.fetch_add(1, std::memory_order_relaxed);
  if (uses_mkl) {
    static const auto mkl = of_mkl<Sgemm>("cblas_sgemm");
    return mkl(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
  const Alone alone(double(m) * n * k < kLeastForTwo);
  check(product(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc));
}

// Groups of products of one shape each. Small ones go to a thread each, one after the other where they are large.
EXPORTED void cblas_sgemm_batch(Order order, const Transpose* transpose_a, const Transpose* transpose_b, const int* m,
                                const int* n, const int* k, const float* alpha, const float** a, const int* lda,
                                const float** b, const int* ldb, const float* beta, float** c, const int* ldc,
                                int groups, const int* sizes) {
  calls.fetch_add(1, std::memory_order_relaxed);
  if (uses_mkl) {
    static const auto mkl = of_mkl<SgemmBatch>("cblas_sgemm_batch");
    return mkl(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, groups, sizes);
  }
  int64_t first = 0;
  for (int g = 0; g < groups; first += sizes[g++]) {
    const int64_t count = sizes[g];
    const auto one = [&](int64_t i) {
      return product(order, transpose_a[g], transpose_b[g], m[g], n[g], k[g], alpha[g], a[first + i], lda[g],
                     b[first + i], ldb[g], beta[g], c[first + i], ldc[g]);
    };
    const double work = double(m[g]) * n[g] * k[g];
    int status = 0;
    if (count >= omp_get_max_threads() && work * count >= kLeastForTwo && !omp_in_parallel()) {
#pragma omp parallel for schedule(static) reduction(max : status)
      for (int64_t i = 0; i < count; ++i) status = std::max(status, one(i));
    } else {
      const Alone alone(work < kLeastForTwo);
      for (int64_t i = 0; i < count; ++i) status = std::max(status, one(i));
    }
    check(status);
  }
}
