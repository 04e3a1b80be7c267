// Loads, conversions and sums of a block of threads, for CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace oarlock {
namespace cuda {

// N elements that are loaded and stored at once, 16 bytes at a time.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <typename T, int N>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Has the compiler take the pack as a new value: nothing that was computed from it is kept in registers.
template <typename T, int N>
__device__ __forceinline__ void forget(Pack<T, N>& pack) {
  if constexpr (sizeof(pack) % 4 == 0) {
    uint32_t* words = reinterpret_cast<uint32_t*>(&pack);
#pragma unroll
    for (int i = 0; i < int(sizeof(pack) / 4); ++i) asm volatile("" : "+r"(words[i]));
  }
}

constexpr int kMaxWarps = 16;  // of the threads that share a row
constexpr int kMaxThreads = 32 * kMaxWarps;

// Sums over the threads of a row (blockDim.x of them, a multiple of 32), given to all, in a fixed order. The two buffers
// take turns, so that one barrier a sum is enough.
struct RowSums {
  float (*buffers)[kMaxWarps];  // [2][kMaxWarps], shared
  int turn = 0;

  __device__ __forceinline__ explicit RowSums(float (*shared)[kMaxWarps]) : buffers(shared) {}

  __device__ __forceinline__ float operator()(float value) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    if (blockDim.x == 32) return value;
    float* buffer = buffers[turn];
    turn ^= 1;
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += buffer[warp];
    return total;
  }
};

}  // namespace cuda
}  // namespace oarlock
