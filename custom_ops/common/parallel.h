// Work split over OpenMP threads.
#pragma once

#include <omp.h>

#include <cstdint>

namespace oarlock {
namespace OARLOCK_ISA {

// Calls work(begin, end) for disjoint ranges that make up [0, count), one per thread; in this thread alone when there
// are less than `grain` items for a second one (starting a team takes some microseconds).
template <typename Work>
static void parallel_for(int64_t count, int64_t grain, const Work& work) {
  const int64_t most = count / (grain < 1 ? 1 : grain), threads = omp_get_max_threads();
  const int64_t team = most < threads ? most : threads;
  if (team <= 1 || omp_in_parallel()) {
    if (count > 0) work(int64_t{0}, count);
    return;
  }
#pragma omp parallel num_threads(team)
  {
    const int64_t size = omp_get_num_threads(), rank = omp_get_thread_num();
    const int64_t begin = count * rank / size, end = count * (rank + 1) / size;
    if (begin < end) work(begin, end);
  }
}

// Calls work(row) for all rows of `width` values each, split over threads that get at least `grain` values.
template <typename Work>
static void for_rows(int64_t rows, int64_t width, int64_t grain, const Work& work) {
  parallel_for(rows, grain / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
  });
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock
