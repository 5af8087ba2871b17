// superpose, superpose_grad: one weight through a whole bank of masks, and what each mask would have changed.
#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../floats.h"

using torch::stable::parallel_for;

namespace {

// Sums over tasks are taken block by block, and in a block task by task: their order depends on nothing but the bank.

// ------------------------------------------- mix += sum_k alpha_k M_k over one tile; lines: k lines of 64 bytes; opened |= any
// M_k

template <class T>
static inline __attribute__((always_inline)) void mix_line(const uint8_t* line, T alpha, T* sum) {
  for (int64_t i = 0; i < kTile; i++) sum[i] += is_open(line, i) ? alpha : T(0);
}

template <class T>
static void mix_portable(const uint8_t* lines, int64_t k, const T* alphas, T* mix, uint8_t* opened) {
  alignas(64) T sum[kTile] = {};
  for (int64_t task = 0; task < k; task++) {
    const uint8_t* line = lines + task * kTileBytes;
    for (int64_t i = 0; i < kTileBytes; i++) {
      for (int64_t j = 0; j < 8; j++) sum[i * 8 + j] += line[i] >> j & 1 ? alphas[task] : T(0);
      opened[i] |= line[i];
    }
  }
  for (int64_t i = 0; i < kTile; i++) mix[i] += sum[i];
}

SK_AVX2 static void mix_avx2(const uint8_t* lines, int64_t k, const float* alphas, float* mix, uint8_t* opened) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int64_t part = 0; part < kTileBytes; part += 8) {  // 64 weights at a time: eight sums in registers
    __m256 sum[8];
    for (auto& s : sum) s = _mm256_setzero_ps();
    uint64_t any = load_word(opened + part);
    for (int64_t task = 0; task < k; task++) {
      const uint8_t* line = lines + task * kTileBytes + part;
      any |= load_word(line);
      const __m256 alpha = _mm256_set1_ps(alphas[task]);
      for (int64_t j = 0; j < 8; j++) {
        const __m256i open = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(line[j]), bit), bit);
        sum[j] = _mm256_add_ps(sum[j], _mm256_and_ps(alpha, _mm256_castsi256_ps(open)));
      }
    }
    store_word(opened + part, any);
    for (int64_t j = 0; j < 8; j++) {
      float* to = mix + part * 8 + j * 8;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum[j]));
    }
  }
}

SK_AVX512 static void mix_avx512(const uint8_t* lines, int64_t k, const float* alphas, float* mix, uint8_t* opened) {
  __m512i any = _mm512_loadu_si512(opened);
  for (int64_t half = 0; half < 2; half++) {  // 256 weights at a time: sixteen sums in registers
    const uint8_t* line = lines + half * 32;
    __m512 sum[16];
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (int64_t task = 0; task < k; task++, line += kTileBytes) {
      const __m512 alpha = _mm512_set1_ps(alphas[task]);
      if (half == 0) any = _mm512_or_si512(any, _mm512_loadu_si512(line));
      for (int64_t j = 0; j < 16; j++) {
        __mmask16 open;
        __builtin_memcpy(&open, line + j * 2, 2);
        sum[j] = _mm512_mask_add_ps(sum[j], open, sum[j], alpha);
      }
    }
    for (int64_t j = 0; j < 16; j++) {
      float* to = mix + half * 256 + j * 16;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[j]));
    }
  }
  _mm512_storeu_si512(opened, any);
}

// --------------------------------------------- sums[k] += sum over one tile of products where M_k is open, in float64; k <= 64

static void dot_portable(const uint8_t* lines, int64_t k, const double* products, double* sums) {
  for (int64_t task = 0; task < k; task++) {
    double lanes[8] = {};
    for (int64_t i = 0; i < kTileBytes; i++)
      for (int64_t j = 0; j < 8; j++) lanes[j] += lines[task * kTileBytes + i] >> j & 1 ? products[i * 8 + j] : 0.0;
    sums[task] += ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
}

SK_AVX2 static void dot_avx2(const uint8_t* lines, int64_t k, const double* products, double* sums) {
  const __m256i low = _mm256_setr_epi64x(1, 2, 4, 8), high = _mm256_setr_epi64x(16, 32, 64, 128);
  for (int64_t task = 0; task < k; task++) {
    const uint8_t* line = lines + task * kTileBytes;
    __m256d a = _mm256_setzero_pd(), b = a;
    for (int64_t i = 0; i < kTileBytes; i++) {
      const __m256i byte = _mm256_set1_epi64x(line[i]);
      const __m256d open_a = _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(byte, low), low));
      const __m256d open_b = _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(byte, high), high));
      a = _mm256_add_pd(a, _mm256_and_pd(open_a, _mm256_loadu_pd(products + i * 8)));
      b = _mm256_add_pd(b, _mm256_and_pd(open_b, _mm256_loadu_pd(products + i * 8 + 4)));
    }
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(a, b));
    sums[task] += (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  }
}

SK_AVX512 static void dot_avx512(const uint8_t* lines, int64_t k, const double* products, double* sums) {
  for (int64_t task = 0; task < k; task++) {
    const uint8_t* line = lines + task * kTileBytes;
    __m512d lane[4];
    for (auto& l : lane) l = _mm512_setzero_pd();
    for (int64_t i = 0; i < kTileBytes; i += 4)
      for (int64_t j = 0; j < 4; j++)
        lane[j] = _mm512_mask_add_pd(lane[j], line[i + j], lane[j], _mm512_loadu_pd(products + (i + j) * 8));
    double lanes[8];
    _mm512_storeu_pd(lanes, _mm512_add_pd(_mm512_add_pd(lane[0], lane[1]), _mm512_add_pd(lane[2], lane[3])));
    sums[task] += ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
}

// ----------------------------------------------------------------------------------------------------------------------------
// ops

struct Block {
  const uint8_t* data;
  int64_t k, first;  // tasks in it, and before it
};

struct Bank {
  std::vector<Tensor> tensors;  // keeps the memory of the blocks
  std::vector<Block> blocks;
  int64_t tasks = 0;
};

static Bank read_bank(const char* op, const std::vector<Tensor>& tensors, int64_t n) {
  Bank bank;
  for (const Tensor& t : tensors) {
    const Tensor block = dense(t);
    STD_TORCH_CHECK(block.scalar_type() == ScalarType::Byte && block.dim() == 3 && block.size(0) == tiles(n) &&
                        block.size(1) <= kBlockTasks && block.size(2) == kTileBytes,
                    op, ": a block of the bank must be uint8 (", tiles(n), ", at most ", kBlockTasks, ", ", kTileBytes, ") for ",
                    n, " weights");
    bank.tensors.push_back(block);
    bank.blocks.push_back({static_cast<const uint8_t*>(block.const_data_ptr()), block.size(1), bank.tasks});
    bank.tasks += block.size(1);
  }
  return bank;
}

template <class T>
static auto mix_kernel() {
  if constexpr (sizeof(T) == 4)
    return for_isa(mix_portable<float>, mix_avx2, mix_avx512);
  else
    return for_isa(mix_portable<double>, mix_portable<double>, mix_portable<double>);
}

// out = opened ? weight * mix : 0 over the tiles begin to end, where mix_of(tile, mix, opened) tells what the masks of a tile
// amount to.
template <class T, class MixOf>
static void weigh_tiles(const Tensor& weight, ScalarType dtype, Tensor& out, int64_t begin, int64_t end, const MixOf& mix_of) {
  const int64_t all = weight.numel(), element = static_cast<int64_t>(weight.element_size());
  const ApplyKernel select = apply_kernel(weight.element_size());
  const void* from = weight.const_data_ptr();
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  alignas(64) T mix[kTile], w[kTile];
  alignas(64) uint8_t opened[kTileBytes], product[kTile * sizeof(double)];
  for (int64_t tile = begin; tile < end; tile++) {
    const int64_t at = tile * kTile, n = std::min(all - at, kTile);
    std::fill(mix, mix + kTile, T(0));
    std::fill(opened, opened + kTileBytes, 0);
    mix_of(tile, mix, opened);
    read_tile(dtype, from, w, at, n);
    for (int64_t i = 0; i < n; i++) w[i] *= mix[i];
    write_tile(dtype, w, product, 0, n);
    select(product, opened, to + at * element, n);
  }
}

template <class T>
static void superpose_bank(const Tensor& weight, ScalarType dtype, const Bank& bank, const std::vector<T>& alphas, bool equal,
                           Tensor& out) {
  const auto kernel = mix_kernel<T>();
  const int64_t grain = std::max<int64_t>(1, kGrain / kTile / (1 + bank.tasks / 16));
  parallel_for(0, tiles(weight.numel()), grain, [&](int64_t begin, int64_t end) {
    weigh_tiles<T>(weight, dtype, out, begin, end, [&](int64_t tile, T* mix, uint8_t* opened) {
      for (const Block& b : bank.blocks) kernel(b.data + tile * b.k * kTileBytes, b.k, alphas.data() + b.first, mix, opened);
      if (equal)
        for (int64_t i = 0; i < kTile; i++) mix[i] /= static_cast<T>(bank.tasks);
    });
  });
}

template <class T>
static void superpose_counts(const Tensor& weight, ScalarType dtype, const Tensor& counts, int64_t tasks, Tensor& out) {
  const auto* count = static_cast<const int32_t*>(counts.const_data_ptr());
  const int64_t n = weight.numel();
  parallel_for(0, tiles(n), kGrain / kTile, [&](int64_t begin, int64_t end) {
    weigh_tiles<T>(weight, dtype, out, begin, end, [&](int64_t tile, T* mix, uint8_t* opened) {
      for (int64_t i = tile * kTile, j = 0; j < std::min(kTile, n - tile * kTile); i++, j++) {
        mix[j] = static_cast<T>(count[i]) / static_cast<T>(tasks);
        opened[j >> 3] |= static_cast<uint8_t>((count[i] > 0) << (j & 7));
      }
    });
  });
}

template <class T>
static void superpose_in(const Tensor& weight, ScalarType dtype, const Bank& bank, const std::optional<Tensor>& alphas_,
                         const std::optional<Tensor>& counts, Tensor& out) {
  if (!alphas_ && counts) return superpose_counts<T>(weight, dtype, dense(*counts), bank.tasks, out);
  std::vector<T> alphas(bank.tasks, T(1));
  if (alphas_) {
    const Tensor given = dense(*alphas_);
    const ScalarType alpha_dtype = floating("superpose", "alphas", given);
    for (int64_t i = 0; i < bank.tasks; i += kTile) {
      const int64_t n = std::min(kTile, bank.tasks - i);
      read_tile(alpha_dtype, given.const_data_ptr(), alphas.data() + i, i, n);
      round_tile(dtype, alphas.data() + i, n);
    }
  }
  superpose_bank<T>(weight, dtype, bank, alphas, !alphas_, out);
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

// Tiles that are summed together before threads are joined: fixed by the number of weights, so that no number of threads shows.
static int64_t chunk_tiles(int64_t n) { return std::max<int64_t>(8, (tiles(n) + 63) / 64); }

static Tensor superpose_grad_cpu(const Tensor& grad_, const Tensor& weight_, std::vector<Tensor> blocks) {
  const Tensor grad = dense(grad_), weight = dense(weight_);
  const int64_t n = weight.numel();
  STD_TORCH_CHECK(grad.numel() == n, "superpose_grad: grad must have the ", n, " elements of weight, got ", grad.numel());
  const ScalarType grad_dtype = floating("superpose_grad", "grad", grad), dtype = floating("superpose_grad", "weight", weight);
  const ScalarType product_dtype = promote(grad_dtype, dtype);
  const Bank bank = read_bank("superpose_grad", blocks, n);
  Tensor out = new_vector(bank.tasks, dtype_code(weight));
  if (bank.tasks == 0) return out;
  const int64_t step = chunk_tiles(n), chunks = (tiles(n) + step - 1) / step;
  std::vector<double> sums(std::max<int64_t>(chunks, 1) * bank.tasks, 0.0);
  const void *g = grad.const_data_ptr(), *w = weight.const_data_ptr();
  const auto kernel = for_isa(dot_portable, dot_avx2, dot_avx512);
  const int64_t grain = std::max<int64_t>(1, kGrain / kTile / step / (1 + bank.tasks / 16));
  parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) double products[kTile], other[kTile];
    for (int64_t tile = begin * step; tile < std::min(end * step, tiles(n)); tile++) {
      const int64_t at = tile * kTile, here = std::min(n - at, kTile);
      std::fill(products, products + kTile, 0.0);
      read_tile(grad_dtype, g, products, at, here);
      read_tile(dtype, w, other, at, here);
      for (int64_t i = 0; i < here; i++) products[i] *= other[i];
      round_tile(product_dtype, products, here);
      double* to = sums.data() + tile / step * bank.tasks;
      for (const Block& b : bank.blocks) kernel(b.data + tile * b.k * kTileBytes, b.k, products, to + b.first);
    }
  });
  for (int64_t chunk = 1; chunk < chunks; chunk++)
    for (int64_t task = 0; task < bank.tasks; task++) sums[task] += sums[chunk * bank.tasks + task];
  for (int64_t task = 0; task < bank.tasks; task += kTile)
    write_tile(dtype, sums.data() + task, static_cast<uint8_t*>(out.mutable_data_ptr()) + task * weight.element_size(), 0,
               std::min(kTile, bank.tasks - task));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("superpose", TORCH_BOX(&superpose_cpu));
  m.impl("superpose_grad", TORCH_BOX(&superpose_grad_cpu));
}
