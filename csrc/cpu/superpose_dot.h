// One tile of products through the masks of a block: the sum that each mask opens.
#pragma once
#include <cmath>

#include "superpose_mix.h"

namespace {

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

}  // namespace
