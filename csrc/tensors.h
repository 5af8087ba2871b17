// Small helpers over tensors and packed words, shared by the CPU ops.
#pragma once
#include <cstring>

#include "common.h"

// An uninitialised contiguous CPU tensor; this direct call costs a fraction of a dispatched one.
inline Tensor new_dense(const int64_t* sizes, int64_t dim, int32_t dtype) {
  constexpr int64_t kMaxDim = 64;
  STD_TORCH_CHECK(dim <= kMaxDim, "a tensor may have at most ", kMaxDim, " dimensions, got ", dim);
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t d = dim; d-- > 0; stride *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = stride;
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}
inline Tensor new_dense_like(const Tensor& t, int32_t dtype) {
  const auto sizes = t.sizes();
  return new_dense(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}
inline Tensor new_vector(int64_t n, int32_t dtype) { return new_dense(&n, 1, dtype); }

// f(begin, end) over [0, count), on as many threads as get at least `grain` each: fewer would wait longer than they work.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count < 2 * grain)
    f(0, count);
  else
    torch::stable::parallel_for(0, count, grain, f);
}

// The implementation for the instruction set in use.
template <class F>
F* for_isa(F* portable, F* avx2, F* avx512) {
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : portable;
}

// Packed bits as words; bits may start at any byte.
static inline uint64_t load_word(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;
}
static inline void store_word(uint8_t* p, uint64_t word) { std::memcpy(p, &word, 8); }
// The lowest n bits of a word, 0 <= n <= 64.
static inline uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// Bits set in n bytes, on the calling thread (bits.cpp).
int64_t ones(const uint8_t* bits, int64_t n);

// Kernel of apply for elements of that many bytes: out[i] = open ? weight[i] : 0 for n weights (apply.cpp).
using ApplyKernel = void (*)(const uint8_t* weight, const uint8_t* bits, uint8_t* out, int64_t n);
ApplyKernel apply_kernel(size_t element);

// Kernel of the scores' straight-through gradient: out[i] = grad[i] * weight[i], times the sign of the score for magnitude keys
// (apply.cpp).
using ScoreGradKernel = void (*)(const float* grad, const float* weight, const float* scores, float* out, int64_t n,
                                 bool magnitude);
ScoreGradKernel score_grad_kernel();
