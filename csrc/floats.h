// Tiles of the floating dtypes: converted to the type that an op computes in and back, with the rounding of PyTorch.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "tensors.h"

// The dtype of a tensor of one of the four floating dtypes that the ops compute in.
inline ScalarType floating(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
      ": ", name, " must be float64, float32, float16 or bfloat16");
  return dtype;
}

// What PyTorch computes in when the two meet.
inline ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
constexpr ScalarType kDtypeOf = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// Up to a tile of any floating dtype to T (float, or double where one of the tensors is double) and back, rounded as PyTorch
// does.
template <class T, class From>
static void widen(const void* from, T* to, int64_t begin, int64_t n) {
  const From* p = static_cast<const From*>(from) + begin;
  for (int64_t i = 0; i < n; i++) to[i] = static_cast<T>(p[i]);
}
template <class T>
static void read_tile(ScalarType dtype, const void* from, T* to, int64_t begin, int64_t n) {
  switch (dtype) {
    case ScalarType::Double:
      return widen<T, double>(from, to, begin, n);
    case ScalarType::Float:
      return widen<T, float>(from, to, begin, n);
    case ScalarType::Half:
      return widen<T, torch::headeronly::Half>(from, to, begin, n);
    default:
      return widen<T, torch::headeronly::BFloat16>(from, to, begin, n);
  }
}
template <class To, class T>
static void narrow(const T* from, void* to, int64_t begin, int64_t n) {
  To* p = static_cast<To*>(to) + begin;
  for (int64_t i = 0; i < n; i++) {
    if constexpr (sizeof(To) == 2)
      p[i] = To(static_cast<float>(from[i]));
    else
      p[i] = static_cast<To>(from[i]);
  }
}
template <class T>
static void write_tile(ScalarType dtype, const T* from, void* to, int64_t begin, int64_t n) {
  switch (dtype) {
    case ScalarType::Double:
      return narrow<double>(from, to, begin, n);
    case ScalarType::Float:
      return narrow<float>(from, to, begin, n);
    case ScalarType::Half:
      return narrow<torch::headeronly::Half>(from, to, begin, n);
    default:
      return narrow<torch::headeronly::BFloat16>(from, to, begin, n);
  }
}
template <class T>
static void round_tile(ScalarType dtype, T* tile, int64_t n) {
  alignas(64) double buffer[kTile];
  if (dtype == ScalarType::Double) return;
  write_tile(dtype, tile, buffer, 0, n);
  read_tile(dtype, buffer, tile, 0, n);
}
