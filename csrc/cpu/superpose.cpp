// superpose, superpose_grad, alpha_grad: one weight through a whole bank of masks, and what each mask would have changed.
#include <immintrin.h>

#include <algorithm>
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
// mix += sum_k alpha_k M_k over one tile of k <= 64 tasks, 64 bytes each; opened |= each of them.
// alphas: k of them, padded with zeros to groups of 8; tables: two for a group.

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
static void mix_portable(const uint8_t* lines, int64_t k, const T*, const T* tables, T* mix, uint8_t* opened) {
  T sum[kTile] = {};
  for (int64_t first = 0; first < k; first += kGroup, tables += 32, lines += kGroup * kTileBytes) {
    const int64_t tasks = k - first < kGroup ? k - first : kGroup;
    for (int64_t i = 0; i < kTileBytes; i++) {
      uint64_t codes = 0;
      for (int64_t t = 0; t < tasks; t++)
        codes |= uint64_t{lines[t * kTileBytes + i]} << 8 * t, opened[i] |= lines[t * kTileBytes + i];
      codes = transpose_bits(codes);
      for (int64_t j = 0; j < 8; j++, codes >>= 8) sum[i * 8 + j] += tables[codes & 15] + tables[16 + (codes >> 4 & 15)];
    }
  }
  for (int64_t i = 0; i < kTile; i++) mix[i] += sum[i];
}

// Eight floats, alpha where the bit of a byte is set, else 0.
SK_AVX2 static inline __m256 where_avx2(uint8_t byte, float alpha) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i open = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi8(static_cast<char>(byte)), bit), bit);
  return _mm256_and_ps(_mm256_set1_ps(alpha), _mm256_castsi256_ps(open));
}

// Without a lookup by sixteen: the same sums from masked numbers.
SK_AVX2 static void mix_avx2(const uint8_t* lines, int64_t k, const float* alphas, const float*, float* mix, uint8_t* opened) {
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

// Lane q of 128 bits of v[p] to lane p of out[q].
SK_AVX512 static inline void transpose_lanes(const __m512i v[4], __m512i out[4]) {
  const __m512i a = _mm512_shuffle_i64x2(v[0], v[1], 0x44), b = _mm512_shuffle_i64x2(v[0], v[1], 0xee);
  const __m512i c = _mm512_shuffle_i64x2(v[2], v[3], 0x44), d = _mm512_shuffle_i64x2(v[2], v[3], 0xee);
  out[0] = _mm512_shuffle_i64x2(a, c, 0x88), out[1] = _mm512_shuffle_i64x2(a, c, 0xdd);
  out[2] = _mm512_shuffle_i64x2(b, d, 0x88), out[3] = _mm512_shuffle_i64x2(b, d, 0xdd);
}

// Byte orders of mix_avx512: the bytes of eight tasks side by side, last task first, as the bit transposition wants them; and the
// codes of 64 weights so that those of 16 consecutive weights are the same byte of 16 dwords.
struct Orders {
  uint8_t gather[64], spread[64];
};
constexpr Orders orders() {
  Orders o{};
  for (int i = 0; i < 8; i++)
    for (int t = 0; t < 8; t++) o.gather[i * 8 + 7 - t] = static_cast<uint8_t>(t * 8 + i);
  for (int d = 0; d < 16; d++)
    for (int i = 0; i < 4; i++) o.spread[d * 4 + i] = static_cast<uint8_t>(i * 16 + d);
  return o;
}
static constexpr Orders kOrders = orders();

SK_AVX512 static void mix_avx512(const uint8_t* lines, int64_t k, const float*, const float* tables, float* mix,
                                 uint8_t* opened) {
  const __m512i gather = _mm512_loadu_si512(kOrders.gather), spread = _mm512_loadu_si512(kOrders.spread);
  const __m512i unit = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
  const int64_t groups = (k + kGroup - 1) / kGroup;
  alignas(64) uint8_t codes[8][kBlockTasks / kGroup][64];  // [64 weights][group of tasks]: a byte a weight
  __m512i any = _mm512_loadu_si512(opened);
  for (int64_t g = 0; g < groups; g++) {
    __m512i row[8], odd[4], even[4], piece[8];
#pragma GCC unroll 8
    for (int64_t t = 0; t < 8; t++) {
      const int64_t task = g * kGroup + t;
      row[t] = task < k ? _mm512_loadu_si512(lines + task * kTileBytes) : _mm512_setzero_si512();
      any = _mm512_or_si512(any, row[t]);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; i++) {
      even[i] = _mm512_unpacklo_epi64(row[2 * i], row[2 * i + 1]);
      odd[i] = _mm512_unpackhi_epi64(row[2 * i], row[2 * i + 1]);
    }
    transpose_lanes(even, piece), transpose_lanes(odd, piece + 4);
#pragma GCC unroll 8
    for (int64_t q = 0; q < 8; q++) {
      const __m512i bytes = _mm512_permutexvar_epi8(gather, piece[q % 2 * 4 + q / 2]);
      const __m512i code = _mm512_permutexvar_epi8(spread, _mm512_gf2p8affine_epi64_epi8(unit, bytes, 0));
      _mm512_store_si512(codes[q][g], code);
    }
  }
  _mm512_storeu_si512(opened, any);
  for (int64_t q = 0; q < 8; q++) {
    __m512 sum[4];
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
      const __m512i code = _mm512_load_si512(codes[q][g]);
      const __m512 low = _mm512_loadu_ps(tables + g * 32), high = _mm512_loadu_ps(tables + g * 32 + 16);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512 a = _mm512_permutexvar_ps(_mm512_srli_epi32(code, 8 * i), low);
        const __m512 b = _mm512_permutexvar_ps(_mm512_srli_epi32(code, 8 * i + 4), high);
        sum[i] = _mm512_add_ps(sum[i], _mm512_add_ps(a, b));
      }
    }
    for (int64_t i = 0; i < 4; i++) {
      float* to = mix + q * 64 + i * 16;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i]));
    }
  }
}

// ------------------------------------------------------------------------------------------------------ superpose_grad
// sums[k] += sum over one tile of products where M_k is open, from the tables of the tile, one for every four weights.
// A table holds float64 sums rounded to T; four of those are added in T, and the rest in float64: with one rounding for the
// products and their first two sums, the error stays below twice that of products in T that are all summed in float64.

template <class T>
static void dot_portable(const uint8_t* lines, int64_t k, const T* tables, double* sums) {
  for (int64_t task = 0; task < k; task++)
    for (int64_t i = 0; i < kTileBytes; i += 2) {
      const uint8_t a = lines[task * kTileBytes + i], b = lines[task * kTileBytes + i + 1];
      const T* table = tables + i * 32;
      sums[task] += static_cast<double>((table[a & 15] + table[16 + (a >> 4)]) + (table[32 + (b & 15)] + table[48 + (b >> 4)]));
    }
}

// Sixteen floats of a table, those that the lowest four bits of every lane choose.
SK_AVX512 static inline __m512 look_up(__m512i bits, const float* table) {
  return _mm512_permutexvar_ps(bits, _mm512_loadu_ps(table));
}

SK_AVX512 static void dot_avx512(const uint8_t* lines, int64_t k, const float* tables, double* sums) {
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
    const int64_t here = k - first < 16 ? k - first : 16;
    const auto low_tasks = static_cast<__mmask8>(low_bits(here)), high_tasks = static_cast<__mmask8>(low_bits(here) >> 8);
    __m512d low = _mm512_maskz_loadu_pd(low_tasks, sums + first), high = _mm512_maskz_loadu_pd(high_tasks, sums + first + 8);
#pragma GCC unroll 16
    for (int64_t c = 0; c < 16; c++) {
      const __m512i bits = dword[c % 4 * 4 + c / 4];
      const float* table = tables + c * 8 * 16;
#pragma GCC unroll 2
      for (int half = 0; half < 32; half += 16, table += 64) {
        const __m512 a =
            _mm512_add_ps(look_up(_mm512_srli_epi32(bits, half), table), look_up(_mm512_srli_epi32(bits, half + 4), table + 16));
        const __m512 b = _mm512_add_ps(look_up(_mm512_srli_epi32(bits, half + 8), table + 32),
                                       look_up(_mm512_srli_epi32(bits, half + 12), table + 48));
        const __m512 sum = _mm512_add_ps(a, b);
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(sum)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1)));
      }
    }
    _mm512_mask_storeu_pd(sums + first, low_tasks, low), _mm512_mask_storeu_pd(sums + first + 8, high_tasks, high);
  }
}

// The tables of a tile: 128 of sixteen sums ((0 + 1) + 2) + 3.
template <class T>
static void tables_portable(const double* products, T* tables) {
  for (int64_t i = 0; i < kTile; i += 4)
    for (int64_t code = 0; code < 8; code++) {
      const double* p = products + i;
      const double sum = ((code & 1 ? p[0] : 0.0) + (code & 2 ? p[1] : 0.0)) + (code & 4 ? p[2] : 0.0);
      tables[i * 4 + code] = static_cast<T>(sum), tables[i * 4 + 8 + code] = static_cast<T>(sum + p[3]);
    }
}
SK_AVX512 static void tables_avx512(const double* products, float* tables) {
  for (int64_t i = 0; i < kTile; i += 4) {
    __m512d sum = _mm512_maskz_mov_pd(0xaa, _mm512_set1_pd(products[i]));
    sum = _mm512_mask_add_pd(sum, 0xcc, sum, _mm512_set1_pd(products[i + 1]));
    sum = _mm512_mask_add_pd(sum, 0xf0, sum, _mm512_set1_pd(products[i + 2]));
    _mm256_storeu_ps(tables + i * 4, _mm512_cvtpd_ps(sum));
    _mm256_storeu_ps(tables + i * 4 + 8, _mm512_cvtpd_ps(_mm512_add_pd(sum, _mm512_set1_pd(products[i + 3]))));
  }
}

// --------------------------------------------------------------------------------------------------------- elementwise
// Plain loops over a tile, compiled once for each set.

// out = a * b, in the type of out
template <class T, class Out>
static inline __attribute__((always_inline)) void multiply(const T* a, const T* b, Out* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<Out>(a[i]) * static_cast<Out>(b[i]);
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

// ----------------------------------------------------------------------------------------------------------------- ops

// The kernels for compute type T.
template <class T>
struct Kernels {
  void (*mix)(const uint8_t*, int64_t, const T*, const T*, T*, uint8_t*) = mix_portable<T>;
  void (*dot)(const uint8_t*, int64_t, const T*, double*) = dot_portable<T>;
  void (*tables)(const double*, T*) = tables_portable<T>;
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

// Alphas of a bank as T, those of each block padded with zeros to whole groups, and their tables.
template <class T>
struct Mixture {
  std::vector<T> alphas, tables;
  std::vector<int64_t> first;  // of each block in alphas

  Mixture(const Bank& bank, const std::optional<Tensor>& given, ScalarType dtype) {
    std::vector<T> all(bank.tasks, T(1));
    if (given) {
      const Tensor source = dense(*given);
      const ScalarType alpha_dtype = floating("superpose", "alphas", source);
      for (int64_t i = 0; i < bank.tasks; i += kTile) {
        const int64_t n = std::min(kTile, bank.tasks - i);
        read_tile(alpha_dtype, source.const_data_ptr(), all.data() + i, i, n);
        round_tile(dtype, all.data() + i, n);  // as the reference, which has alphas in the dtype of weight
      }
    }
    for (const Block& b : bank.blocks) {
      first.push_back(static_cast<int64_t>(alphas.size()));
      alphas.insert(alphas.end(), all.begin() + b.first, all.begin() + b.first + b.k);
      alphas.resize((alphas.size() + kGroup - 1) / kGroup * kGroup, T(0));
    }
    tables.resize(alphas.size() * 4);
    for (size_t i = 0; i < alphas.size(); i += 4) tabulate(alphas.data() + i, tables.data() + i * 4);
  }
};

template <class T>
static void superpose_bank(const Tensor& weight, ScalarType dtype, const Bank& bank, const std::optional<Tensor>& alphas,
                           Tensor& out) {
  const Kernels<T> kernels;
  const Mixture<T> mixture(bank, alphas, dtype);
  const ApplyKernel select = apply_kernel(weight.element_size());
  const int64_t all = weight.numel(), element = static_cast<int64_t>(weight.element_size());
  const void* from = weight.const_data_ptr();
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / kTile / (1 + bank.tasks / 16));
  parallel(tiles(all), grain, [&](int64_t begin, int64_t end) {
    alignas(64) T mixes[kTogether][kTile], buffer[kTile];
    alignas(64) uint8_t opened[kTogether][kTileBytes], product[kTile * sizeof(double)];
    for (int64_t first = begin; first < end; first += kTogether) {
      const int64_t last = std::min(end, first + kTogether);
      std::memset(mixes, 0, sizeof mixes);
      std::memset(opened, 0, sizeof opened);
      for (size_t b = 0; b < bank.blocks.size(); b++) {
        const Block& block = bank.blocks[b];
        for (int64_t tile = first; tile < last; tile++)
          kernels.mix(block.data + tile * block.k * kTileBytes, block.k, mixture.alphas.data() + mixture.first[b],
                      mixture.tables.data() + mixture.first[b] * 4, mixes[tile - first], opened[tile - first]);
      }
      for (int64_t tile = first; tile < last; tile++) {
        const int64_t at = tile * kTile, n = std::min(all - at, kTile);
        T* mix = mixes[tile - first];
        if (!alphas)
          for (int64_t i = 0; i < kTile; i++) mix[i] /= static_cast<T>(bank.tasks);
        kernels.multiply(tile_of(dtype, from, buffer, at, n), mix, mix, n);
        if (dtype != kDtypeOf<T>) write_tile(dtype, mix, product, 0, n);
        select(dtype == kDtypeOf<T> ? reinterpret_cast<const uint8_t*>(mix) : product, opened[tile - first], to + at * element,
               n);
      }
    }
  });
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

template <class T>
static void superpose_in(const Tensor& weight, ScalarType dtype, const Bank& bank, const std::optional<Tensor>& alphas,
                         const std::optional<Tensor>& counts, Tensor& out) {
  if (!alphas && counts) return superpose_counts<T>(weight, dtype, dense(*counts), bank.tasks, out);
  superpose_bank<T>(weight, dtype, bank, alphas, out);
}

static Tensor superpose_cpu(const Tensor& weight_, std::vector<Tensor> blocks, std::optional<Tensor> alphas,
                            std::optional<Tensor> counts) {
  const Tensor weight = dense(weight_);
  const int64_t n = weight.numel();
  const ScalarType dtype = floating("superpose", "weight", weight);
  const Bank bank = read_bank("superpose", blocks, n);
  STD_TORCH_CHECK(!alphas || alphas->numel() == bank.tasks, "superpose: alphas must be one for each of ", bank.tasks,
                  " tasks, got ", alphas ? alphas->numel() : 0);
  STD_TORCH_CHECK(!counts || (counts->numel() == n && counts->scalar_type() == ScalarType::Int),
                  "superpose: counts must be int32, one for each of ", n, " weights, got ", counts ? counts->numel() : 0);
  Tensor out = new_dense_like(weight, dtype_code(weight));
  if (n == 0) return out;
  if (dtype == ScalarType::Double)
    superpose_in<double>(weight, dtype, bank, alphas, counts, out);
  else
    superpose_in<float>(weight, dtype, bank, alphas, counts, out);
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
            kernels.tables(products, tables[tile - first]);
          }
          for (const Block& b : bank.blocks)
            for (int64_t tile = first; tile < last; tile++)
              kernels.dot(b.data + tile * b.k * kTileBytes, b.k, tables[tile - first], to + b.first);
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

template <class T>
static std::vector<double> superpose_grad_in(const Tensor& grad, const Tensor& weight, const Bank& bank) {
  const Kernels<T> kernels;
  const ScalarType grad_dtype = grad.scalar_type(), dtype = weight.scalar_type();
  const void *g = grad.const_data_ptr(), *w = weight.const_data_ptr();
  return dot_bank<T>(bank, weight.numel(), 1, [&](int64_t, int64_t at, int64_t n, double* products) {
    alignas(64) T a[kTile], b[kTile];
    kernels.products(tile_of(grad_dtype, g, a, at, n), tile_of(dtype, w, b, at, n), products, n);
  });
}

static Tensor superpose_grad_cpu(const Tensor& grad_, const Tensor& weight_, std::vector<Tensor> blocks) {
  const Tensor grad = dense(grad_), weight = dense(weight_);
  const int64_t n = weight.numel();
  STD_TORCH_CHECK(grad.numel() == n, "superpose_grad: grad must have the ", n, " elements of weight, got ", grad.numel());
  const ScalarType dtype = floating("superpose_grad", "weight", weight);
  const bool wide = dtype == ScalarType::Double || floating("superpose_grad", "grad", grad) == ScalarType::Double;
  const Bank bank = read_bank("superpose_grad", blocks, n);
  Tensor out = new_vector(bank.tasks, dtype_code(weight));
  if (bank.tasks == 0) return out;
  write_sums(wide ? superpose_grad_in<double>(grad, weight, bank) : superpose_grad_in<float>(grad, weight, bank), dtype, out, 0);
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
  constexpr int64_t kRows = 16;  // rows that share a reading of the bank; their sums are held for every chunk
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
  for (int64_t first = 0; first < sizes[0]; first += kRows) {
    const int64_t rows = std::min(kRows, sizes[0] - first);
    write_sums(wide ? alpha_grad_in<double>(x, grad_y, weight, bank, first, rows)
                    : alpha_grad_in<float>(x, grad_y, weight, bank, first, rows),
               dtype, out, first * bank.tasks);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("superpose", TORCH_BOX(&superpose_cpu));
  m.impl("superpose_grad", TORCH_BOX(&superpose_grad_cpu));
  m.impl("alpha_grad", TORCH_BOX(&alpha_grad_cpu));
}
