// A weight of which only the open values are stored, as a kernel reads it, and what the compiler must be told of such reading.
#pragma once
#include "../floats.h"
#include "device.h"

namespace {

constexpr int kSegment = kWarpSize * 32;  // columns that a warp's lanes own, a word of 32 bits each

// A compressed weight. The values of row o are [offsets[o], offsets[o + 1]); where they are in the row is either a bitmap, whole
// words of 64 bits a row, or their columns.
struct Compressed {
  const void *values, *positions;
  const int64_t* offsets;
  int64_t outputs, count;
  int inputs, row_words;  // words of 32 bits in a row of the bitmap

  struct Row {
    int64_t begin;
    int length;
  };
  __device__ Row row(int64_t o) const {
    if (o >= outputs) return {0, 0};
    const int64_t begin = min(max(offsets[o], int64_t{0}), count), end = min(max(offsets[o + 1], begin), count);
    return {begin, static_cast<int>(min(end - begin, static_cast<int64_t>(inputs)))};
  }
  // The bits of word w of a row that are columns: what is beyond the last one is not trusted to be closed.
  __device__ unsigned inside(int w) const {
    const int left = inputs - w * 32;
    return left >= 32 ? kAllLanes : left <= 0 ? 0 : (1u << left) - 1;
  }
  __device__ const uint32_t* row_bits(int64_t o) const { return static_cast<const uint32_t*>(positions) + o * row_words; }
  // Bits set in the first words of a row; every lane of a warp has the sum.
  __device__ int ones_before(const uint32_t* row_bits, int words) const {
    unsigned ones = 0;
    for (int w = threadIdx.x % kWarpSize; w < words; w += kWarpSize) ones += __popc(row_bits[w]);
    return static_cast<int>(__reduce_add_sync(kAllLanes, ones));
  }
};

// What the compiler makes of these costs instructions where there are none to spare.
#ifndef SUBNET_KERNELS_EMULATED
// Keeps it from taking a pointer apart, or making something anew, at every use.
template <class T>
__device__ __forceinline__ void keep_in_register(T*& pointer) {
  asm("" : "+l"(pointer));
}
__device__ __forceinline__ void keep_in_register(unsigned& value) { asm("" : "+r"(value)); }
template <class T>
__device__ __forceinline__ void keep_shared_in_register(T*& pointer) {
  auto at = static_cast<unsigned>(__cvta_generic_to_shared(pointer));
  asm("" : "+r"(at));
  pointer = static_cast<T*>(__cvta_shared_to_generic(at));
}
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
// 1 << bit, and 0 for -1.
__device__ __forceinline__ unsigned one_bit(int bit) {
  unsigned result;
  asm("shl.b32 %0, 1, %1;" : "=r"(result) : "r"(bit));
  return result;
}
#else
template <class T>
void keep_in_register(T&) {}
void prefetch(const void*) {}
template <class T>
void keep_shared_in_register(T*&) {}
unsigned one_bit(int bit) { return bit < 0 ? 0 : 1u << bit; }
#endif

// A value from global memory, wherever the compiler thinks that it is.
template <class T>
__device__ __forceinline__ T load_global(const T* at) {
  using Raw = std::conditional_t<sizeof(T) == 2, unsigned short, std::conditional_t<sizeof(T) == 4, float, double>>;
  union Value {
    Raw raw;
    T value;
    __device__ Value(Raw x) : raw(x) {}
  };
  return Value(__ldg(reinterpret_cast<const Raw*>(at))).value;
}

// The sum over the lanes up to this one.
__device__ __forceinline__ unsigned sum_to_lane(unsigned value) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, value, offset);
    if (static_cast<int>(threadIdx.x) % kWarpSize >= offset) value += other;
  }
  return value;
}

}  // namespace
