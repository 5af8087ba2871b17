// apply, restore_, straight_through: weights through a mask, frozen ones put back, and the gradients of both.
#include <immintrin.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../floats.h"

namespace {

constexpr int64_t kTileGrain = kGrain / kTile;

// Elements are moved by their size in bytes, S, and never interpreted. A word of 64 mask bits covers 64 weights, S lines of 64
// bytes.

// --------------------------------------------------------------------------------------------------------------- apply
// out[i] = open ? weight[i] : 0 for n weights.

template <int S>
static inline void apply_one(const uint8_t* weight, bool open, uint8_t* out) {
  if (open)
    std::memcpy(out, weight, S);
  else
    std::memset(out, 0, S);
}

template <int S>
static void apply_portable(const uint8_t* weight, const uint8_t* bits, uint8_t* out, int64_t n) {
  using Part =
      std::conditional_t<S == 1, uint8_t, std::conditional_t<S == 2, uint16_t, std::conditional_t<S == 4, uint32_t, uint64_t>>>;
  constexpr int kParts = S / sizeof(Part);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const unsigned byte = bits[i >> 3];
    Part w[8 * kParts];
    std::memcpy(w, weight + i * S, 8 * S);
    for (int j = 0; j < 8 * kParts; j++) w[j] &= static_cast<Part>(-static_cast<Part>(byte >> j / kParts & 1));
    std::memcpy(out + i * S, w, 8 * S);
  }
  for (; i < n; i++) apply_one<S>(weight + i * S, is_open(bits, i), out + i * S);
}

// The lowest 32 / S bits of m, each spread over an element of S bytes: all ones where set.
template <int S>
SK_AVX2 static inline __m256i spread_avx2(uint32_t m) {
  if constexpr (S == 1) {
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(m)), byte), bit), bit);
  } else if constexpr (S == 2) {
    const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(m)), bit), bit);
  } else if constexpr (S == 4) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(m)), bit), bit);
  } else {
    const __m256i bit = S == 8 ? _mm256_setr_epi64x(1, 2, 4, 8) : _mm256_setr_epi64x(1, 1, 2, 2);
    return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(m), bit), bit);
  }
}

template <int S>
SK_AVX2 static void apply_avx2(const uint8_t* weight, const uint8_t* bits, uint8_t* out, int64_t n) {
  constexpr int kLanes = 32 / S;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word = load_word(bits + i / 8);
    ask_ahead(weight + i * S, 64 * S);
    for (int j = 0; j < 64; j += kLanes, word >>= kLanes & 63) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + (i + j) * S));
      const __m256i open = spread_avx2<S>(static_cast<uint32_t>(word));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i + j) * S), _mm256_and_si256(w, open));
    }
  }
  for (; i < n; i++) apply_one<S>(weight + i * S, is_open(bits, i), out + i * S);
}

// 64 / S elements of S bytes, those whose bit is set in m; the others are neither read nor written.
template <int S>
SK_AVX512 static inline __m512i load_avx512(const uint8_t* p, uint64_t m) {
  if constexpr (S == 1) return _mm512_maskz_loadu_epi8(m, p);
  if constexpr (S == 2) return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(m), p);
  if constexpr (S == 4) return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(m), p);
  if constexpr (S == 8) return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(m), p);
  if constexpr (S == 16) return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(_pdep_u32(static_cast<uint32_t>(m), 0x55) * 3), p);
}
template <int S>
SK_AVX512 static inline void store_avx512(uint8_t* p, uint64_t m, __m512i v) {
  if constexpr (S == 1) _mm512_mask_storeu_epi8(p, m, v);
  if constexpr (S == 2) _mm512_mask_storeu_epi16(p, static_cast<__mmask32>(m), v);
  if constexpr (S == 4) _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(m), v);
  if constexpr (S == 8) _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(m), v);
  if constexpr (S == 16) _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(_pdep_u32(static_cast<uint32_t>(m), 0x55) * 3), v);
}

template <int S>
SK_AVX512 static void apply_avx512(const uint8_t* weight, const uint8_t* bits, uint8_t* out, int64_t n) {
  constexpr int kLanes = 64 / S;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const uint64_t word = load_word(bits + i / 8);
    ask_ahead(weight + i * S, 64 * S);
    for (int j = 0; j < 64; j += kLanes) _mm512_storeu_si512(out + (i + j) * S, load_avx512<S>(weight + (i + j) * S, word >> j));
  }
  const uint64_t here = low_bits(n - i), word = i < n ? load_word(bits + i / 8) & here : 0;
  for (int j = 0; i + j < n; j += kLanes)
    store_avx512<S>(out + (i + j) * S, here >> j, load_avx512<S>(weight + (i + j) * S, word >> j));
}

// ------------------------------------------------------------------------------------------------------------ restore_
// The next value into every open one of n weights; the portable and the AVX-512 kernels need no end of the values.

template <int S>
static int64_t restore_word(uint8_t* weight, uint64_t word, const uint8_t* values) {
  int64_t used = 0;
  for (; word; word &= word - 1, used++) std::memcpy(weight + __builtin_ctzll(word) * S, values + used * S, S);
  return used;
}

template <int S>
static void restore_portable(uint8_t* weight, const uint8_t* bits, const uint8_t* values, const uint8_t*, int64_t n) {
  for (int64_t i = 0; i < n; i += 64)
    values += restore_word<S>(weight + i * S, load_word(bits + i / 8) & low_bits(n - i), values) * S;
}

template <int S>
SK_AVX2 static void restore_avx2(uint8_t* weight, const uint8_t* bits, const uint8_t* values, const uint8_t* end, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) {
    const uint64_t word = load_word(bits + i / 8) & low_bits(n - i);
    if (S == 4 && i + 64 <= n) {
      for (int j = 0; j < 64; j += 8) {
        const auto m = static_cast<uint32_t>(word >> j & 0xff);
        if (m == 0) continue;
        // Open lane number r takes value number r: lane numbers are laid out under the mask, eight bits each.
        const uint64_t lanes = _pdep_u64(0x0706050403020100u, _pdep_u64(m, 0x0101010101010101u) * 0xff);
        const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes)));
        const __m256i open = spread_avx2<4>(m);
        const auto used = _mm_popcnt_u32(m);
        uint8_t next[32];  // never reads past the last value
        const bool whole = values + 32 <= end;
        if (!whole) std::memcpy(next, values, used * S);
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(whole ? values : next));
        auto* to = reinterpret_cast<__m256i*>(weight + (i + j) * S);  // blended: a masked store is slow on some processors
        _mm256_storeu_si256(to, _mm256_blendv_epi8(_mm256_loadu_si256(to), _mm256_permutevar8x32_epi32(v, order), open));
        values += used * S;
      }
    } else {
      values += restore_word<S>(weight + i * S, word, values) * S;
    }
  }
}

template <int S>
SK_AVX512 static inline __m512i expand_avx512(uint64_t m, __m512i v) {
  if constexpr (S == 1) return _mm512_maskz_expand_epi8(m, v);
  if constexpr (S == 2) return _mm512_maskz_expand_epi16(static_cast<__mmask32>(m), v);
  if constexpr (S == 4) return _mm512_maskz_expand_epi32(static_cast<__mmask16>(m), v);
  if constexpr (S == 8) return _mm512_maskz_expand_epi64(static_cast<__mmask8>(m), v);
  if constexpr (S == 16)
    return _mm512_maskz_expand_epi64(static_cast<__mmask8>(_pdep_u32(static_cast<uint32_t>(m), 0x55) * 3), v);
}

template <int S>
SK_AVX512 static void restore_avx512(uint8_t* weight, const uint8_t* bits, const uint8_t* values, const uint8_t*, int64_t n) {
  constexpr int kLanes = 64 / S;
  for (int64_t i = 0; i < n; i += 64) {
    const uint64_t word = load_word(bits + i / 8) & low_bits(n - i);
    for (int j = 0; j < 64; j += kLanes) {
      const uint64_t m = word >> j & low_bits(kLanes);
      if (m == 0) continue;
      const auto used = _mm_popcnt_u64(m);
      const __m512i v = load_avx512<S>(values, low_bits(used));  // never reads past the last value
      store_avx512<S>(weight + (i + j) * S, m, expand_avx512<S>(m, v));
      values += used * S;
    }
  }
}

// Weights begin to end of a tensor of any strides, in logical order; slow and rare.
static void restore_strided(uint8_t* weight, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            size_t element, const uint8_t* bits, const uint8_t* values, int64_t begin, int64_t end) {
  const auto dims = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> at(sizes.size());
  int64_t offset = 0;
  for (int64_t d = dims, rest = begin; d-- > 0; rest /= sizes[d]) at[d] = rest % sizes[d], offset += at[d] * strides[d];
  for (int64_t i = begin; i < end; i++) {
    if (is_open(bits, i)) {
      std::memcpy(weight + offset * static_cast<int64_t>(element), values, element);
      values += element;
    }
    for (int64_t d = dims; d-- > 0;) {
      offset += strides[d];
      if (++at[d] < sizes[d]) break;
      offset -= at[d] * strides[d], at[d] = 0;
    }
  }
}

// ---------------------------------------------------------------------------------------------------- straight_through

// d_scores = grad * weight, times the sign of the score (0 of 0 and of NaN) for magnitude keys: PyTorch's order and rounding.
template <class T>
static inline __attribute__((always_inline)) void score_grad(const T* grad, const T* weight, const T* scores, T* out, int64_t n,
                                                             bool magnitude) {
  if (magnitude)
    for (int64_t i = 0; i < n; i++)
      out[i] = grad[i] * weight[i] * ((scores[i] > 0 ? T(1) : T(0)) - (scores[i] < 0 ? T(1) : T(0)));
  else
    for (int64_t i = 0; i < n; i++) out[i] = grad[i] * weight[i];
}
template <class T>
static void score_grad_portable(const T* grad, const T* weight, const T* scores, T* out, int64_t n, bool magnitude) {
  score_grad(grad, weight, scores, out, n, magnitude);
}
template <class T>
SK_AVX2 static void score_grad_avx2(const T* grad, const T* weight, const T* scores, T* out, int64_t n, bool magnitude) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    const __m256 one = _mm256_set1_ps(1), minus = _mm256_set1_ps(-0.0f);
    if (magnitude)
      for (; i + 8 <= n; i += 8) {
        const __m256 s = _mm256_loadu_ps(scores + i);
        const __m256 sign =
            _mm256_and_ps(_mm256_or_ps(_mm256_and_ps(s, minus), one), _mm256_cmp_ps(s, _mm256_setzero_ps(), _CMP_NEQ_OQ));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(grad + i), _mm256_loadu_ps(weight + i)), sign));
      }
  }
  score_grad(grad + i, weight + i, scores + i, out + i, n - i, magnitude);
}
template <class T>
SK_AVX512 static void score_grad_avx512(const T* grad, const T* weight, const T* scores, T* out, int64_t n, bool magnitude) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    const __m512i one = _mm512_castps_si512(_mm512_set1_ps(1)), minus = _mm512_castps_si512(_mm512_set1_ps(-0.0f));
    if (magnitude)
      for (; i + 16 <= n; i += 16) {
        const __m512 s = _mm512_loadu_ps(scores + i);
        const __mmask16 has_sign = _mm512_cmp_ps_mask(s, _mm512_setzero_ps(), _CMP_NEQ_OQ);
        const __m512 sign =
            _mm512_castsi512_ps(_mm512_maskz_ternarylogic_epi32(has_sign, _mm512_castps_si512(s), minus, one, 0xea));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(grad + i), _mm512_loadu_ps(weight + i)), sign));
      }
  }
  score_grad(grad + i, weight + i, scores + i, out + i, n - i, magnitude);
}

// The same on bfloat16, whose product is rounded to nearest even before the sign is put on; choices by bits, which are
// vectorised.
static inline __attribute__((always_inline)) float from_bfloat16(uint16_t x) {
  return __builtin_bit_cast(float, uint32_t{x} << 16);
}
static inline __attribute__((always_inline)) void score_grad_bfloat16(const uint16_t* grad, const uint16_t* weight,
                                                                      const uint16_t* scores, uint16_t* out, int64_t n,
                                                                      bool magnitude) {
  for (int64_t i = 0; i < n; i++) {
    const auto product = __builtin_bit_cast(uint32_t, from_bfloat16(grad[i]) * from_bfloat16(weight[i]));
    const uint32_t nan = -static_cast<uint32_t>((product & 0x7fffffff) > 0x7f800000);
    const uint32_t rounded = (product + 0x7fff + (product >> 16 & 1)) & 0xffff0000;
    const float value = __builtin_bit_cast(float, (rounded & ~nan) | (0x7fc00000 & nan));
    const float score = from_bfloat16(scores[i]);
    const float sign = magnitude ? static_cast<float>((score > 0) - (score < 0)) : 1.0f;
    out[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value* sign) >> 16);
  }
}
static void score_grad_bfloat16_portable(const uint16_t* grad, const uint16_t* weight, const uint16_t* scores, uint16_t* out,
                                         int64_t n, bool magnitude) {
  score_grad_bfloat16(grad, weight, scores, out, n, magnitude);
}
SK_AVX2 static void score_grad_bfloat16_avx2(const uint16_t* grad, const uint16_t* weight, const uint16_t* scores, uint16_t* out,
                                             int64_t n, bool magnitude) {
  score_grad_bfloat16(grad, weight, scores, out, n, magnitude);
}
SK_AVX512 static void score_grad_bfloat16_avx512(const uint16_t* grad, const uint16_t* weight, const uint16_t* scores,
                                                 uint16_t* out, int64_t n, bool magnitude) {
  score_grad_bfloat16(grad, weight, scores, out, n, magnitude);
}

// ----------------------------------------------------------------------------------------------------------------- ops

using RestoreKernel = void (*)(uint8_t* weight, const uint8_t* bits, const uint8_t* values, const uint8_t* values_end, int64_t n);

template <int S>
static ApplyKernel apply_of() {
  return for_isa(apply_portable<S>, apply_avx2<S>, apply_avx512<S>);
}
template <int S>
static RestoreKernel restore_of() {
  return for_isa(restore_portable<S>, restore_avx2<S>, restore_avx512<S>);
}

static RestoreKernel restore_kernel(size_t element) {
  switch (element) {
    case 1:
      return restore_of<1>();
    case 2:
      return restore_of<2>();
    case 4:
      return restore_of<4>();
    case 8:
      return restore_of<8>();
    case 16:
      return restore_of<16>();
  }
  STD_TORCH_CHECK(false, "restore_: elements must have 1, 2, 4, 8 or 16 bytes, got ", element);
}

}  // namespace

ApplyKernel apply_kernel(size_t element) {
  switch (element) {
    case 1:
      return apply_of<1>();
    case 2:
      return apply_of<2>();
    case 4:
      return apply_of<4>();
    case 8:
      return apply_of<8>();
    case 16:
      return apply_of<16>();
  }
  STD_TORCH_CHECK(false, "apply: elements must have 1, 2, 4, 8 or 16 bytes, got ", element);
}

namespace {

static Tensor apply_cpu(const Tensor& weight_, const Tensor& bits_) {
  const Tensor weight = dense(weight_), bits = dense(bits_);
  const int64_t n = weight.numel();
  check_bits("apply", bits, n);
  const auto element = static_cast<int64_t>(weight.element_size());
  const ApplyKernel kernel = apply_kernel(weight.element_size());
  Tensor out = new_dense_like(weight, dtype_code(weight));
  if (n == 0) return out;
  const auto* from = static_cast<const uint8_t*>(weight.const_data_ptr());
  const auto* mask = static_cast<const uint8_t*>(bits.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  parallel(tiles(n), kTileGrain, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kTile * element;
    kernel(from + at, mask + begin * kTileBytes, to + at, std::min(n, end * kTile) - begin * kTile);
  });
  return out;
}

// Open weights among the first n; whatever lies in the padding is not counted.
static int64_t open_weights(const uint8_t* bits, int64_t n) {
  int64_t count = ones(bits, n / 8);
  for (int64_t i = n / 8 * 8; i < n; i++) count += is_open(bits, i);
  return count;
}

static void restore_cpu(std::vector<Tensor> weights, std::vector<Tensor> bits, std::vector<Tensor> values) {
  struct Layer {
    uint8_t* weight;
    const uint8_t *bits, *values;
    int64_t n, open, first;  // weights; values; tiles of all layers before
    size_t element;
    RestoreKernel kernel;  // none where the strides are not contiguous
    std::vector<int64_t> sizes, strides;
  };
  check_lengths("restore_", weights.size(), bits.size(), "tensors of bits");
  check_lengths("restore_", weights.size(), values.size(), "tensors of values");
  std::vector<Layer> layers;
  layers.reserve(weights.size());
  int64_t all = 0;
  for (size_t t = 0; t < weights.size(); t++) {  // everything is checked before anything is written
    const Tensor& w = weights[t];
    const int64_t n = w.numel();
    bits[t] = dense(bits[t]), values[t] = dense(values[t]);
    check_bits("restore_", bits[t], n);
    STD_TORCH_CHECK(dtype_code(values[t]) == dtype_code(w), "restore_: values[", t, "] must have the dtype of its weight");
    const auto* mask = static_cast<const uint8_t*>(bits[t].const_data_ptr());
    const int64_t open = n ? open_weights(mask, n) : 0;
    STD_TORCH_CHECK(values[t].numel() == open, "restore_: values[", t, "] must have one value for each of ", open,
                    " open weights, got ", values[t].numel());
    const RestoreKernel kernel = restore_kernel(w.element_size());
    if (open == 0) continue;
    Layer layer{static_cast<uint8_t*>(w.mutable_data_ptr()),
                mask,
                static_cast<const uint8_t*>(values[t].const_data_ptr()),
                n,
                open,
                all,
                w.element_size(),
                kernel,
                {},
                {}};
    if (!w.is_contiguous()) {
      const auto sizes = w.sizes(), strides = w.strides();
      layer.kernel = nullptr, layer.sizes.assign(sizes.begin(), sizes.end()),
      layer.strides.assign(strides.begin(), strides.end());
    }
    layers.push_back(std::move(layer));
    all += tiles(n);
  }
  parallel(all, kTileGrain, [&](int64_t begin, int64_t end) {  // one region for all layers
    for (const Layer& layer : layers) {
      const int64_t from = std::max<int64_t>(begin - layer.first, 0), to = std::min(end - layer.first, tiles(layer.n));
      if (from >= to) continue;
      const int64_t first = from * kTile, last = std::min(layer.n, to * kTile);
      const auto element = static_cast<int64_t>(layer.element);
      const uint8_t* values = layer.values + ones(layer.bits, from * kTileBytes) * element;
      if (layer.kernel)
        layer.kernel(layer.weight + first * element, layer.bits + from * kTileBytes, values, layer.values + layer.open * element,
                     last - first);
      else
        restore_strided(layer.weight, layer.sizes, layer.strides, layer.element, layer.bits, values, first, last);
    }
  });
}

struct Straight {
  const void *grad, *weight, *scores;
  ScalarType grad_dtype, weight_dtype, scores_dtype;
  const uint8_t *bits, *frozen;
  void *d_weight, *d_scores;  // null where not needed
  int64_t n;
  bool magnitude;
};

template <class T>
static void straight_through_tiles(const Straight& s, int64_t begin, int64_t end) {
  constexpr ScalarType kOwn = kDtypeOf<T>;
  const auto element = s.weight_dtype == ScalarType::Double ? 8 : s.weight_dtype == ScalarType::Float ? 4 : 2;
  const ApplyKernel apply = apply_kernel(element);
  const auto score = for_isa(score_grad_portable<T>, score_grad_avx2<T>, score_grad_avx512<T>);
  const ScalarType product = promote(s.grad_dtype, s.weight_dtype);
  const auto score_bfloat16 = for_isa(score_grad_bfloat16_portable, score_grad_bfloat16_avx2, score_grad_bfloat16_avx512);
  const bool all_bfloat16 =
      s.grad_dtype == ScalarType::BFloat16 && s.weight_dtype == ScalarType::BFloat16 && s.scores_dtype == ScalarType::BFloat16;
  const bool all_own = s.grad_dtype == kOwn && s.weight_dtype == kOwn && s.scores_dtype == kOwn;
  alignas(64) T grad[kTile], weight[kTile], scores[kTile];
  alignas(64) uint8_t open[kTileBytes], converted[kTile * 8];
  for (int64_t tile = begin; tile < end; tile++) {
    const int64_t at = tile * kTile, n = std::min(s.n - at, kTile);
    if (s.d_weight) {
      const uint8_t* live = s.bits + tile * kTileBytes;
      if (s.frozen) {
        for (int64_t i = 0; i < kTileBytes; i++) open[i] = live[i] & ~s.frozen[tile * kTileBytes + i];
        live = open;
      }
      const auto* from = static_cast<const uint8_t*>(s.grad) + at * element;
      if (s.grad_dtype != s.weight_dtype) {
        read_tile(s.grad_dtype, s.grad, grad, at, n);
        write_tile(s.weight_dtype, grad, converted, 0, n);
        from = converted;
      }
      apply(from, live, static_cast<uint8_t*>(s.d_weight) + at * element, n);
    }
    if (!s.d_scores) continue;
    if (all_own) {
      score(static_cast<const T*>(s.grad) + at, static_cast<const T*>(s.weight) + at, static_cast<const T*>(s.scores) + at,
            static_cast<T*>(s.d_scores) + at, n, s.magnitude);
    } else if (all_bfloat16) {
      score_bfloat16(static_cast<const uint16_t*>(s.grad) + at, static_cast<const uint16_t*>(s.weight) + at,
                     static_cast<const uint16_t*>(s.scores) + at, static_cast<uint16_t*>(s.d_scores) + at, n, s.magnitude);
    } else {
      read_tile(s.grad_dtype, s.grad, grad, at, n);
      read_tile(s.weight_dtype, s.weight, weight, at, n);
      read_tile(s.scores_dtype, s.scores, scores, at, n);
      score(grad, weight, scores, grad, n, false);
      round_tile(product, grad, n);  // the product is rounded before the sign is put on, which is exact
      if (s.magnitude) {
        std::fill(weight, weight + n, T(1));
        score(grad, weight, scores, grad, n, true);
      }
      write_tile(s.scores_dtype, grad, s.d_scores, at, n);
    }
  }
}

static std::tuple<Tensor, Tensor> straight_through_cpu(const Tensor& grad_, const Tensor& weight_, const Tensor& scores_,
                                                       const Tensor& bits_, std::optional<Tensor> frozen_, std::string by,
                                                       bool need_weight, bool need_scores) {
  const Tensor grad = dense(grad_), weight = dense(weight_), scores = dense(scores_), bits = dense(bits_);
  const Tensor frozen = frozen_ ? dense(*frozen_) : bits;
  const int64_t n = grad.numel();
  STD_TORCH_CHECK(weight.numel() == n && scores.numel() == n,
                  "straight_through: grad, weight and scores must have one shape, got ", n, ", ", weight.numel(), " and ",
                  scores.numel(), " elements");
  STD_TORCH_CHECK(by == "magnitude" || by == "value", "straight_through: by must be 'magnitude' or 'value', got '", by, "'");
  check_bits("straight_through", bits, n);
  check_bits("straight_through", frozen, n);
  const ScalarType types[] = {floating("straight_through", "grad", grad), floating("straight_through", "weight", weight),
                              floating("straight_through", "scores", scores)};
  const int32_t weight_code = dtype_code(weight), scores_code = dtype_code(scores);
  Tensor d_weight = need_weight ? new_dense_like(weight, weight_code) : new_vector(0, weight_code);
  Tensor d_scores = need_scores ? new_dense_like(scores, scores_code) : new_vector(0, scores_code);
  if (n == 0 || !(need_weight || need_scores)) return {d_weight, d_scores};
  const Straight s{grad.const_data_ptr(),
                   weight.const_data_ptr(),
                   scores.const_data_ptr(),
                   types[0],
                   types[1],
                   types[2],
                   static_cast<const uint8_t*>(bits.const_data_ptr()),
                   frozen_ ? static_cast<const uint8_t*>(frozen.const_data_ptr()) : nullptr,
                   need_weight ? d_weight.mutable_data_ptr() : nullptr,
                   need_scores ? d_scores.mutable_data_ptr() : nullptr,
                   n,
                   by == "magnitude"};
  const bool wide = std::find(types, types + 3, ScalarType::Double) != types + 3;
  parallel(tiles(n), kTileGrain, [&](int64_t begin, int64_t end) {
    wide ? straight_through_tiles<double>(s, begin, end) : straight_through_tiles<float>(s, begin, end);
  });
  return {d_weight, d_scores};
}

}  // namespace

ScoreGradKernel score_grad_kernel() {
  return for_isa(score_grad_portable<float>, score_grad_avx2<float>, score_grad_avx512<float>);
}

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("apply", TORCH_BOX(&apply_cpu));
  m.impl("restore_", TORCH_BOX(&restore_cpu));
  m.impl("straight_through", TORCH_BOX(&straight_through_cpu));
}
