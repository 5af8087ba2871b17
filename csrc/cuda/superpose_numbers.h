// Numbers of one of the four floating dtypes, which a kernel learns when it runs.
#pragma once
#include "device.h"

namespace superposition {

// Numbers of one of the four floating dtypes. All threads of a kernel have the same dtypes, so that a choice by them is cheap.
struct Floats {
  const void* data;
  ScalarType dtype;
};

// f(T{}) with T the C++ type of the dtype.
template <class F>
__device__ __forceinline__ auto by_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      return f(double{});
  }
}

template <class W, class T>
__device__ __forceinline__ W widen(T x) {
  if constexpr (sizeof(T) == 2)
    return static_cast<W>(static_cast<float>(x));
  else
    return static_cast<W>(x);
}
template <class T, class W>
__device__ __forceinline__ T narrow(W x) {
  if constexpr (sizeof(T) == 2)
    return T(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

// N numbers from `at` on; zero for those from `left` on. In few loads where they lie well.
template <int N, class W>
__device__ __forceinline__ void load(const Floats& from, int64_t at, int64_t left, W* to) {
  by_dtype(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kPack = N * sizeof(T) < 16 ? N : static_cast<int>(16 / sizeof(T));
    using Packed = Pack<T, kPack>;
    const T* p = static_cast<const T*>(from.data) + at;
    if (left >= N && reinterpret_cast<uintptr_t>(p) % sizeof(Packed) == 0) {
#pragma unroll
      for (int i = 0; i < N; i += kPack) {
        const Packed packed = *reinterpret_cast<const Packed*>(p + i);
#pragma unroll
        for (int j = 0; j < kPack; j++) to[i + j] = widen<W>(packed.v[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) to[i] = i < left ? widen<W>(p[i]) : W{};
    }
  });
}
// Of N numbers the first `left`, in few stores where they lie well.
template <class T, int N>
__device__ __forceinline__ void store(T* to, int64_t left, const Pack<T, N>& from) {
  constexpr int kPack = N * sizeof(T) < 16 ? N : static_cast<int>(16 / sizeof(T));
  using Packed = Pack<T, kPack>;
  if (left >= N && reinterpret_cast<uintptr_t>(to) % sizeof(Packed) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += kPack) {
      Packed packed;
#pragma unroll
      for (int j = 0; j < kPack; j++) packed.v[j] = from.v[i + j];
      *reinterpret_cast<Packed*>(to + i) = packed;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < left) to[i] = from.v[i];
  }
}
template <class W>
__device__ __forceinline__ W load_one(const Floats& from, int64_t at) {
  return by_dtype(from.dtype, [&](auto zero) { return widen<W>(static_cast<const decltype(zero)*>(from.data)[at]); });
}
template <class W>
__device__ __forceinline__ void store_one(void* to, ScalarType dtype, int64_t at, W value) {
  by_dtype(dtype, [&](auto zero) { static_cast<decltype(zero)*>(to)[at] = narrow<decltype(zero)>(value); });
}

}  // namespace superposition
