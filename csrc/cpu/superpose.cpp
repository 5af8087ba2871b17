// superpose, superpose_counts, superpose_grad, alpha_grad: one weight through a whole bank of masks, and what each mask would
// have changed.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "superpose_dot.h"

namespace {

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
