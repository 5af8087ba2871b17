// The arithmetic of the optimizer steps: one tile of one parameter, for each rule, stored type and instruction set.
//
// The loops are plain C++ and compiled once for each instruction set. Every operation is rounded by itself, in the order of the
// reference, so all instruction sets give the same bits. Half precision is computed in float and rounded once, when stored.
#pragma once
#include <immintrin.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "../common.h"

#define SK_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int kStates = 3;  // most state tensors that a rule keeps for a parameter

enum Rule : int {
  kSgd,
  kSgdFirst,
  kSgdMomentum,
  kNesterovFirst,
  kNesterov,
  kRms,
  kRmsMomentum,
  kRmsCentered,
  kRmsCenteredMomentum,
  kAdam,
  kAmsgrad,
  kRules
};

// The numbers of a step, in the type that it is computed in.
template <class A>
struct Scalars {
  A rate;                  // what the change is multiplied with
  A decay;                 // what the weight is multiplied with first (decoupled weight decay)
  A eps;                   // added to the root
  A mean, square;          // what is left of the running averages
  A new_mean, new_square;  // shares of what comes in
  A scale, weight_decay;   // of the gradient, before all else
};

// Half precision as it is stored.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// What a stored type is computed in.
template <class S>
using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

// All bits of `before` where keep is -1, of `after` where it is 0. Plain bit operations: a condition would be moved in front of
// the arithmetic by the compiler, which costs more than it saves.
template <class A>
SK_INLINE A select(int8_t keep, A before, A after) {
  using Word = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  const Word mask = keep;
  return __builtin_bit_cast(
      A, static_cast<Word>((__builtin_bit_cast(Word, before) & mask) | (__builtin_bit_cast(Word, after) & ~mask)));
}

// What a step reads of a running average: 0 where it is below the smallest normal number, on which processors multiply a hundred
// times as slowly. A weight whose gradient stays 0 would keep its average there for ever.
template <class A>
SK_INLINE A normal(A x) {
  using Word = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr Word kMagnitude = std::numeric_limits<Word>::max(), kLeast = Word{1} << (sizeof(A) == 8 ? 52 : 23);
  const Word word = __builtin_bit_cast(Word, x);
  return __builtin_bit_cast(A, (word & kMagnitude) < kLeast ? Word{0} : word);
}

SK_INLINE float root(float x) { return __builtin_sqrtf(x); }
SK_INLINE double root(double x) { return __builtin_sqrt(x); }

SK_INLINE float fused(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
SK_INLINE double fused(double x, double y, double z) { return __builtin_fma(x, y, z); }

// torch.lerp to the bit: from the nearer end, and rounded once, on every instruction set.
template <class A>
SK_INLINE A lerp(A from, A to, A share) {
  return share < A(0.5) ? fused(share, to - from, from) : fused(share - 1, to - from, to);
}

// ------------------------------------------------------------------------------------------------------- one tile, any ISA

// One rule over n weights: w the weights, g their gradients, a, b, c their state; weights with a byte that is not 0 are kept.
template <Rule rule, bool masked, class A>
SK_INLINE void step(A* __restrict w, const A* __restrict g, A* __restrict a, A* __restrict b, A* __restrict c,
                    const int8_t* __restrict keep, int64_t n, const Scalars<A> s) {
#define SK_STORE(target, before, after) target[i] = masked ? select(keep[i], before, after) : after
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const A grad = g[i], weight = w[i];
    if constexpr (rule == kAdam || rule == kAmsgrad) {
      const A mean = a[i], square = b[i];
      const A new_mean = lerp(normal(mean), grad, s.new_mean);
      const A new_square = s.square * normal(square) + s.new_square * (grad * grad);
      A variance = new_square;
      if constexpr (rule == kAmsgrad) {
        const A most = c[i];
        variance = (most > new_square) | (most != most) ? most : new_square;
        SK_STORE(c, most, variance);
      }
      const A denominator = root(variance) + s.eps;
      const A moved = weight * s.decay - s.rate * new_mean / denominator;
      SK_STORE(a, mean, new_mean);
      SK_STORE(b, square, new_square);
      SK_STORE(w, weight, moved);
    } else if constexpr (rule >= kRms && rule <= kRmsCenteredMomentum) {
      const A square = a[i];
      const A new_square = s.square * normal(square) + s.new_square * (grad * grad);
      A variance = new_square;
      if constexpr (rule == kRmsCentered || rule == kRmsCenteredMomentum) {
        const A mean = b[i];
        const A new_mean = lerp(normal(mean), grad, s.new_square);
        variance = new_square - new_mean * new_mean;
        SK_STORE(b, mean, new_mean);
      }
      A change = grad / (root(variance) + s.eps);
      if constexpr (rule == kRmsMomentum || rule == kRmsCenteredMomentum) {
        const A buffer = c[i];
        change = s.mean * normal(buffer) + change;
        SK_STORE(c, buffer, change);
      }
      const A moved = weight - s.rate * change;
      SK_STORE(a, square, new_square);
      SK_STORE(w, weight, moved);
    } else {
      A change = grad;
      if constexpr (rule != kSgd) {
        const A buffer = a[i];
        if constexpr (rule == kSgdMomentum || rule == kNesterov) change = s.mean * normal(buffer) + s.new_mean * grad;
        SK_STORE(a, buffer, change);
        if constexpr (rule == kNesterov || rule == kNesterovFirst) change = grad + s.mean * change;
      }
      const A moved = weight - s.rate * change;
      SK_STORE(w, weight, moved);
    }
  }
#undef SK_STORE
}

enum Prepare : int { kScale = 1, kNegate = 2, kDecay = 4 };

// The gradient that a rule sees: unscaled, negated to maximize, with weight decay added.
template <class A>
SK_INLINE void prepare(A* out, const A* g, const A* w, int64_t n, int what, const Scalars<A> s) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) out[i] = what & kScale ? g[i] / s.scale : g[i];
  if (what & kNegate)
    for (int64_t i = 0; i < n; i++) out[i] = -out[i];
  if (what & kDecay)
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) out[i] = out[i] + s.weight_decay * w[i];
}

// The bits of a tile, a byte each: -1 where frozen.
SK_INLINE void spread_portable(int8_t* keep, const uint8_t* bits) {
  for (int64_t i = 0; i < kTile; i++) keep[i] = is_open(bits, i) ? -1 : 0;
}

SK_AVX2 SK_INLINE void spread_avx2(int8_t* keep, const uint8_t* bits) {
  const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  for (int64_t i = 0; i < kTile; i += 32) {
    int32_t word;
    __builtin_memcpy(&word, bits + i / 8, 4);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), byte_of);
    _mm256_store_si256(reinterpret_cast<__m256i*>(keep + i), _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of));
  }
}

SK_AVX512 SK_INLINE void spread_avx512(int8_t* keep, const uint8_t* bits) {
  for (int64_t i = 0; i < kTile; i += 64) {
    uint64_t word;
    __builtin_memcpy(&word, bits + i / 8, 8);
    _mm512_store_si512(keep + i, _mm512_movm_epi8(word));
  }
}

SK_INLINE void widen(float* __restrict out, const Bf16* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = __builtin_bit_cast(float, static_cast<uint32_t>(in[i].bits) << 16);
}

SK_INLINE void narrow(Bf16* __restrict out, const float* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t word = __builtin_bit_cast(uint32_t, in[i]);
    const uint32_t nearest = (word + 0x7fff + (word >> 16 & 1)) >> 16;  // ties to even
    out[i].bits = static_cast<uint16_t>((word & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
  }
}

SK_INLINE void widen_portable(float* out, const Fp16* in, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = c10::detail::fp16_ieee_to_fp32_value(in[i].bits);
}

SK_INLINE void narrow_portable(Fp16* out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i].bits = c10::detail::fp16_ieee_from_fp32_value(in[i]);
}

SK_AVX2 SK_INLINE void widen_avx2(float* out, const Fp16* in, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    __m128i half = _mm_setzero_si128();
    __builtin_memcpy(&half, in + i, n - i < 8 ? 2 * (n - i) : 16);
    _mm256_store_ps(out + i, _mm256_cvtph_ps(half));  // out is a whole tile
  }
}

SK_AVX2 SK_INLINE void narrow_avx2(Fp16* out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_load_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_store_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
}

#define SK_SAME(isa, attribute)                                                                      \
  attribute SK_INLINE void widen_##isa(float* out, const Bf16* in, int64_t n) { widen(out, in, n); } \
  attribute SK_INLINE void narrow_##isa(Bf16* out, const float* in, int64_t n) { narrow(out, in, n); }
SK_SAME(portable, )
SK_SAME(avx2, SK_AVX2)
SK_SAME(avx512, SK_AVX512)
#undef SK_SAME
SK_AVX512 SK_INLINE void widen_avx512(float* out, const Fp16* in, int64_t n) { widen_avx2(out, in, n); }
SK_AVX512 SK_INLINE void narrow_avx512(Fp16* out, const float* in, int64_t n) { narrow_avx2(out, in, n); }

// Rounded values where keep is 0.
template <class S>
SK_INLINE void put(S* out, const S* in, const int8_t* keep, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const uint16_t mask = static_cast<uint16_t>(keep[i]);
    out[i].bits = (out[i].bits & mask) | (in[i].bits & static_cast<uint16_t>(~mask));
  }
}

template <class S>
using Tile = void (*)(S*, const S*, S*, S*, S*, const uint8_t*, int64_t, int, const Scalars<Acc<S>>&);

// A tile in place. a, b, c: null where the rule has no such state; bits: 64 bytes, or null where nothing is frozen; n <= 512.
#define SK_TILE(isa, attribute)                                                                           \
  template <Rule rule, class S>                                                                           \
  attribute void tile_##isa(S* w, const S* g, S* a, S* b, S* c, const uint8_t* bits, int64_t n, int what, \
                            const Scalars<Acc<S>>& s) {                                                   \
    using A = Acc<S>;                                                                                     \
    alignas(64) int8_t keep[kTile] = {};                                                                  \
    if (bits) spread_##isa(keep, bits);                                                                   \
    if constexpr (sizeof(S) > 2) {                                                                        \
      alignas(64) A buffer[kTile];                                                                        \
      if (what) {                                                                                         \
        prepare<A>(buffer, g, w, n, what, s);                                                             \
        g = buffer;                                                                                       \
      }                                                                                                   \
      if (bits) return step<rule, true, A>(w, g, a, b, c, keep, n, s);                                    \
      step<rule, false, A>(w, g, a, b, c, nullptr, n, s);                                                 \
    } else {                                                                                              \
      alignas(64) A wide[2 + kStates][kTile];                                                             \
      alignas(64) S rounded[kTile];                                                                       \
      S* streams[2 + kStates] = {w, const_cast<S*>(g), a, b, c};                                          \
      for (int t = 0; t < 2 + kStates; t++)                                                               \
        if (streams[t]) widen_##isa(wide[t], streams[t], n);                                              \
      if (what) prepare<A>(wide[1], wide[1], wide[0], n, what, s);                                        \
      step<rule, false, A>(wide[0], wide[1], wide[2], wide[3], wide[4], nullptr, n, s);                   \
      for (int t = 0; t < 2 + kStates; t++) {                                                             \
        if (t == 1 || !streams[t]) continue;                                                              \
        narrow_##isa(rounded, wide[t], n);                                                                \
        put(streams[t], rounded, keep, n);                                                                \
      }                                                                                                   \
    }                                                                                                     \
  }
SK_TILE(portable, )
SK_TILE(avx2, SK_AVX2)
SK_TILE(avx512, SK_AVX512)
#undef SK_TILE

template <class S, int... rule>
Tile<S> pick(int wanted, std::integer_sequence<int, rule...>) {
  static constexpr Tile<S> kTable[3][kRules] = {
      {tile_portable<Rule(rule), S>...}, {tile_avx2<Rule(rule), S>...}, {tile_avx512<Rule(rule), S>...}};
  return kTable[static_cast<int>(isa())][wanted];
}

}  // namespace
