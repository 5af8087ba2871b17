// superpose, superpose_counts, superpose_grad, alpha_grad: one weight through a whole bank of masks, and what each mask would
// have changed.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../bank.h"
#include "../floats.h"

namespace {

// Sums take four masks, or four weights, at a time: the sixteen sums that their bits can choose are tabulated, and looked up by
// the bits. All instruction sets add in the same order, which depends on nothing but the bank.

constexpr int64_t kTogether = 4;  // tiles taken through all blocks of a bank together: longer runs of memory
constexpr int64_t kGroup = 8;     // tasks whose bits make the code of a weight: two tables

// sums[code] = the members whose bit is set in code, (0 + 1) + (2 + 3)
template <class T>
static void tabulate(const T* members, T* sums) {
  const T low[4] = {T(0), members[0], members[1], members[0] + members[1]};
  const T high[4] = {T(0), members[2], members[3], members[2] + members[3]};
  for (int64_t code = 0; code < 16; code++) sums[code] = low[code & 3] + high[code >> 2];
}

// ----------------------------------------------------------------------------------------------------------- superpose
// mix += sum_k alpha_k M_k over one tile of k <= 64 tasks, 64 bytes each, for each of several rows of alphas; opened |= each
// mask. alphas: rows of k, each padded with zeros to groups of 8; tables: two for a group; mix: a tile for each row.

constexpr int64_t padded(int64_t k) { return (k + kGroup - 1) / kGroup * kGroup; }

// Bit j of byte t to bit t of byte j.
static inline uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aau;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000cccc0000ccccu;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000f0f0f0f0u;
  return x ^ t ^ t << 28;
}

template <class T>
static void mix_portable(const uint8_t* lines, int64_t k, int64_t rows, const T*, const T* tables, T* mix, uint8_t* opened) {
  for (int64_t row = 0; row < rows; row++, mix += kTile) {
    T sum[kTile] = {};
    for (int64_t first = 0; first < k; first += kGroup, tables += 4 * kGroup) {
      const uint8_t* group = lines + first * kTileBytes;
      const int64_t tasks = k - first < kGroup ? k - first : kGroup;
      for (int64_t i = 0; i < kTileBytes; i++) {
        uint64_t codes = 0;
        for (int64_t t = 0; t < tasks; t++)
          codes |= uint64_t{group[t * kTileBytes + i]} << 8 * t, opened[i] |= group[t * kTileBytes + i];
        codes = transpose_bits(codes);
        for (int64_t j = 0; j < 8; j++, codes >>= 8) sum[i * 8 + j] += tables[codes & 15] + tables[16 + (codes >> 4 & 15)];
      }
    }
    for (int64_t i = 0; i < kTile; i++) mix[i] += sum[i];
  }
}

// Eight floats, alpha where the bit of a byte is set, else 0.
SK_AVX2 static inline __m256 where_avx2(uint8_t byte, float alpha) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i open = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi8(static_cast<char>(byte)), bit), bit);
  return _mm256_and_ps(_mm256_set1_ps(alpha), _mm256_castsi256_ps(open));
}

// Without a lookup by sixteen: the same sums from masked numbers.
SK_AVX2 static void mix_row_avx2(const uint8_t* lines, int64_t k, const float* alphas, float* mix, uint8_t* opened) {
  static const uint8_t closed[kTileBytes] = {};
  for (int64_t part = 0; part < kTileBytes; part += 8) {  // 64 weights at a time: eight sums in registers
    __m256 sum[8];
    for (auto& s : sum) s = _mm256_setzero_ps();
    uint64_t any = load_word(opened + part);
    for (int64_t first = 0; first < k; first += kGroup) {
      const uint8_t* line[kGroup];
      const float* alpha = alphas + first;
      for (int64_t t = 0; t < kGroup; t++) {
        line[t] = (first + t < k ? lines + (first + t) * kTileBytes : closed) + part;
        any |= load_word(line[t]);
      }
      for (int64_t j = 0; j < 8; j++) {
        const __m256 a = _mm256_add_ps(where_avx2(line[0][j], alpha[0]), where_avx2(line[1][j], alpha[1]));
        const __m256 b = _mm256_add_ps(where_avx2(line[2][j], alpha[2]), where_avx2(line[3][j], alpha[3]));
        const __m256 c = _mm256_add_ps(where_avx2(line[4][j], alpha[4]), where_avx2(line[5][j], alpha[5]));
        const __m256 d = _mm256_add_ps(where_avx2(line[6][j], alpha[6]), where_avx2(line[7][j], alpha[7]));
        sum[j] = _mm256_add_ps(sum[j], _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
      }
    }
    store_word(opened + part, any);
    for (int64_t j = 0; j < 8; j++) {
      float* to = mix + part * 8 + j * 8;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum[j]));
    }
  }
}
SK_AVX2 static void mix_avx2(const uint8_t* lines, int64_t k, int64_t rows, const float* alphas, const float*, float* mix,
                             uint8_t* opened) {
  for (int64_t row = 0; row < rows; row++) mix_row_avx2(lines, k, alphas + row * padded(k), mix + row * kTile, opened);
}

// Lane q of 128 bits of v[p] to lane p of out[q].
SK_AVX512 static inline void transpose_lanes(const __m512i v[4], __m512i out[4]) {
  const __m512i a = _mm512_shuffle_i64x2(v[0], v[1], 0x44), b = _mm512_shuffle_i64x2(v[0], v[1], 0xee);
  const __m512i c = _mm512_shuffle_i64x2(v[2], v[3], 0x44), d = _mm512_shuffle_i64x2(v[2], v[3], 0xee);
  out[0] = _mm512_shuffle_i64x2(a, c, 0x88), out[1] = _mm512_shuffle_i64x2(a, c, 0xdd);
  out[2] = _mm512_shuffle_i64x2(b, d, 0x88), out[3] = _mm512_shuffle_i64x2(b, d, 0xdd);
}

// The order of bytes that puts a code of each of 4 x 16 consecutive weights into one dword.
struct Order {
  uint8_t byte[64];
};
constexpr Order spread_order() {
  Order o{};
  for (int lane = 0; lane < 4; lane++)
    for (int i = 0; i < 16; i++) o.byte[i * 4 + lane] = static_cast<uint8_t>(lane * 16 + i);
  return o;
}
static constexpr Order kSpread = spread_order();

// The lowest four bits of v[s] in every lane are bits 4 s to 4 s + 3 of that lane. Shuffles have two of the four pipes of Zen 4,
// and shifts want the same two: most are products, whose upper half is taken.
SK_AVX512 static inline void nibbles(__m512i lanes, __m512i v[8]) {
  const __m512i high = _mm512_srli_epi32(lanes, 16);
  v[0] = lanes, v[4] = high;
#pragma GCC unroll 3
  for (int s = 1; s < 4; s++) {
    const __m512i down = _mm512_set1_epi16(static_cast<int16_t>(1 << (16 - 4 * s)));
    v[s] = _mm512_mulhi_epu16(lanes, down), v[4 + s] = _mm512_mulhi_epu16(high, down);
  }
}

// Sums of one or two rows for 64 weights: weights at, 128 + at, 256 + at and 384 + at of the tile, 16 of each, from their codes
// for every group of tasks.
template <int Rows>
SK_AVX512 static inline void add_coded(const uint8_t (*codes)[64], int64_t groups, const float* tables, float* mix,
                                       const uint8_t* ahead) {
  __m512 sum[Rows][4];
  for (auto& row : sum)
    for (auto& s : row) s = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    _mm_prefetch(ahead + g * kTileBytes, _MM_HINT_T0);
    __m512i code[8];
    nibbles(_mm512_load_si512(codes[g]), code);
#pragma GCC unroll 2
    for (int r = 0; r < Rows; r++) {
      const float* table = tables + (r * groups + g) * 4 * kGroup;
      const __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512 a = _mm512_permutexvar_ps(code[2 * i], low), b = _mm512_permutexvar_ps(code[2 * i + 1], high);
        sum[r][i] = _mm512_add_ps(sum[r][i], _mm512_add_ps(a, b));
      }
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int64_t i = 0; i < 4; i++) {
      float* to = mix + r * kTile + i * 128;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][i]));
    }
}

SK_AVX512 static void mix_avx512(const uint8_t* lines, int64_t k, int64_t rows, const float*, const float* tables, float* mix,
                                 uint8_t* opened) {
  const __m512i spread = _mm512_loadu_si512(kSpread.byte);
  const __m512i unit = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
  const int64_t groups = (k + kGroup - 1) / kGroup;
  alignas(64) uint8_t codes[8][kBlockTasks / kGroup][64];  // [64 weights][group of tasks]: a byte a weight
  __m512i any = _mm512_loadu_si512(opened);
  for (int64_t g = 0; g < groups; g++) {
    __m512i row[8], pair[8], quad[8];
#pragma GCC unroll 8
    for (int64_t t = 0; t < 8; t++) {
      const int64_t task = g * kGroup + t;
      row[t] = task < k ? _mm512_loadu_si512(lines + task * kTileBytes) : _mm512_setzero_si512();
      any = _mm512_or_si512(any, row[t]);
    }
    // The bytes of eight tasks side by side, last task first, as the bit transposition wants them.
#pragma GCC unroll 4
    for (int64_t t = 0; t < 4; t++) {
      pair[t] = _mm512_unpacklo_epi8(row[7 - 2 * t], row[6 - 2 * t]);
      pair[t + 4] = _mm512_unpackhi_epi8(row[7 - 2 * t], row[6 - 2 * t]);
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; i++)
#pragma GCC unroll 2
      for (int64_t t = 0; t < 2; t++) {
        quad[i * 4 + t] = _mm512_unpacklo_epi16(pair[i * 4 + 2 * t], pair[i * 4 + 2 * t + 1]);
        quad[i * 4 + t + 2] = _mm512_unpackhi_epi16(pair[i * 4 + 2 * t], pair[i * 4 + 2 * t + 1]);
      }
#pragma GCC unroll 8
    for (int64_t q = 0; q < 8; q++) {
      const __m512i a = quad[q / 2 * 2], b = quad[q / 2 * 2 + 1];
      const __m512i bytes = q % 2 ? _mm512_unpackhi_epi32(a, b) : _mm512_unpacklo_epi32(a, b);
      const __m512i code = _mm512_permutexvar_epi8(spread, _mm512_gf2p8affine_epi64_epi8(unit, bytes, 0));
      _mm512_store_si512(codes[q][g], code);
    }
  }
  _mm512_storeu_si512(opened, any);
  for (int64_t row = 0; row < rows; row += 2) {
    const float* table = tables + row * groups * 4 * kGroup;
    for (int64_t q = 0; q < 8; q++) {
      float* to = mix + row * kTile + q * 16;
      const uint8_t* ahead = lines + (k + q * groups) * kTileBytes;  // the block's next tile: no line of it was read yet
      row + 1 < rows ? add_coded<2>(codes[q], groups, table, to, ahead) : add_coded<1>(codes[q], groups, table, to, ahead);
    }
  }
}

// ------------------------------------------------------------------------------------------------------ superpose_grad
// sums[k] += sum over one tile of products where M_k is open, from the tables of the tile, one for every four weights.
// A table holds float64 sums rounded to T; four of those are added in T: with one rounding for the products and their first two
// sums, the error stays below twice that of products in T that are all summed in float64.
//
// The sums of a tile of floats are added in floats too, and what every addition loses is added up beside them: exact, because the
// first number is never the smaller one. It starts at an offset of more than twice what a tile can sum to.

// The sum of one tile, in T or wider.
template <class T>
static double dot_tile(const uint8_t* line, const T* tables, T offset) {
  double wide = 0;
  T sum = offset, lost = 0;
  for (int64_t i = 0; i < kTileBytes; i += 2) {
    const uint8_t a = line[i], b = line[i + 1];
    const T* table = tables + i * 32;
    const T four = (table[a & 15] + table[16 + (a >> 4)]) + (table[32 + (b & 15)] + table[48 + (b >> 4)]);
    if (sizeof(T) == 8 || !std::isfinite(offset)) {
      wide += static_cast<double>(four);
    } else {
      const T next = sum + four;
      lost += four - (next - sum);
      sum = next;
    }
  }
  return wide + (static_cast<double>(std::isfinite(offset) ? sum - offset : T(0)) + static_cast<double>(lost));
}

template <class T>
static void dot_portable(const uint8_t* lines, int64_t k, const T* tables, T offset, double* sums) {
  for (int64_t task = 0; task < k; task++) sums[task] += dot_tile(lines + task * kTileBytes, tables, offset);
}

// Sixteen floats of a table, those that the lowest four bits of every lane choose.
SK_AVX512 static inline __m512 look_up(__m512i bits, const float* table) {
  return _mm512_permutexvar_ps(bits, _mm512_loadu_ps(table));
}

SK_AVX512 static void dot_avx512(const uint8_t* lines, int64_t k, const float* tables, float offset, double* sums) {
  if (!std::isfinite(offset)) return dot_portable(lines, k, tables, offset, sums);
  constexpr int64_t kAhead = 32;                     // tasks ahead, of this tile and then the next, whose lines are fetched
  for (int64_t first = 0; first < k; first += 16) {  // sixteen tasks, one a lane
    __m512i row[16], pair[16], quad[4][4], dword[16];
#pragma GCC unroll 16
    for (int64_t t = 0; t < 16; t++)
      row[t] = first + t < k ? _mm512_loadu_si512(lines + (first + t) * kTileBytes) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int64_t t = 0; t < 16; t += 2) {
      pair[t] = _mm512_unpacklo_epi32(row[t], row[t + 1]);
      pair[t + 1] = _mm512_unpackhi_epi32(row[t], row[t + 1]);
    }
#pragma GCC unroll 4
    for (int64_t t = 0; t < 4; t++) {
      quad[0][t] = _mm512_unpacklo_epi64(pair[4 * t], pair[4 * t + 2]);
      quad[1][t] = _mm512_unpackhi_epi64(pair[4 * t], pair[4 * t + 2]);
      quad[2][t] = _mm512_unpacklo_epi64(pair[4 * t + 1], pair[4 * t + 3]);
      quad[3][t] = _mm512_unpackhi_epi64(pair[4 * t + 1], pair[4 * t + 3]);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; i++) transpose_lanes(quad[i], dword + i * 4);  // dword[i * 4 + q]: weights 32 * (4 * q + i) and on
    alignas(64) int32_t bits[16][16];
#pragma GCC unroll 16
    for (int64_t c = 0; c < 16; c++) _mm512_store_si512(bits[c], dword[c % 4 * 4 + c / 4]);
    const __m512 start = _mm512_set1_ps(offset);
    __m512 sum = start, lost = _mm512_setzero_ps();
    for (int64_t c = 0; c < 16; c++) {
      _mm_prefetch(lines + (first + kAhead + c) * kTileBytes, _MM_HINT_T0);
      const float* table = tables + c * 8 * 16;
      __m512i code[8];
      nibbles(_mm512_load_si512(bits[c]), code);
#pragma GCC unroll 2
      for (int half = 0; half < 8; half += 4, table += 64) {
        const __m512 a = _mm512_add_ps(look_up(code[half], table), look_up(code[half + 1], table + 16));
        const __m512 b = _mm512_add_ps(look_up(code[half + 2], table + 32), look_up(code[half + 3], table + 48));
        const __m512 four = _mm512_add_ps(a, b), next = _mm512_add_ps(sum, four);
        lost = _mm512_add_ps(lost, _mm512_sub_ps(four, _mm512_sub_ps(next, sum)));
        sum = next;
      }
    }
    sum = _mm512_sub_ps(sum, start);
    const int64_t here = k - first < 16 ? k - first : 16;
    const auto low_tasks = static_cast<__mmask8>(low_bits(here)), high_tasks = static_cast<__mmask8>(low_bits(here) >> 8);
    const __m512d low =
        _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(sum)), _mm512_cvtps_pd(_mm512_castps512_ps256(lost)));
    const __m512d high =
        _mm512_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(lost, 1)));
    double* to = sums + first;
    _mm512_mask_storeu_pd(to, low_tasks, _mm512_add_pd(_mm512_maskz_loadu_pd(low_tasks, to), low));
    _mm512_mask_storeu_pd(to + 8, high_tasks, _mm512_add_pd(_mm512_maskz_loadu_pd(high_tasks, to + 8), high));
  }
}

// The offset of a tile: more than twice the sum of all magnitudes, taken in eight lanes; infinite or NaN where that is no number.
static double offset_of(const double* products) {
  double lanes[8] = {};
  for (int64_t i = 0; i < kTile; i += 8)
    for (int64_t j = 0; j < 8; j++) lanes[j] += std::abs(products[i + j]);
  return 2.5 * (((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])));
}

// The tables of a tile: 128 of sixteen sums ((0 + 1) + 2) + 3. Returns the offset.
template <class T>
static T tables_portable(const double* products, T* tables) {
  for (int64_t i = 0; i < kTile; i += 4)
    for (int64_t code = 0; code < 8; code++) {
      const double* p = products + i;
      const double sum = ((code & 1 ? p[0] : 0.0) + (code & 2 ? p[1] : 0.0)) + (code & 4 ? p[2] : 0.0);
      tables[i * 4 + code] = static_cast<T>(sum), tables[i * 4 + 8 + code] = static_cast<T>(sum + p[3]);
    }
  return static_cast<T>(offset_of(products));
}
SK_AVX512 static float tables_avx512(const double* products, float* tables) {
  __m512d all = _mm512_setzero_pd();
  for (int64_t i = 0; i < kTile; i += 8) all = _mm512_add_pd(all, _mm512_abs_pd(_mm512_loadu_pd(products + i)));
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(all), _mm512_extractf64x4_pd(all, 1));
  const double offset = 2.5 * ((four[0] + four[1]) + (four[2] + four[3]));
  for (int64_t i = 0; i < kTile; i += 4) {
    __m512d sum = _mm512_maskz_mov_pd(0xaa, _mm512_set1_pd(products[i]));
    sum = _mm512_mask_add_pd(sum, 0xcc, sum, _mm512_set1_pd(products[i + 1]));
    sum = _mm512_mask_add_pd(sum, 0xf0, sum, _mm512_set1_pd(products[i + 2]));
    _mm256_storeu_ps(tables + i * 4, _mm512_cvtpd_ps(sum));
    _mm256_storeu_ps(tables + i * 4 + 8, _mm512_cvtpd_ps(_mm512_add_pd(sum, _mm512_set1_pd(products[i + 3]))));
  }
  return static_cast<float>(offset);
}

// --------------------------------------------------------------------------------------------------------- elementwise
// Plain loops over a tile, compiled once for each set.

// out = a * b, in the type of out
template <class T, class Out>
static inline __attribute__((always_inline)) void multiply(const T* a, const T* b, Out* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<Out>(a[i]) * static_cast<Out>(b[i]);
}
// values /= by
template <class T>
static inline __attribute__((always_inline)) void divide(T* values, T by, int64_t n) {
  for (int64_t i = 0; i < n; i++) values[i] /= by;
}
// out = (a * b) * scale, in float64
template <class T>
static inline __attribute__((always_inline)) void multiply_scaled(const T* a, const T* b, double scale, double* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<double>(a[i]) * static_cast<double>(b[i]) * scale;
}
// out = count > 0 ? weight * (count / tasks) : 0, the choice by bits: a conditional would not be vectorised
template <class T>
static inline __attribute__((always_inline)) void weigh_counts(const T* weight, const int32_t* counts, T tasks, T* out,
                                                               int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  for (int64_t i = 0; i < n; i++) {
    const Bits product = __builtin_bit_cast(Bits, weight[i] * (static_cast<T>(counts[i]) / tasks));
    out[i] = __builtin_bit_cast(T, static_cast<Bits>(product & -static_cast<Bits>(counts[i] > 0)));
  }
}
#define SK_EACH(suffix, target)                                                                                  \
  template <class T, class Out>                                                                                  \
  target static void multiply_##suffix(const T* a, const T* b, Out* out, int64_t n) {                            \
    multiply(a, b, out, n);                                                                                      \
  }                                                                                                              \
  template <class T>                                                                                             \
  target static void divide_##suffix(T* values, T by, int64_t n) {                                               \
    divide(values, by, n);                                                                                       \
  }                                                                                                              \
  template <class T>                                                                                             \
  target static void multiply_scaled_##suffix(const T* a, const T* b, double scale, double* out, int64_t n) {    \
    multiply_scaled(a, b, scale, out, n);                                                                        \
  }                                                                                                              \
  template <class T>                                                                                             \
  target static void weigh_counts_##suffix(const T* weight, const int32_t* counts, T tasks, T* out, int64_t n) { \
    weigh_counts(weight, counts, tasks, out, n);                                                                 \
  }
SK_EACH(portable, )
SK_EACH(avx2, SK_AVX2)
SK_EACH(avx512, SK_AVX512)
#undef SK_EACH

// out = open ? weight * mix : 0, for the dtype that is computed in; the general way takes two passes.
SK_AVX512 static void finish_avx512(const float* weight, const float* mix, const uint8_t* bits, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const auto here = static_cast<__mmask16>(low_bits(n - i < 16 ? n - i : 16));
    const auto open = static_cast<__mmask16>(bits[i / 8] | bits[i / 8 + 1] << 8);
    const __m512 product = _mm512_maskz_mul_ps(open & here, _mm512_maskz_loadu_ps(here, weight + i), _mm512_loadu_ps(mix + i));
    _mm512_mask_storeu_ps(out + i, here, product);
  }
}

// ----------------------------------------------------------------------------------------------------------------- ops

// The kernels for compute type T.
template <class T>
struct Kernels {
  void (*mix)(const uint8_t*, int64_t, int64_t, const T*, const T*, T*, uint8_t*) = mix_portable<T>;
  void (*finish)(const T*, const T*, const uint8_t*, T*, int64_t) = nullptr;
  void (*divide)(T*, T, int64_t) = for_isa(divide_portable<T>, divide_avx2<T>, divide_avx512<T>);
  void (*dot)(const uint8_t*, int64_t, const T*, T, double*) = dot_portable<T>;
  T (*tables)(const double*, T*) = tables_portable<T>;
  void (*multiply)(const T*, const T*, T*, int64_t) = for_isa(multiply_portable<T, T>, multiply_avx2<T, T>,
                                                              multiply_avx512<T, T>);
  void (*products)(const T*, const T*, double*, int64_t) = for_isa(multiply_portable<T, double>, multiply_avx2<T, double>,
                                                                   multiply_avx512<T, double>);
  void (*products_scaled)(const T*, const T*, double, double*,
                          int64_t) = for_isa(multiply_scaled_portable<T>, multiply_scaled_avx2<T>, multiply_scaled_avx512<T>);
  void (*weigh_counts)(const T*, const int32_t*, T, T*, int64_t) = for_isa(weigh_counts_portable<T>, weigh_counts_avx2<T>,
                                                                           weigh_counts_avx512<T>);
  Kernels() {
    if constexpr (sizeof(T) == 4) {
      mix = for_isa(mix_portable<float>, mix_avx2, mix_avx512);
      if (isa() == Isa::avx512) finish = finish_avx512;
      dot = for_isa(dot_portable<float>, dot_portable<float>, dot_avx512);
      tables = for_isa(tables_portable<float>, tables_portable<float>, tables_avx512);
    }
  }
};

// A tile of a tensor as T: in place where that is its dtype, else converted into the buffer.
template <class T>
static const T* tile_of(ScalarType dtype, const void* from, T* buffer, int64_t begin, int64_t n) {
  if (dtype == kDtypeOf<T>) return static_cast<const T*>(from) + begin;
  read_tile(dtype, from, buffer, begin, n);
  return buffer;
}

constexpr int64_t kRows = 8;  // rows of alphas that share a reading of the bank

// Rows of alphas of a bank as T, by block, those of each row padded with zeros to whole groups, and their tables.
template <class T>
struct Mixture {
  std::vector<T> alphas, tables;
  std::vector<int64_t> first;  // of each block in alphas

  // Rows [begin, begin + rows) of what is given; ones where nothing is.
  Mixture(const Bank& bank, const Tensor* given, ScalarType dtype, int64_t begin, int64_t rows) {
    std::vector<T> all(rows * bank.tasks, T(1));
    const int64_t count = given ? rows * bank.tasks : 0;
    for (int64_t i = 0; i < count; i += kTile) {
      const int64_t n = std::min(kTile, count - i);
      read_tile(given->scalar_type(), given->const_data_ptr(), all.data() + i, begin * bank.tasks + i, n);
      round_tile(dtype, all.data() + i, n);  // as the reference, which has alphas in the dtype of weight
    }
    for (const Block& b : bank.blocks) {
      first.push_back(static_cast<int64_t>(alphas.size()));
      for (int64_t row = 0; row < rows; row++) {
        const auto from = all.begin() + row * bank.tasks + b.first;
        alphas.insert(alphas.end(), from, from + b.k);
        alphas.resize(first.back() + (row + 1) * padded(b.k), T(0));
      }
    }
    tables.resize(alphas.size() * 4);
    for (size_t i = 0; i < alphas.size(); i += 4) tabulate(alphas.data() + i, tables.data() + i * 4);
  }
};

// out: `rows` times the elements of weight, for the rows of alphas from `row` on.
template <class T>
static void superpose_rows(const Tensor& weight, ScalarType dtype, const Bank& bank, const Tensor* alphas, int64_t row,
                           int64_t rows, uint8_t* out) {
  const Kernels<T> kernels;
  const Mixture<T> mixture(bank, alphas, dtype, row, rows);
  const ApplyKernel select = apply_kernel(weight.element_size());
  const int64_t all = weight.numel(), element = static_cast<int64_t>(weight.element_size());
  const void* from = weight.const_data_ptr();
  const int64_t grain = std::max<int64_t>(1, kGrain / kTile / (1 + rows * bank.tasks / 16));
  parallel(tiles(all), grain, [&](int64_t begin, int64_t end) {
    alignas(64) T mixes[kTogether * kRows * kTile], buffer[kTile];
    alignas(64) uint8_t opened[kTogether][kTileBytes], product[kTile * sizeof(double)];
    for (int64_t first = begin; first < end; first += kTogether) {
      const int64_t last = std::min(end, first + kTogether);
      std::memset(mixes, 0, kTogether * rows * kTile * sizeof(T));
      std::memset(opened, 0, sizeof opened);
      for (size_t b = 0; b < bank.blocks.size(); b++) {
        const Block& block = bank.blocks[b];
        for (int64_t tile = first; tile < last; tile++)
          kernels.mix(block.data + tile * block.k * kTileBytes, block.k, rows, mixture.alphas.data() + mixture.first[b],
                      mixture.tables.data() + mixture.first[b] * 4, mixes + (tile - first) * rows * kTile, opened[tile - first]);
      }
      for (int64_t tile = first; tile < last; tile++) {
        const int64_t at = tile * kTile, n = std::min(all - at, kTile);
        const T* weights = tile_of(dtype, from, buffer, at, n);
        for (int64_t r = 0; r < rows; r++) {
          T* mix = mixes + ((tile - first) * rows + r) * kTile;
          uint8_t* to = out + (r * all + at) * element;
          if (!alphas) kernels.divide(mix, static_cast<T>(bank.tasks), kTile);
          if (kernels.finish && dtype == kDtypeOf<T>) {
            kernels.finish(weights, mix, opened[tile - first], reinterpret_cast<T*>(to), n);
            continue;
          }
          kernels.multiply(weights, mix, mix, n);
          if (dtype != kDtypeOf<T>) write_tile(dtype, mix, product, 0, n);
          select(dtype == kDtypeOf<T> ? reinterpret_cast<const uint8_t*>(mix) : product, opened[tile - first], to, n);
        }
      }
    }
  });
}

template <class T>
static void superpose_bank(const Tensor& weight, ScalarType dtype, const Bank& bank, const std::optional<Tensor>& given,
                           int64_t rows, Tensor& out) {
  const Tensor alphas = given ? dense(*given) : weight;
  if (given) floating("superpose", "alphas", alphas);
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t bytes = weight.numel() * static_cast<int64_t>(weight.element_size());
  for (int64_t row = 0; row < rows; row += kRows)
    superpose_rows<T>(weight, dtype, bank, given ? &alphas : nullptr, row, std::min(kRows, rows - row), to + row * bytes);
}

template <class T>
static void superpose_counts(const Tensor& weight, ScalarType dtype, const Tensor& counts, int64_t tasks, Tensor& out) {
  const Kernels<T> kernels;
  const int64_t all = weight.numel();
  const void* from = weight.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const auto* count = static_cast<const int32_t*>(counts.const_data_ptr());
  parallel(tiles(all), kGrain / kTile, [&](int64_t begin, int64_t end) {
    alignas(64) T product[kTile], buffer[kTile];
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t at = tile * kTile, n = std::min(all - at, kTile);
      T* result = dtype == kDtypeOf<T> ? static_cast<T*>(to) + at : product;
      kernels.weigh_counts(tile_of(dtype, from, buffer, at, n), count + at, static_cast<T>(tasks), result, n);
      if (dtype != kDtypeOf<T>) write_tile(dtype, product, to, at, n);
    }
  });
}

static Tensor superpose_cpu(const Tensor& weight_, std::vector<Tensor> blocks, std::optional<Tensor> alphas) {
  const Tensor weight = dense(weight_);
  const int64_t n = weight.numel();
  const ScalarType dtype = floating("superpose", "weight", weight);
  const Bank bank = read_bank("superpose", blocks, n);
  STD_TORCH_CHECK(!alphas || ((alphas->dim() == 1 || alphas->dim() == 2) && alphas->size(alphas->dim() - 1) == bank.tasks),
                  "superpose: alphas must be (K,) or (R, K), one for each of ", bank.tasks, " tasks, got ",
                  alphas ? alphas->numel() : 0);
  const bool many = alphas && alphas->dim() == 2;
  const int64_t rows = many ? alphas->size(0) : 1;
  std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
  if (many) sizes.insert(sizes.begin(), rows);
  Tensor out = new_dense(sizes.data(), static_cast<int64_t>(sizes.size()), dtype_code(weight));
  if (n == 0 || rows == 0) return out;
  if (dtype == ScalarType::Double)
    superpose_bank<double>(weight, dtype, bank, alphas, rows, out);
  else
    superpose_bank<float>(weight, dtype, bank, alphas, rows, out);
  return out;
}

static Tensor superpose_counts_cpu(const Tensor& weight_, const Tensor& counts_, int64_t tasks) {
  const Tensor weight = dense(weight_), counts = dense(counts_);
  const int64_t n = weight.numel();
  const ScalarType dtype = floating("superpose_counts", "weight", weight);
  STD_TORCH_CHECK(counts.numel() == n && counts.scalar_type() == ScalarType::Int,
                  "superpose_counts: counts must be int32, one for each of ", n, " weights, got ", counts.numel());
  Tensor out = new_dense_like(weight, dtype_code(weight));
  if (n == 0) return out;
  if (dtype == ScalarType::Double)
    superpose_counts<double>(weight, dtype, counts, tasks, out);
  else
    superpose_counts<float>(weight, dtype, counts, tasks, out);
  return out;
}

// <P_r, M_k> for every row r and mask k of the bank, where products_of(r, begin, n, out) gives weights of P_r in float64.
// Every chunk of tiles is summed by itself and the chunks in order: they are fixed by the number of weights, so that no number of
// threads shows.
template <class T, class ProductsOf>
static std::vector<double> dot_bank(const Bank& bank, int64_t all, int64_t rows, const ProductsOf& products_of) {
  const Kernels<T> kernels;
  const int64_t step = std::max<int64_t>(8, (tiles(all) + 63) / 64),
                chunks = std::max<int64_t>(1, (tiles(all) + step - 1) / step);
  const int64_t width = rows * bank.tasks;
  std::vector<double> sums(chunks * width, 0.0);
  const int64_t grain = std::max<int64_t>(1, kGrain / kTile / step / (1 + width / 16));
  parallel(chunks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) T tables[kTogether][kTile * 4];
    T offsets[kTogether];
    alignas(64) double products[kTile];
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t stop = std::min((chunk + 1) * step, tiles(all));
      for (int64_t first = chunk * step; first < stop; first += kTogether) {
        const int64_t last = std::min(stop, first + kTogether);
        for (int64_t row = 0; row < rows; row++) {
          double* to = sums.data() + chunk * width + row * bank.tasks;
          for (int64_t tile = first; tile < last; tile++) {
            const int64_t at = tile * kTile, n = std::min(all - at, kTile);
            if (n < kTile) std::memset(products, 0, sizeof products);
            products_of(row, at, n, products);
            offsets[tile - first] = kernels.tables(products, tables[tile - first]);
          }
          for (const Block& b : bank.blocks)
            for (int64_t tile = first; tile < last; tile++)
              kernels.dot(b.data + tile * b.k * kTileBytes, b.k, tables[tile - first], offsets[tile - first], to + b.first);
        }
      }
    }
  });
  for (int64_t chunk = 1; chunk < chunks; chunk++)
    for (int64_t i = 0; i < width; i++) sums[i] += sums[chunk * width + i];
  sums.resize(width);
  return sums;
}

// Sums to the elements of out from `begin` on, rounded to its dtype.
static void write_sums(const std::vector<double>& sums, ScalarType dtype, Tensor& out, int64_t begin) {
  write_tile(dtype, sums.data(), out.mutable_data_ptr(), begin, static_cast<int64_t>(sums.size()));
}

constexpr int64_t kGradRows = 16;  // rows of gradients that share a reading of the bank; their sums are held for every chunk

template <class T>
static std::vector<double> superpose_grad_in(const Tensor& grad, const Tensor& weight, const Bank& bank, int64_t first,
                                             int64_t rows) {
  const Kernels<T> kernels;
  const ScalarType grad_dtype = grad.scalar_type(), dtype = weight.scalar_type();
  const void *g = grad.const_data_ptr(), *w = weight.const_data_ptr();
  const int64_t all = weight.numel();
  return dot_bank<T>(bank, all, rows, [&](int64_t row, int64_t at, int64_t n, double* products) {
    alignas(64) T a[kTile], b[kTile];
    kernels.products(tile_of(grad_dtype, g, a, (first + row) * all + at, n), tile_of(dtype, w, b, at, n), products, n);
  });
}

static Tensor superpose_grad_cpu(const Tensor& grad_, const Tensor& weight_, std::vector<Tensor> blocks) {
  const Tensor grad = dense(grad_), weight = dense(weight_);
  const int64_t n = weight.numel();
  const bool many = grad.dim() == weight.dim() + 1;
  const int64_t rows = many ? grad.size(0) : 1;
  STD_TORCH_CHECK(grad.numel() == rows * n, "superpose_grad: grad must have the ", n, " elements of weight, got ",
                  grad.numel() / std::max<int64_t>(rows, 1));
  const ScalarType dtype = floating("superpose_grad", "weight", weight);
  const bool wide = dtype == ScalarType::Double || floating("superpose_grad", "grad", grad) == ScalarType::Double;
  const Bank bank = read_bank("superpose_grad", blocks, n);
  const int64_t sizes[] = {rows, bank.tasks};
  Tensor out = many ? new_dense(sizes, 2, dtype_code(weight)) : new_vector(bank.tasks, dtype_code(weight));
  if (bank.tasks == 0) return out;
  for (int64_t first = 0; first < rows; first += kGradRows) {
    const int64_t some = std::min(kGradRows, rows - first);
    write_sums(wide ? superpose_grad_in<double>(grad, weight, bank, first, some)
                    : superpose_grad_in<float>(grad, weight, bank, first, some),
               dtype, out, first * bank.tasks);
  }
  return out;
}

// A row's gradient at the weight is the outer product of grad_y and x: it is multiplied out tile by tile and never stored.
template <class T>
static std::vector<double> alpha_grad_in(const Tensor& x, const Tensor& grad_y, const Tensor& weight, const Bank& bank,
                                         int64_t first, int64_t rows) {
  const Kernels<T> kernels;
  const ScalarType dtype = weight.scalar_type();
  const int64_t inputs = x.size(1), outputs = grad_y.size(1);
  std::vector<T> xs(rows * inputs), gs(rows * outputs);
  read_tile(x.scalar_type(), x.const_data_ptr(), xs.data(), first * inputs, rows * inputs);
  read_tile(grad_y.scalar_type(), grad_y.const_data_ptr(), gs.data(), first * outputs, rows * outputs);
  const void* w = weight.const_data_ptr();
  return dot_bank<T>(bank, weight.numel(), rows, [&](int64_t row, int64_t at, int64_t n, double* products) {
    alignas(64) T buffer[kTile];
    const T* tile = tile_of(dtype, w, buffer, at, n);
    for (int64_t i = 0; i < n;) {  // the part of every output's weights that lies in the tile
      const int64_t o = (at + i) / inputs, from = (at + i) % inputs, count = std::min(inputs - from, n - i);
      kernels.products_scaled(tile + i, xs.data() + row * inputs + from, static_cast<double>(gs[row * outputs + o]), products + i,
                              count);
      i += count;
    }
  });
}

static Tensor alpha_grad_cpu(const Tensor& x_, const Tensor& grad_y_, const Tensor& weight_, std::vector<Tensor> blocks) {
  const Tensor x = dense(x_), grad_y = dense(grad_y_), weight = dense(weight_);
  STD_TORCH_CHECK(x.dim() == 2 && grad_y.dim() == 2 && weight.dim() == 2 && x.size(0) == grad_y.size(0) &&
                      x.size(1) == weight.size(1) && grad_y.size(1) == weight.size(0),
                  "alpha_grad: x must be (B, I), grad_y (B, O) and weight (O, I)");
  const ScalarType dtype = floating("alpha_grad", "x", x);
  const bool wide = dtype == ScalarType::Double || floating("alpha_grad", "grad_y", grad_y) == ScalarType::Double ||
                    floating("alpha_grad", "weight", weight) == ScalarType::Double;
  const Bank bank = read_bank("alpha_grad", blocks, weight.numel());
  const int64_t sizes[] = {x.size(0), bank.tasks};
  Tensor out = new_dense(sizes, 2, dtype_code(x));
  if (bank.tasks == 0) return out;
  for (int64_t first = 0; first < sizes[0]; first += kGradRows) {
    const int64_t rows = std::min(kGradRows, sizes[0] - first);
    write_sums(wide ? alpha_grad_in<double>(x, grad_y, weight, bank, first, rows)
                    : alpha_grad_in<float>(x, grad_y, weight, bank, first, rows),
               dtype, out, first * bank.tasks);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("superpose", TORCH_BOX(&superpose_cpu));
  m.impl("superpose_counts", TORCH_BOX(&superpose_counts_cpu));
  m.impl("superpose_grad", TORCH_BOX(&superpose_grad_cpu));
  m.impl("alpha_grad", TORCH_BOX(&alpha_grad_cpu));
}
