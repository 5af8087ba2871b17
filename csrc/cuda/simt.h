// What a kernel needs of the machine that it runs on, for two machines.
//
// Compiled by nvcc this is CUDA. Compiled by a C++ compiler with SUBNET_KERNELS_EMULATED, the same kernels run on the processor:
// every CUDA thread is a fibre, a barrier or a warp's exchange switches to the next one, and fibres are taken in an order drawn
// anew for every block, so that a missing barrier shows. That library takes the place of the CPU kernels under test
// (tests/test_emulated.py): the algorithms are proven, ties, tails and all, before there is a GPU. Blocks run one after the
// other, so a kernel may not wait for another block; counting finished blocks is fine.
#pragma once
#include <cstddef>
#include <cstdint>

#ifndef SUBNET_KERNELS_EMULATED
#include <cuda_runtime.h>

#define SK_KEY CUDA
using Stream = cudaStream_t;
// The block's dynamic shared memory, as an array of T; one declaration a kernel.
#define SK_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char sk_dynamic[]; \
  T* name = reinterpret_cast<T*>(sk_dynamic)

#else
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>

#define SK_KEY CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __restrict__ __restrict
#define SK_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(simt::dynamic_shared())

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using Stream = void*;

namespace simt {
// Runs a kernel: body() once for each thread of each block.
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body);
void* dynamic_shared();
// Waits for all threads of the block; returns how many of them said yes.
int barrier(bool yes = false);
// Waits for the lanes of the mask; returns what each of the 32 lanes gave, 0 for one that is not in the mask or has ended.
const uint64_t* exchange(unsigned mask, uint64_t value);
int lane();

extern dim3 thread_index, block_index, block_size, grid_size;

template <class T>
uint64_t raw(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T cooked(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T from_lane(unsigned mask, T value, int source, bool inside) {
  const uint64_t* all = exchange(mask, raw(value));
  return inside && source >= 0 && source < 32 ? cooked<T>(all[source]) : value;
}
}  // namespace simt

#define threadIdx (simt::thread_index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)

inline void __syncthreads() { simt::barrier(); }
inline int __syncthreads_count(int yes) { return simt::barrier(yes != 0); }
inline int __syncthreads_or(int yes) { return simt::barrier(yes != 0) != 0; }
inline int __syncthreads_and(int yes) { return simt::barrier(yes == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::exchange(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = simt::lane() & ~(width - 1);
  return simt::from_lane(mask, value, first + (source & (width - 1)), true);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::lane(), source = lane - static_cast<int>(delta);
  return simt::from_lane(mask, value, source, source >= (lane & ~(width - 1)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::lane(), source = lane + static_cast<int>(delta);
  return simt::from_lane(mask, value, source, source < (lane & ~(width - 1)) + width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = simt::lane(), source = lane ^ lanes;
  return simt::from_lane(mask, value, source, source < (lane & ~(width - 1)) + width);
}
inline unsigned __ballot_sync(unsigned mask, int yes) {
  const uint64_t* all = simt::exchange(mask, yes != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= static_cast<unsigned>(all[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes == 0) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t mine = simt::raw(value), *all = simt::exchange(mask, mine);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= static_cast<unsigned>((mask >> i & 1) && all[i] == mine) << i;
  return bits;
}
template <class T, class F>
T sk_reduce(unsigned mask, T value, const F& f) {
  const uint64_t* all = simt::exchange(mask, simt::raw(value));
  T total = value;
  for (int i = 0; i < 32; i++)
    if ((mask >> i & 1) && i != simt::lane()) total = f(total, simt::cooked<T>(all[i]));
  return total;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return sk_reduce(mask, value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_or_sync(unsigned mask, T value) {
  return sk_reduce(mask, value, [](T a, T b) { return a | b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return sk_reduce(mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return sk_reduce(mask, value, [](T a, T b) { return a < b ? a : b; });
}

template <class T, class U>
T atomicAdd(T* at, U value) {
  static_assert(std::is_integral_v<T>, "sums of floats would depend on the order of the threads");
  const T before = *at;
  *at = static_cast<T>(before + static_cast<T>(value));
  return before;
}
template <class T, class U>
T atomicOr(T* at, U value) {
  const T before = *at;
  *at = before | static_cast<T>(value);
  return before;
}
template <class T, class U>
T atomicAnd(T* at, U value) {
  const T before = *at;
  *at = before & static_cast<T>(value);
  return before;
}
template <class T, class U>
T atomicMax(T* at, U value) {
  const T before = *at;
  *at = std::max(before, static_cast<T>(value));
  return before;
}
template <class T, class U>
T atomicMin(T* at, U value) {
  const T before = *at;
  *at = std::min(before, static_cast<T>(value));
  return before;
}
template <class T, class U>
T atomicExch(T* at, U value) {
  const T before = *at;
  *at = static_cast<T>(value);
  return before;
}
template <class T, class U, class V>
T atomicCAS(T* at, U expected, V value) {
  const T before = *at;
  if (before == static_cast<T>(expected)) *at = static_cast<T>(value);
  return before;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned picked = 0;
  for (int i = 0; i < 4; i++) picked |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return picked;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}
template <class T, class U>
constexpr std::common_type_t<T, U> max(T a, U b) {
  using C = std::common_type_t<T, U>;
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}
template <class T, class U>
constexpr std::common_type_t<T, U> min(T a, U b) {
  using C = std::common_type_t<T, U>;
  return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
#endif
