// Scores against a fixed value to bits, for many layers in one launch: `threshold`, and `refresh_threshold_`, which also writes
// the effective weight. Open is what lies between the value and infinity in the order of keys, so NaN is closed.
#include <cstring>

#include "scores.h"

namespace {

struct Open : Layer {
  uint64_t low;  // the least key that is open
};

template <class T>
__global__ void __launch_bounds__(kStripThreads, 4) threshold_kernel(const __grid_constant__ T table) {
  const Open& layer = table.of_tile(blockIdx.x);
  const int64_t strip = (int64_t{blockIdx.x} - layer.first_tile) * kStripWarps + threadIdx.x / kWarpSize;
  if (strip >= strips(layer.n)) return;
  with_scores(layer.size, true, [&](auto raw, auto) {
    using S = decltype(raw);
    using K = Key<S>;
    const K inf = static_cast<K>(layer.inf);
    const Ends<K> ends = {static_cast<K>(layer.low), nan_key(inf, sizeof(S), true)};
    const Sides sides = read_strip<S, true>(static_cast<const S*>(layer.scores), strip, layer.n, inf, [&] { return ends; });
    const unsigned open = sides.reached & ~sides.above;
    store_strip<kEach<S>>(layer.bits, strip, layer.n, open);
    keep_strip<kEach<S>>(layer, strip, open);
  });
}

void run(const Place& place, std::vector<Open>& layers) {
  with_tables(
      layers, [](const Open& layer) { return ceil_div(strips(layer.n), kStripWarps); },
      [&](const auto& table) {
        place.launch(threshold_kernel<std::decay_t<decltype(table)>>, dim3(static_cast<unsigned>(table.tiles)), kStripThreads, 0,
                     table);
      });
}

template <class K>
uint64_t least_open(K raw, const Layer& layer, bool inclusive) {
  const K inf = static_cast<K>(layer.inf), nan = nan_key(inf, layer.size, true), key = key_of(raw, inf, nan, true);
  return inclusive || key == nan ? key : key + (K{1} << key_unit(layer.size));
}

// PyTorch rounds the value to the scores' dtype by way of float; nothing is above NaN.
uint64_t least_open(const Tensor& scores, const Layer& layer, double value, bool inclusive) {
  const auto single = static_cast<float>(value);
  const bool nan = value != value;
  switch (scores.scalar_type()) {
    case ScalarType::Double: {
      uint64_t raw;
      std::memcpy(&raw, &value, 8);
      return least_open(raw, layer, inclusive);
    }
    case ScalarType::Float: {
      uint32_t raw;
      std::memcpy(&raw, &single, 4);
      return least_open(raw, layer, inclusive);
    }
    case ScalarType::Half:
      return least_open(uint32_t{nan ? uint16_t{0x7fff} : Half(single).x} << 16, layer, inclusive);
    default:
      return least_open(uint32_t{nan ? uint16_t{0x7fff} : BFloat16(single).x} << 16, layer, inclusive);
  }
}

Open open_layer(Arguments& arguments, const Tensor& scores, double value, bool inclusive) {
  Open layer = {};
  arguments.take_scores(layer, scores);
  layer.low = least_open(scores, layer, value, inclusive);
  return layer;
}

std::vector<Tensor> threshold_cuda(std::vector<Tensor> scores, double value, bool inclusive) {
  std::vector<Tensor> bits;
  if (scores.empty()) return bits;
  const Place place("threshold", scores[0]);
  Arguments arguments(place);
  std::vector<Open> layers;
  for (const Tensor& s : scores) {
    Open layer = open_layer(arguments, s, value, inclusive);
    bits.push_back(arguments.new_bits(layer));
    if (layer.n) layers.push_back(layer);
  }
  run(place, layers);
  return bits;
}

void refresh_threshold_cuda(std::vector<Tensor> scores, std::vector<Tensor> weights, double value, bool inclusive,
                            std::vector<Tensor> bits, std::vector<Tensor> w_eff) {
  const char* const op = "refresh_threshold_";
  check_lengths(op, scores.size(), weights.size(), "weights");
  check_lengths(op, scores.size(), bits.size(), "bits");
  check_lengths(op, scores.size(), w_eff.size(), "effective weights");
  if (scores.empty()) return;
  const Place place(op, scores[0]);
  Arguments arguments(place);
  std::vector<Open> layers;
  for (size_t i = 0; i < scores.size(); i++) {
    Open layer = open_layer(arguments, scores[i], value, inclusive);
    arguments.take_bits(layer, bits[i]);
    arguments.take_weight(layer, weights[i], w_eff[i]);
    if (layer.n) layers.push_back(layer);
  }
  run(place, layers);
  arguments.flush();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("threshold", TORCH_BOX(&threshold_cuda));
  m.impl("refresh_threshold_", TORCH_BOX(&refresh_threshold_cuda));
}
