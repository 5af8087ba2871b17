// Shared by the ops: argument checks that end in a sentence, and, for the CPU, the instruction set in use and the threading rule.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "bits.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Functions for one instruction set carry its attribute, see raw pointers only and are static: nothing of them can be merged with
// a function compiled for another set. Floating-point contraction is off for the whole library, so that all paths give the same
// bits.
#define SK_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt,f16c")))
#define SK_AVX512                                                                                                                \
  __attribute__((                                                                                                                \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vpopcntdq,avx512bitalg,gfni,bmi,bmi2,popcnt,f16c," \
             "avx2,fma")))

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// The instruction set in use: the best that this processor has, unless SUBNET_KERNELS_CPU or the tests ask for less.
Isa isa();

// Elements below which an op stays on the calling thread: a parallel region costs more than it saves.
constexpr int64_t kGrain = 65536;

// Asks for `bytes` of a stream a page before they are read. The processor's own prefetchers stop where a page ends, and a loop
// whose branches surprise it does not run that far ahead: a scan of 96 MB takes about half the time with it.
inline __attribute__((always_inline)) void ask_ahead(const void* stream, int64_t bytes) {
  constexpr int64_t kAhead = 4096, kLine = 64;
  for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(static_cast<const char*>(stream) + kAhead + b);
}

inline void check_bits(const char* op, const Tensor& bits, int64_t n) {
  STD_TORCH_CHECK(
      bits.scalar_type() == ScalarType::Byte && bits.dim() == 1 && bits.numel() == mask_bytes(n) && bits.is_contiguous(), op,
      ": bits must be contiguous uint8 with ", mask_bytes(n), " bytes for ", n, " weights, got ", bits.numel());
}

inline void check_lengths(const char* op, size_t expected, size_t got, const char* what) {
  STD_TORCH_CHECK(expected == got, op, ": expected ", expected, " ", what, ", got ", got);
}

// The tensor itself where it is contiguous, else a contiguous copy.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The dtype of a tensor as the C interface counts them: also of those that ScalarType of this header set does not know.
inline int32_t dtype_code(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}
