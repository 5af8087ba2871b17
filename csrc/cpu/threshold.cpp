// Scores against a fixed value to bits, for many layers in one call: `threshold`, and `refresh_threshold_`, which also writes the
// effective weight. Open is what lies between the value and infinity in the order of keys, so NaN is closed.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "../scores.h"

namespace {

// Bits of the words [first, last) of scores with lo <= key <= inf.
template <class K>
static void open_portable(const K* scores, K lo, K inf, Word* bits, int64_t first, int64_t last) {
  for (int64_t w = first; w < last; w++) bits[w] = side_portable<K, true>(scores + w * 64, lo, inf, inf).within;
}

template <class K>
SK_AVX2 static void open_avx2(const K* scores, K lo, K inf, Word* bits, int64_t first, int64_t last) {
  for (int64_t w = first; w < last; w++) {
    ask_ahead(scores + w * 64, 64 * sizeof(K));
    bits[w] = side_avx2<true>(scores + w * 64, lo, inf, inf).within;
  }
}

template <class K>
SK_AVX512 static void open_avx512(const K* scores, K lo, K inf, Word* bits, int64_t first, int64_t last) {
  __m512i keys[sizeof(K)];
  for (int64_t w = first; w < last; w++) {
    ask_ahead(scores + w * 64, 64 * sizeof(K));
    bits[w] = side_avx512<true>(scores + w * 64, lo, inf, inf, keys).within;
  }
}

struct Layer {
  Format format;
  const void* scores;
  int64_t n, first_word, lo;  // first_word counts over all layers
  Word* bits;
  int weight_size;  // 0 where no effective weight is asked for
  const void* weight;
  void* w_eff;
};

template <class K>
static void open_typed(const Layer& layer, Word* bits, int64_t first, int64_t last) {
  const auto* scores = static_cast<const K*>(layer.scores);
  const K lo = static_cast<K>(layer.lo), inf = static_cast<K>(layer.format.inf);
  if constexpr (sizeof(K) == 8)
    return open_portable(scores, lo, inf, bits, first, last);
  else
    switch (isa()) {
      case Isa::avx512:
        return open_avx512(scores, lo, inf, bits, first, last);
      case Isa::avx2:
        return open_avx2(scores, lo, inf, bits, first, last);
      default:
        return open_portable(scores, lo, inf, bits, first, last);
    }
}

static void open_words(const Layer& layer, Word* bits, int64_t first, int64_t last) {
  if (layer.format.size == 2) return open_typed<int16_t>(layer, bits, first, last);
  if (layer.format.size == 4) return open_typed<int32_t>(layer, bits, first, last);
  open_typed<int64_t>(layer, bits, first, last);
}

// Words [first, last) of a layer; the last word may be partial and has the padding behind it.
static void open_layer(const Layer& layer, int64_t first, int64_t last) {
  const int64_t full = layer.n / 64;
  open_words(layer, layer.bits, first, std::min(last, full));
  if (last == words(layer.n)) {
    clear_words(layer.bits, full, tiles(layer.n) * 8);
    if (full < last) {
      uint64_t copy[64] = {};
      uint64_t word;
      std::memcpy(copy, static_cast<const char*>(layer.scores) + full * 64 * layer.format.size,
                  (layer.n - full * 64) * layer.format.size);
      Layer rest = layer;
      rest.scores = copy;
      open_words(rest, reinterpret_cast<Word*>(&word), 0, 1);
      layer.bits[full] = word & valid_bits(full, layer.n);
    }
  }
}

static void run(const std::vector<Layer>& layers) {
  constexpr int64_t kBlock = 64;  // words after which the effective weight is written, while their bits are in the cache
  const auto work = [&](int64_t begin, int64_t end) {
    for (const Layer& layer : layers) {
      int64_t first = std::max(begin - layer.first_word, int64_t{0});
      const int64_t stop = std::min(end - layer.first_word, words(layer.n));
      for (; first < stop; first += kBlock) {
        const int64_t last = std::min(first + kBlock, stop);
        open_layer(layer, first, last);
        if (layer.weight_size) keep_open(layer.weight_size, layer.weight, layer.bits, layer.w_eff, first, last, layer.n);
      }
    }
  };
  const int64_t total = layers.empty() ? 0 : layers.back().first_word + words(layers.back().n);
  if (total <= kGrain / 64)
    work(0, total);
  else
    torch::stable::parallel_for(0, total, kGrain / 64, work);
}

// The least key that is open: PyTorch rounds the value to the scores' dtype by way of float, and nothing is above NaN.
static int64_t least_open(const Tensor& scores, const Format& format, double value, bool inclusive) {
  const auto single = static_cast<float>(value);
  int64_t key;
  if (value != value) {
    key = format.inf + 1;
  } else if (format.size == 8) {
    int64_t raw;
    std::memcpy(&raw, &value, 8);
    key = key_of<int64_t, true>(raw, format.inf);
  } else if (format.size == 4) {
    int32_t raw;
    std::memcpy(&raw, &single, 4);
    key = key_of<int32_t, true>(raw, static_cast<int32_t>(format.inf));
  } else {
    const uint16_t raw = scores.scalar_type() == ScalarType::Half ? c10::Half(single).x : c10::BFloat16(single).x;
    key = key_of<int16_t, true>(static_cast<int16_t>(raw), static_cast<int16_t>(format.inf));
  }
  return inclusive || key > format.inf ? key : key + 1;
}

// The layer of one pair of scores and bits, behind those that are there.
static void add_layer(const char* op, std::vector<Layer>& layers, Tensor& scores, const Tensor& bits, double value,
                      bool inclusive) {
  Layer layer = {};
  if (!scores.is_contiguous()) scores = torch::stable::contiguous(scores);
  layer.format = score_format(op, scores);
  layer.n = scores.numel();
  layer.first_word = layers.empty() ? 0 : layers.back().first_word + words(layers.back().n);
  layer.lo = least_open(scores, layer.format, value, inclusive);
  layer.scores = scores.const_data_ptr();
  layer.bits = static_cast<Word*>(bits.mutable_data_ptr());
  layers.push_back(layer);
}

static std::vector<Layer>& workspace() {
  static thread_local std::vector<Layer> layers;
  layers.clear();
  return layers;
}

std::vector<Tensor> threshold_cpu(std::vector<Tensor> scores, double value, bool inclusive) {
  std::vector<Layer>& layers = workspace();
  std::vector<Tensor> bits;
  bits.reserve(scores.size());
  for (Tensor& s : scores) {
    bits.push_back(torch::stable::new_empty(s, {mask_bytes(s.numel())}, ScalarType::Byte));
    add_layer("threshold", layers, s, bits.back(), value, inclusive);
  }
  run(layers);
  return bits;
}

void refresh_threshold_cpu(std::vector<Tensor> scores, std::vector<Tensor> weights, double value, bool inclusive,
                           std::vector<Tensor> bits, std::vector<Tensor> w_eff) {
  const char* const op = "refresh_threshold_";
  check_lengths(op, scores.size(), weights.size(), "weights");
  check_lengths(op, scores.size(), bits.size(), "bits");
  check_lengths(op, scores.size(), w_eff.size(), "effective weights");
  std::vector<Layer>& layers = workspace();
  for (size_t i = 0; i < scores.size(); i++) {
    check_bits(op, bits[i], scores[i].numel());
    add_layer(op, layers, scores[i], bits[i], value, inclusive);
    Layer& layer = layers.back();
    if (w_eff[i].numel()) take_weight(op, weights[i], w_eff[i], layer.n, layer.weight_size, layer.weight, layer.w_eff);
  }
  run(layers);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("threshold", TORCH_BOX(&threshold_cpu));
  m.impl("refresh_threshold_", TORCH_BOX(&refresh_threshold_cpu));
}
