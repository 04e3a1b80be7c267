#include "copy_matrix/copy_matrix.h"

#include <cstring>

#include "common/vector.h"

namespace oarlock {
namespace OARLOCK_ISA {

// How elements move: equal types as they are, others through float.
template <typename From, typename To>
struct Move {
  typedef Vector Lanes;
  typedef int32_t Order __attribute__((vector_size(kLanes * sizeof(int32_t))));
  OARLOCK_MEMBER Vector get(const From* p) { return load(p); }
  OARLOCK_MEMBER void put(To* p, Vector value) { store(p, value); }
  OARLOCK_MEMBER void one(To* to, const From* from) { store1(to, load1(from)); }
};
template <typename Half>
struct Move<Half, Half> {
  typedef HalfBits Lanes;
  typedef int16_t Order __attribute__((vector_size(kLanes * sizeof(int16_t))));
  OARLOCK_MEMBER HalfBits get(const Half* p) {
    HalfBits bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
  }
  OARLOCK_MEMBER void put(Half* p, HalfBits bits) { std::memcpy(p, &bits, sizeof bits); }
  OARLOCK_MEMBER void one(Half* to, const Half* from) { *to = *from; }
};
template <>
struct Move<float, float> : Move<float, BFloat16> {
  OARLOCK_MEMBER void put(float* p, Vector value) { store(p, value); }
  OARLOCK_MEMBER void one(float* to, const float* from) { *to = *from; }
};

// kLanes x kLanes elements. Each pass merges row i with row i + kLanes / 2, element by element; after log2(kLanes) of
// them, rows are columns.
template <typename From, typename To>
OARLOCK_INLINE void turn_block(const From* from, int64_t from_stride, To* to, int64_t to_stride) {
  typedef Move<From, To> M;
  constexpr int kHalf = kLanes / 2;
  typename M::Order low, high;
  for (int i = 0; i < kHalf; ++i) {
    low[2 * i] = i, low[2 * i + 1] = kLanes + i;
    high[2 * i] = kHalf + i, high[2 * i + 1] = kLanes + kHalf + i;
  }
  typename M::Lanes rows[kLanes], merged[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = M::get(from + i * from_stride);
#pragma GCC unroll 4
  for (int width = kLanes; width > 1; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      merged[2 * i] = __builtin_shuffle(rows[i], rows[i + kHalf], low);
      merged[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kHalf], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = merged[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) M::put(to + i * to_stride, rows[i]);
}

// Tiles whose rows of `to` are a few pages, and long enough for the processor to see that they are written one by one.
constexpr int64_t kTileRows = 64, kTileCols = 256;
static_assert(kTileRows % kLanes == 0 && kTileCols % kLanes == 0, "whole blocks");

template <typename From, typename To>
static void turn(const CopyMatrix& args) {
  const From* from = static_cast<const From*>(args.from);
  To* to = static_cast<To*>(args.to);
  const int64_t whole_rows = args.rows / kLanes * kLanes, whole_cols = args.cols / kLanes * kLanes;
  for (int64_t top = 0; top < whole_rows; top += kTileRows)
    for (int64_t left = 0; left < whole_cols; left += kTileCols)
      for (int64_t j = left; j < whole_cols && j < left + kTileCols; j += kLanes)
        for (int64_t i = top; i < whole_rows && i < top + kTileRows; i += kLanes)
          turn_block(from + j * args.from_stride + i, args.from_stride, to + i * args.to_stride + j, args.to_stride);
  for (int64_t i = 0; i < args.rows; ++i)  // what is left at the right, and below
    for (int64_t j = i < whole_rows ? whole_cols : 0; j < args.cols; ++j)
      Move<From, To>::one(to + i * args.to_stride + j, from + j * args.from_stride + i);
}

template <typename From, typename To>
static void straight(const CopyMatrix& args) {
  for (int64_t i = 0; i < args.rows; ++i) {
    const From* from = static_cast<const From*>(args.from) + i * args.from_stride;
    To* to = static_cast<To*>(args.to) + i * args.to_stride;
    int64_t j = 0;
    for (; j + kLanes <= args.cols; j += kLanes) Move<From, To>::put(to + j, Move<From, To>::get(from + j));
    for (; j < args.cols; ++j) Move<From, To>::one(to + j, from + j);
  }
}

template <typename From, typename To>
static void copy(const CopyMatrix& args) {
  args.turned ? turn<From, To>(args) : straight<From, To>(args);
}

template <typename From>
static void copy_from(const CopyMatrix& args) {
  switch (args.to_type) {
    case DType::kFloat32: return copy<From, float>(args);
    case DType::kFloat16: return copy<From, Float16>(args);
    case DType::kBFloat16: return copy<From, BFloat16>(args);
  }
}

void copy_matrix_cpu(const CopyMatrix& args) {
  switch (args.from_type) {
    case DType::kFloat32: return copy_from<float>(args);
    case DType::kFloat16: return copy_from<Float16>(args);
    case DType::kBFloat16: return copy_from<BFloat16>(args);
  }
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(copy_matrix_cpu, CopyMatrix)

#if defined(OARLOCK_ISA_PLAIN)
void oarlock_copy_matrix(int64_t rows, int64_t cols, const void* from, int64_t from_stride, int32_t from_type,
                         int32_t turned, void* to, int64_t to_stride, int32_t to_type) {
  oarlock::copy_matrix_cpu({rows, cols, from, from_stride, static_cast<oarlock::DType>(from_type), turned != 0, to,
                            to_stride, static_cast<oarlock::DType>(to_type)});
}
#endif
