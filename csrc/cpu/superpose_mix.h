// One tile of weights through the masks of a block: what coefficients make of the open ones.
#pragma once
#include <immintrin.h>

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

}  // namespace
