// Sixteen floats at a time, the same sixteen on every instruction set: kernels that are written with them, and included once in
// each namespace, give the same bits everywhere. Masks are sixteen packed bits, lane 0 the lowest.
#pragma once
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "../common.h"

#define SK_LANES static inline __attribute__((always_inline))

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kLanes = 16;

// Floats from the start of a cache line on: no load of sixteen spans two lines.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const LineAllocator&) const { return true; }
};
using Floats = std::vector<float, LineAllocator<float>>;

namespace portable {

struct Lanes {
  float lane[kLanes];
};

SK_LANES Lanes zero() { return {}; }
SK_LANES Lanes same(float value) {
  Lanes v;
  for (float& lane : v.lane) lane = value;
  return v;
}
template <class T>
SK_LANES Lanes load(const T* from) {
  Lanes v;
  for (int64_t i = 0; i < kLanes; i++) v.lane[i] = static_cast<float>(from[i]);
  return v;
}
SK_LANES void store(float* to, const Lanes& v) { std::memcpy(to, v.lane, sizeof v.lane); }
// from[i] where open, which alone is read, else +0.0
SK_LANES Lanes load_open(const float* from, uint16_t open) {
  Lanes v = {};
  for (int64_t i = 0; i < kLanes; i++)
    if (open >> i & 1) v.lane[i] = from[i];
  return v;
}
// v where open, else +0.0
SK_LANES Lanes where(uint16_t open, Lanes v) {
  for (int64_t i = 0; i < kLanes; i++)
    if (!(open >> i & 1)) v.lane[i] = 0.0f;
  return v;
}
// The next values into the open lanes, +0.0 elsewhere; sixteen values can be read.
template <class T>
SK_LANES Lanes expand(const T* values, uint16_t open) {
  Lanes v = {};
  for (int64_t i = 0; i < kLanes; i++)
    if (open >> i & 1) v.lane[i] = static_cast<float>(*values++);
  return v;
}
// from[at[i]]
template <class Column>
SK_LANES Lanes gather(const float* from, const Column* at) {
  Lanes v;
  for (int64_t i = 0; i < kLanes; i++) v.lane[i] = from[at[i]];
  return v;
}
SK_LANES Lanes add(const Lanes& a, const Lanes& b) {
  Lanes v;
  for (int64_t i = 0; i < kLanes; i++) v.lane[i] = a.lane[i] + b.lane[i];
  return v;
}
SK_LANES Lanes mul(const Lanes& a, const Lanes& b) {
  Lanes v;
  for (int64_t i = 0; i < kLanes; i++) v.lane[i] = a.lane[i] * b.lane[i];
  return v;
}
// 1, -1, or 0 of 0 and of NaN
SK_LANES Lanes sign(const Lanes& a) {
  Lanes v;
  for (int64_t i = 0; i < kLanes; i++) v.lane[i] = (a.lane[i] > 0 ? 1.0f : 0.0f) - (a.lane[i] < 0 ? 1.0f : 0.0f);
  return v;
}
// Past the caches, to the start of a line.
SK_LANES void stream(float* to, const Lanes& v) { store(to, v); }
// a * b + c, rounded once
SK_LANES Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes v;
  for (int64_t i = 0; i < kLanes; i++) v.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return v;
}
// The same where open, else c
SK_LANES Lanes fma_open(const Lanes& a, const Lanes& b, const Lanes& c, uint16_t open) {
  Lanes v = c;
  for (int64_t i = 0; i < kLanes; i++)
    if (open >> i & 1) v.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return v;
}
// Halves onto each other, until one is left.
SK_LANES float sum(Lanes v) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) v.lane[i] += v.lane[i + half];
  return v.lane[0];
}
// The sums of four.
SK_LANES void sums(const Lanes (&v)[4], float (&to)[4]) {
  for (int i = 0; i < 4; i++) to[i] = sum(v[i]);
}
SK_LANES void store_first(float* to, const Lanes& v, int64_t n) {
  for (int64_t i = 0; i < n && i < kLanes; i++) to[i] = v.lane[i];
}
// Lane j of v[i] and lane i of v[j] change places.
SK_LANES void transpose(Lanes (&v)[16]) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < i; j++) std::swap(v[i].lane[j], v[j].lane[i]);
}

}  // namespace portable

namespace avx2 {

struct Lanes {
  __m256 low, high;
};

// Eight bits, each spread over a lane.
SK_AVX2 SK_LANES __m256i spread(uint32_t byte) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(byte)), bit), bit);
}
SK_AVX2 SK_LANES Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SK_AVX2 SK_LANES Lanes same(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
SK_AVX2 SK_LANES __m256 load8(const float* from) { return _mm256_loadu_ps(from); }
SK_AVX2 SK_LANES __m256 load8(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
SK_AVX2 SK_LANES __m256 load8(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
template <class T>
SK_AVX2 SK_LANES Lanes load(const T* from) {
  return {load8(from), load8(from + 8)};
}
SK_AVX2 SK_LANES void store(float* to, const Lanes& v) { _mm256_storeu_ps(to, v.low), _mm256_storeu_ps(to + 8, v.high); }
SK_AVX2 SK_LANES Lanes load_open(const float* from, uint16_t open) {
  return {_mm256_maskload_ps(from, spread(open & 0xff)), _mm256_maskload_ps(from + 8, spread(open >> 8))};
}
SK_AVX2 SK_LANES Lanes where(uint16_t open, const Lanes& v) {
  return {_mm256_and_ps(v.low, _mm256_castsi256_ps(spread(open & 0xff))),
          _mm256_and_ps(v.high, _mm256_castsi256_ps(spread(open >> 8)))};
}
template <class T>
SK_AVX2 SK_LANES __m256 expand8(const T* values, uint32_t open) {
  // Open lane number r takes value number r: lane numbers are laid out under the mask, eight bits each.
  const uint64_t lanes = _pdep_u64(0x0706050403020100u, _pdep_u64(open, 0x0101010101010101u) * 0xff);
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes)));
  return _mm256_and_ps(_mm256_permutevar8x32_ps(load8(values), order), _mm256_castsi256_ps(spread(open)));
}
template <class T>
SK_AVX2 SK_LANES Lanes expand(const T* values, uint16_t open) {
  return {expand8(values, open & 0xff), expand8(values + _mm_popcnt_u32(open & 0xff), open >> 8)};
}
SK_AVX2 SK_LANES __m256i columns8(const uint16_t* at) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
SK_AVX2 SK_LANES __m256i columns8(const int32_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
template <class Column>
SK_AVX2 SK_LANES Lanes gather(const float* from, const Column* at) {
  return {_mm256_i32gather_ps(from, columns8(at), 4), _mm256_i32gather_ps(from, columns8(at + 8), 4)};
}
SK_AVX2 SK_LANES Lanes add(const Lanes& a, const Lanes& b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
SK_AVX2 SK_LANES Lanes mul(const Lanes& a, const Lanes& b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
SK_AVX2 SK_LANES __m256 sign8(__m256 a) {
  const __m256 with_sign = _mm256_or_ps(_mm256_and_ps(a, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1));
  return _mm256_and_ps(with_sign, _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_OQ));
}
SK_AVX2 SK_LANES Lanes sign(const Lanes& a) { return {sign8(a.low), sign8(a.high)}; }
SK_AVX2 SK_LANES void stream(float* to, const Lanes& v) { _mm256_stream_ps(to, v.low), _mm256_stream_ps(to + 8, v.high); }
SK_AVX2 SK_LANES Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
SK_AVX2 SK_LANES Lanes fma_open(const Lanes& a, const Lanes& b, const Lanes& c, uint16_t open) {
  const Lanes v = fma(a, b, c);
  return {_mm256_blendv_ps(c.low, v.low, _mm256_castsi256_ps(spread(open & 0xff))),
          _mm256_blendv_ps(c.high, v.high, _mm256_castsi256_ps(spread(open >> 8)))};
}
SK_AVX2 SK_LANES float sum8(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
SK_AVX2 SK_LANES float sum(const Lanes& v) { return sum8(_mm256_add_ps(v.low, v.high)); }
SK_AVX2 SK_LANES __m128 quarter(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
SK_AVX2 SK_LANES void sums4(__m128 a, __m128 b, __m128 c, __m128 d, float* to) {
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
}
SK_AVX2 SK_LANES void sums(const Lanes (&v)[4], float (&to)[4]) {
  sums4(quarter(_mm256_add_ps(v[0].low, v[0].high)), quarter(_mm256_add_ps(v[1].low, v[1].high)),
        quarter(_mm256_add_ps(v[2].low, v[2].high)), quarter(_mm256_add_ps(v[3].low, v[3].high)), to);
}
// The lanes of a and b in turn: those of their first halves, and those of their second ones.
SK_AVX2 SK_LANES Lanes zip8(__m256 a, __m256 b) {
  const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
SK_AVX2 SK_LANES void transpose(Lanes (&v)[16]) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {  // each doubles the runs of lanes that stand in their column
    Lanes to[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) to[2 * i] = zip8(v[i].low, v[i + 8].low), to[2 * i + 1] = zip8(v[i].high, v[i + 8].high);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = to[i];
  }
}
SK_AVX2 SK_LANES void store_first(float* to, const Lanes& v, int64_t n) {
  alignas(32) float all[kLanes];
  store(all, v);
  for (int64_t i = 0; i < n && i < kLanes; i++) to[i] = all[i];
}

}  // namespace avx2

namespace avx512 {

using Lanes = __m512;

SK_AVX512 SK_LANES Lanes zero() { return _mm512_setzero_ps(); }
SK_AVX512 SK_LANES Lanes same(float value) { return _mm512_set1_ps(value); }
SK_AVX512 SK_LANES Lanes load(const float* from) { return _mm512_loadu_ps(from); }
SK_AVX512 SK_LANES Lanes load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
SK_AVX512 SK_LANES Lanes load(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
SK_AVX512 SK_LANES void store(float* to, Lanes v) { _mm512_storeu_ps(to, v); }
SK_AVX512 SK_LANES Lanes load_open(const float* from, uint16_t open) { return _mm512_maskz_loadu_ps(open, from); }
SK_AVX512 SK_LANES Lanes where(uint16_t open, Lanes v) { return _mm512_maskz_mov_ps(open, v); }
template <class T>
SK_AVX512 SK_LANES Lanes expand(const T* values, uint16_t open) {
  return _mm512_maskz_expand_ps(open, load(values));
}
// Two gathers of eight: they are faster than one of sixteen.
template <class Column>
SK_AVX512 SK_LANES Lanes gather(const float* from, const Column* at) {
  const auto v = avx2::gather(from, at);
  return _mm512_insertf32x8(_mm512_castps256_ps512(v.low), v.high, 1);
}
SK_AVX512 SK_LANES Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
SK_AVX512 SK_LANES Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
SK_AVX512 SK_LANES Lanes sign(Lanes a) {
  const __mmask16 has_sign = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  const __m512i one = _mm512_castps_si512(_mm512_set1_ps(1)), minus = _mm512_castps_si512(_mm512_set1_ps(-0.0f));
  return _mm512_castsi512_ps(_mm512_maskz_ternarylogic_epi32(has_sign, _mm512_castps_si512(a), minus, one, 0xea));
}
SK_AVX512 SK_LANES void stream(float* to, Lanes v) { _mm512_stream_ps(to, v); }
SK_AVX512 SK_LANES Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
SK_AVX512 SK_LANES Lanes fma_open(Lanes a, Lanes b, Lanes c, uint16_t open) { return _mm512_mask3_fmadd_ps(a, b, c, open); }
SK_AVX512 SK_LANES float sum(Lanes v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

SK_AVX512 SK_LANES __m256 half(Lanes v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
SK_AVX512 SK_LANES void sums(const Lanes (&v)[4], float (&to)[4]) {
  avx2::sums4(avx2::quarter(half(v[0])), avx2::quarter(half(v[1])), avx2::quarter(half(v[2])), avx2::quarter(half(v[3])), to);
}
SK_AVX512 SK_LANES void transpose(Lanes (&v)[16]) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {  // as by AVX2: the lanes of two registers in turn
    Lanes to[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      to[2 * i] = _mm512_permutex2var_ps(v[i], first, v[i + 8]);
      to[2 * i + 1] = _mm512_permutex2var_ps(v[i], second, v[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = to[i];
  }
}
SK_AVX512 SK_LANES void store_first(float* to, Lanes v, int64_t n) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(n >= kLanes ? 0xffff : (1 << n) - 1), v);
}

}  // namespace avx512

}  // namespace
