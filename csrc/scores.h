// What `select` and `threshold` share: the order of scores as integers, 64 scores at a time, and the weights behind 64 bits.
//
// The key of a score is an integer of its width that orders as the specification says: the magnitude bits, negated for a negative
// score where the sign counts. So -0.0 and +0.0 share key 0, and every NaN gets the key after infinity's, the largest.
#pragma once
#include <immintrin.h>

#include <cstring>
#include <limits>

#include "common.h"

using Word = uint64_t __attribute__((aligned(1), may_alias));  // 64 bits of a mask, wherever they lie
// Words [first, last) become 0. std::fill would take them for aligned ones.
inline void clear_words(Word* bits, int64_t first, int64_t last) { std::memset(bits + first, 0, (last - first) * 8); }

constexpr int64_t words(int64_t n) { return (n + 63) / 64; }

// The bits of a word that stand for one of n weights; `word` counts from the tensor's start.
constexpr uint64_t valid_bits(int64_t word, int64_t n) {
  return n - word * 64 >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - word * 64)) - 1;
}

// What the kernels must know of a dtype; infinity's bits tell bfloat16 from half, which are read alike.
struct Format {
  int size;
  int64_t inf;
};

inline Format score_format(const char* op, const Tensor& scores) {
  switch (scores.scalar_type()) {
    case ScalarType::Half:
      return {2, 0x7c00};
    case ScalarType::BFloat16:
      return {2, 0x7f80};
    case ScalarType::Float:
      return {4, 0x7f800000};
    case ScalarType::Double:
      return {8, 0x7ff0000000000000};
    default:
      STD_TORCH_CHECK(false, op, ": scores must be float16, bfloat16, float32 or float64, got another dtype");
  }
}

// ---------------------------------------------------------------------------------------------------------------- keys

template <class K, bool Value>
static inline K key_of(K raw, K inf) {
  const K magnitude = static_cast<K>(raw & std::numeric_limits<K>::max());
  if (magnitude > inf) return static_cast<K>(inf + 1);
  return Value && raw < 0 ? static_cast<K>(-magnitude) : magnitude;
}

template <bool Value>
SK_AVX512 static inline __m512i keys_avx512(const int32_t* scores, int32_t inf) {
  const __m512i raw = _mm512_loadu_si512(scores), nan = _mm512_set1_epi32(inf + 1);
  const __m512i magnitude = _mm512_and_si512(raw, _mm512_set1_epi32(0x7fffffff));
  if (!Value) return _mm512_maskz_min_epi32(0xffff, magnitude, nan);  // the plain form makes GCC 12 warn of its own header
  const __m512i key = _mm512_mask_sub_epi32(magnitude, _mm512_movepi32_mask(raw), _mm512_setzero_si512(), magnitude);
  return _mm512_mask_mov_epi32(key, _mm512_cmpge_epi32_mask(magnitude, nan), nan);
}

template <bool Value>
SK_AVX512 static inline __m512i keys_avx512(const int16_t* scores, int16_t inf) {
  const __m512i raw = _mm512_loadu_si512(scores), nan = _mm512_set1_epi16(inf + 1);
  const __m512i magnitude = _mm512_and_si512(raw, _mm512_set1_epi16(0x7fff));
  if (!Value) return _mm512_min_epi16(magnitude, nan);
  const __m512i key = _mm512_mask_sub_epi16(magnitude, _mm512_movepi16_mask(raw), _mm512_setzero_si512(), magnitude);
  return _mm512_mask_mov_epi16(key, _mm512_cmpge_epi16_mask(magnitude, nan), nan);
}

SK_AVX512 static inline uint64_t greater(__m512i keys, int32_t than) {
  return _mm512_cmpgt_epi32_mask(keys, _mm512_set1_epi32(than));
}
SK_AVX512 static inline uint64_t greater(__m512i keys, int16_t than) {
  return _mm512_cmpgt_epi16_mask(keys, _mm512_set1_epi16(than));
}

template <bool Value>
SK_AVX2 static inline __m256i keys_avx2(const int32_t* scores, int32_t inf) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores)), nan = _mm256_set1_epi32(inf + 1);
  const __m256i magnitude = _mm256_and_si256(raw, _mm256_set1_epi32(0x7fffffff));
  if (!Value) return _mm256_min_epi32(magnitude, nan);
  const __m256i key = _mm256_sign_epi32(magnitude, _mm256_or_si256(raw, _mm256_set1_epi32(1)));
  return _mm256_blendv_epi8(key, nan, _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(inf)));
}

template <bool Value>
SK_AVX2 static inline __m256i keys_avx2(const int16_t* scores, int16_t inf) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores)), nan = _mm256_set1_epi16(inf + 1);
  const __m256i magnitude = _mm256_and_si256(raw, _mm256_set1_epi16(0x7fff));
  if (!Value) return _mm256_min_epi16(magnitude, nan);
  const __m256i key = _mm256_sign_epi16(magnitude, _mm256_or_si256(raw, _mm256_set1_epi16(1)));
  return _mm256_blendv_epi8(key, nan, _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(inf)));
}

// ------------------------------------------------------------------------------------ 64 scores against a window of keys

// Of 64 scores, those with key > hi and those with lo <= key <= hi.
struct Side {
  uint64_t above, within;
};

template <class K, bool Value>
static inline Side side_portable(const K* scores, K lo, K hi, K inf) {
  uint64_t above = 0, reached = 0;
  for (int j = 0; j < 64; j++) {
    const K key = key_of<K, Value>(scores[j], inf);
    above |= uint64_t{key > hi} << j;
    reached |= uint64_t{key >= lo} << j;
  }
  return {above, reached & ~above};
}

template <bool Value>
SK_AVX2 static inline Side side_avx2(const int32_t* scores, int32_t lo, int32_t hi, int32_t inf) {
  const __m256i below = _mm256_set1_epi32(lo - 1), top = _mm256_set1_epi32(hi);
  uint64_t above = 0, reached = 0;
  for (int j = 0; j < 8; j++) {
    const __m256i key = keys_avx2<Value>(scores + 8 * j, inf);
    above |= uint64_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, top)))) << 8 * j;
    reached |= uint64_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, below)))) << 8 * j;
  }
  return {above, reached & ~above};
}

// 32 lanes of 16 bits, all ones or zeros, to 32 bits; the pack works on halves, which the permutation puts back in order.
SK_AVX2 static inline uint64_t lanes_avx2(__m256i a, __m256i b) {
  return uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8)));
}

template <bool Value>
SK_AVX2 static inline Side side_avx2(const int16_t* scores, int16_t lo, int16_t hi, int16_t inf) {
  const __m256i below = _mm256_set1_epi16(lo - 1), top = _mm256_set1_epi16(hi);
  uint64_t above = 0, reached = 0;
  for (int j = 0; j < 2; j++) {
    const __m256i a = keys_avx2<Value>(scores + 32 * j, inf), b = keys_avx2<Value>(scores + 32 * j + 16, inf);
    above |= lanes_avx2(_mm256_cmpgt_epi16(a, top), _mm256_cmpgt_epi16(b, top)) << 32 * j;
    reached |= lanes_avx2(_mm256_cmpgt_epi16(a, below), _mm256_cmpgt_epi16(b, below)) << 32 * j;
  }
  return {above, reached & ~above};
}

// The masks of the registers that hold 64 keys as one; joining mask registers is cheaper than moving each of them out.
SK_AVX512 static inline uint64_t joined(__mmask16 a, __mmask16 b, __mmask16 c, __mmask16 d) {
  return _cvtmask64_u64(_mm512_kunpackd(_mm512_kunpackw(d, c), _mm512_kunpackw(b, a)));
}

SK_AVX512 static inline uint64_t greater(const __m512i (&keys)[4], int32_t than) {
  const __m512i t = _mm512_set1_epi32(than);
  return joined(_mm512_cmpgt_epi32_mask(keys[0], t), _mm512_cmpgt_epi32_mask(keys[1], t), _mm512_cmpgt_epi32_mask(keys[2], t),
                _mm512_cmpgt_epi32_mask(keys[3], t));
}
SK_AVX512 static inline uint64_t greater(const __m512i (&keys)[2], int16_t than) {
  const __m512i t = _mm512_set1_epi16(than);
  return _cvtmask64_u64(_mm512_kunpackd(_mm512_cmpgt_epi16_mask(keys[1], t), _mm512_cmpgt_epi16_mask(keys[0], t)));
}

template <bool Value, class K>
SK_AVX512 static inline Side side_avx512(const K* scores, K lo, K hi, K inf, __m512i (&keys)[sizeof(K)]) {
#pragma GCC unroll 4
  for (size_t j = 0; j < sizeof(K); j++) keys[j] = keys_avx512<Value>(scores + j * (64 / sizeof(K)), inf);
  const uint64_t above = greater(keys, hi), reached = greater(keys, static_cast<K>(lo - 1));
  return {above, reached ^ above};
}

// -------------------------------------------------------------------------------------------------- weights behind bits

// out[i] = weight[i] where bit i is set, +0 elsewhere, for words [first, last) of a tensor of n elements; never a product.
template <class T>
static void keep_portable(const T* weight, const Word* bits, T* out, int64_t first, int64_t last, int64_t n) {
  for (int64_t w = first; w < last; w++) {
    const uint64_t word = bits[w];
    const int64_t end = n - w * 64 < 64 ? n - w * 64 : 64;
    for (int64_t j = 0; j < end; j++) out[w * 64 + j] = weight[w * 64 + j] & static_cast<T>(-(word >> j & 1));
  }
}

SK_AVX2 static inline __m256i spread_avx2(uint64_t word, uint16_t) {
  const __m256i each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(word), each), each);
}
SK_AVX2 static inline __m256i spread_avx2(uint64_t word, uint32_t) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(word), each), each);
}
SK_AVX2 static inline __m256i spread_avx2(uint64_t word, uint64_t) {
  const __m256i each = _mm256_setr_epi64x(1, 2, 4, 8);
  return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(word), each), each);
}

template <class T>
SK_AVX2 static void keep_avx2(const T* weight, const Word* bits, T* out, int64_t first, int64_t last, int64_t n) {
  constexpr int kLanes = 32 / sizeof(T);
  const int64_t full = last * 64 <= n ? last : last - 1;
  for (int64_t w = first; w < full; w++) {
    const uint64_t word = bits[w];
    ask_ahead(weight + w * 64, 64 * sizeof(T));
    for (int j = 0; j < 64; j += kLanes) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + w * 64 + j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + w * 64 + j), _mm256_and_si256(x, spread_avx2(word >> j, T{})));
    }
  }
  if (full >= first) keep_portable(weight, bits, out, full, last, n);
}

SK_AVX512 static inline void keep_lanes(const uint16_t* weight, uint64_t open, uint64_t valid, uint16_t* out) {
  _mm512_mask_storeu_epi16(out, valid, _mm512_maskz_loadu_epi16(open, weight));
}
SK_AVX512 static inline void keep_lanes(const uint32_t* weight, uint64_t open, uint64_t valid, uint32_t* out) {
  _mm512_mask_storeu_epi32(out, valid, _mm512_maskz_loadu_epi32(open, weight));
}
SK_AVX512 static inline void keep_lanes(const uint64_t* weight, uint64_t open, uint64_t valid, uint64_t* out) {
  _mm512_mask_storeu_epi64(out, valid, _mm512_maskz_loadu_epi64(open, weight));
}

template <class T>
SK_AVX512 static void keep_avx512(const T* weight, const Word* bits, T* out, int64_t first, int64_t last, int64_t n) {
  constexpr int kLanes = 64 / sizeof(T);
  const int64_t full = last * 64 <= n ? last : last - 1;
  for (int64_t w = first; w < full; w++) {
    const uint64_t word = bits[w];
    ask_ahead(weight + w * 64, 64 * sizeof(T));
    for (int j = 0; j < 64; j += kLanes) keep_lanes(weight + w * 64 + j, word >> j, ~uint64_t{0}, out + w * 64 + j);
  }
  for (int64_t w = full < first ? first : full; w < last; w++)
    for (int j = 0; j < 64; j += kLanes)
      keep_lanes(weight + w * 64 + j, uint64_t(bits[w]) >> j, valid_bits(w, n) >> j, out + w * 64 + j);
}

template <class T>
static void keep_typed(const void* weight, const Word* bits, void* out, int64_t first, int64_t last, int64_t n) {
  const auto* from = static_cast<const T*>(weight);
  auto* to = static_cast<T*>(out);
  switch (isa()) {
    case Isa::avx512:
      return keep_avx512(from, bits, to, first, last, n);
    case Isa::avx2:
      return keep_avx2(from, bits, to, first, last, n);
    default:
      return keep_portable(from, bits, to, first, last, n);
  }
}

static void keep_open(int size, const void* weight, const Word* bits, void* out, int64_t first, int64_t last, int64_t n) {
  if (size == 2) return keep_typed<uint16_t>(weight, bits, out, first, last, n);
  if (size == 4) return keep_typed<uint32_t>(weight, bits, out, first, last, n);
  keep_typed<uint64_t>(weight, bits, out, first, last, n);
}

// Checks a weight and the effective weight that a refresh writes, and takes their pointers; a strided weight is copied first.
inline void take_weight(const char* op, Tensor& weight, const Tensor& w_eff, int64_t n, int& size, const void*& from, void*& to) {
  STD_TORCH_CHECK(weight.numel() == n, op, ": weights must have the ", n, " elements of their scores, got ", weight.numel());
  STD_TORCH_CHECK(w_eff.numel() == n && w_eff.is_contiguous(), op, ": w_eff must be contiguous with ", n,
                  " elements or empty, got ", w_eff.numel());
  STD_TORCH_CHECK(weight.scalar_type() == w_eff.scalar_type(), op, ": w_eff must have its weight's dtype");
  size = static_cast<int>(weight.element_size());
  STD_TORCH_CHECK(size == 2 || size == 4 || size == 8, op, ": weights must have elements of 2, 4 or 8 bytes, got ", size);
  if (!weight.is_contiguous()) weight = torch::stable::contiguous(weight);
  from = weight.const_data_ptr();
  to = w_eff.mutable_data_ptr();
}
