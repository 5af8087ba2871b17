// Exact top-k of scores to bits, for many layers in one call: `select`, and `refresh_`, which also writes the effective weight.
//
// One read of the scores. A window [lo, hi] of keys that should hold the k-th largest one is guessed, from the last call or from
// a sample; the scan writes the bits of all scores above it, counts them and collects the few inside, among which the k-th
// largest is then found exactly. The counts prove the guess: if k is not between them, the layer is scanned again with the next
// better guess, the last of which is the threshold itself, from histograms. So guesses cost time and never change a bit.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "select_settle.h"

namespace {

// --------------------------------------------------------------------------------------------------------------- rounds

template <class K, bool Value>
static void guess(Layer& layer, Workspace& space) {
  const Limits<K, Value> limits(layer.format);
  if (layer.k == 0)
    layer.lo = layer.hi = int64_t{limits.most} + 1;
  else if (layer.k == layer.n)
    layer.lo = limits.least, layer.hi = layer.lo - 1;
  else if (layer.stage == Stage::hint && layer.hint && window_from_hint<K, Value>(layer))
    return;
  else if (layer.stage == Stage::exact)
    window_exact<K, Value>(layer, space);
  else
    layer.stage = Stage::sample, window_from_sample<K, Value>(layer, space);
}

template <class K, bool Value>
static void scan(const Layer& layer, Chunk& chunk, Workspace& space) {
  constexpr int64_t kBlock = 64;  // words after which the effective weight is written, while their bits are in the cache
  Word* bits = reinterpret_cast<Word*>(layer.bits);
  Scan<K> s = {static_cast<const K*>(layer.scores),
               layer.n,
               K(layer.lo),
               K(layer.hi),
               K(layer.format.inf),
               bits,
               space.pieces.get<Piece>(0) + chunk.pieces,
               space.keys.get<K>(0) + chunk.keys,
               chunk.capacity};
  const int64_t step = layer.weight_size ? kBlock : chunk.last - chunk.first;
  for (int64_t first = chunk.first; first < chunk.last; first += step) {
    const int64_t last = std::min(first + step, chunk.last);
    if constexpr (sizeof(K) == 8) {
      scan_portable<K, Value>(s, first, last);
    } else {
      switch (isa()) {
        case Isa::avx512:
          scan_avx512<K, Value>(s, first, last);
          break;
        case Isa::avx2:
          scan_avx2<K, Value>(s, first, last);
          break;
        default:
          scan_portable<K, Value>(s, first, last);
      }
    }
    if (layer.weight_size) keep_open(layer.weight_size, layer.weight, bits, layer.w_eff, first, last, layer.n);
  }
  if (chunk.last == words(layer.n)) clear_words(bits, chunk.last, tiles(layer.n) * 8);
  chunk.above = s.above, chunk.within = s.within, chunk.pieces_found = s.pieces_found, chunk.keys_found = s.keys_found;
}

// Calls f with a value of the layer's key type, and whether the sign counts, as compile-time constants.
template <class F>
static void typed(const Layer& layer, bool value, const F& f) {
  const auto with = [&](auto key) { value ? f(key, std::true_type{}) : f(key, std::false_type{}); };
  if (layer.format.size == 2)
    with(int16_t{});
  else if (layer.format.size == 4)
    with(int32_t{});
  else
    with(int64_t{});
}

// Cuts the layers that are not done into chunks, the same number of words for every worker; returns the number of workers.
static int64_t plan(Workspace& space) {
  int64_t total = 0;
  for (const Layer& layer : space.layers)
    if (layer.stage != Stage::done) total += words(layer.n);
  const int64_t workers = std::clamp<int64_t>(total * 64 / kGrain, 1, torch::stable::get_num_threads());
  int64_t pieces = 0, key_bytes = 0, worker = 0, seen = 0;
  space.chunks.clear();
  space.shares.assign(1, 0);
  for (size_t i = 0; i < space.layers.size(); i++) {
    Layer& layer = space.layers[i];
    if (layer.stage == Stage::done) continue;
    layer.first_chunk = int64_t(space.chunks.size());
    for (int64_t first = 0, end = words(layer.n); first < end;) {
      const int64_t border = total * (worker + 1) / workers, last = std::min(end, first + border - seen);
      const int64_t capacity = std::min((last - first) * 64, std::max<int64_t>((last - first) * 8, 4096)) + kSlack;
      space.chunks.push_back({int64_t(i), first, last, pieces, key_bytes / layer.format.size, capacity, 0, 0, 0, 0});
      pieces += last - first;
      key_bytes += (capacity * layer.format.size + 63) / 64 * 64;
      seen += last - first;
      first = last;
      if (seen == border && ++worker < workers) space.shares.push_back(int64_t(space.chunks.size()));
    }
    layer.chunks = int64_t(space.chunks.size()) - layer.first_chunk;
  }
  space.shares.push_back(int64_t(space.chunks.size()));
  space.pieces.get<Piece>(pieces);
  space.keys.get<uint8_t>(key_bytes + kSlack * 8);
  return workers;
}

static void run(Workspace& space, bool value, Ties ties) {
  for (bool open = true; open;) {
    for (Layer& layer : space.layers)
      if (layer.stage != Stage::done)
        typed(layer, value, [&](auto key, auto by) { guess<decltype(key), decltype(by)::value>(layer, space); });
    const int64_t workers = plan(space);
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t c = space.shares[begin]; c < space.shares[end]; c++) {
        Chunk& chunk = space.chunks[c];
        const Layer& layer = space.layers[chunk.layer];
        typed(layer, value, [&](auto key, auto by) { scan<decltype(key), decltype(by)::value>(layer, chunk, space); });
      }
    };
    if (workers == 1)
      work(0, 1);
    else
      torch::stable::parallel_for(0, workers, 1, work);
    open = false;
    for (Layer& layer : space.layers) {
      if (layer.stage == Stage::done) continue;
      typed(layer, value, [&](auto key, auto) { resolve<decltype(key)>(layer, space, ties); });
      open |= layer.stage != Stage::done;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------ ops

static Workspace& workspace() {
  static thread_local Workspace space;
  space.layers.clear();
  return space;
}

static bool by_value(const char* op, const std::string& by) {
  STD_TORCH_CHECK(by == "magnitude" || by == "value", op, ": by must be 'magnitude' or 'value', got '", by, "'");
  return by == "value";
}

static Ties tie_rule(const char* op, const std::string& ties) {
  if (ties == "last") return Ties::last;
  if (ties == "first") return Ties::first;
  STD_TORCH_CHECK(ties == "all", op, ": ties must be 'last', 'first' or 'all', got '", ties, "'");
  return Ties::all;
}

static Layer layer_of(const char* op, const Tensor& scores, int64_t k) {
  Layer layer = {};
  layer.format = score_format(op, scores);
  layer.n = scores.numel(), layer.k = k;
  STD_TORCH_CHECK(k >= 0 && k <= layer.n, op, ": k must be between 0 and ", layer.n, ", got ", k);
  layer.scores = scores.const_data_ptr();
  layer.stage = layer.n ? Stage::hint : Stage::done;
  return layer;
}

std::vector<Tensor> select_cpu(std::vector<Tensor> scores, std::vector<int64_t> k, std::string by, std::string ties) {
  check_lengths("select", scores.size(), k.size(), "values of k");
  const bool value = by_value("select", by);
  const Ties rule = tie_rule("select", ties);
  Workspace& space = workspace();
  std::vector<Tensor> bits;
  bits.reserve(scores.size());
  for (size_t i = 0; i < scores.size(); i++) {
    if (!scores[i].is_contiguous()) scores[i] = torch::stable::contiguous(scores[i]);
    Layer layer = layer_of("select", scores[i], k[i]);
    bits.push_back(torch::stable::new_empty(scores[i], {mask_bytes(layer.n)}, ScalarType::Byte));
    layer.bits = static_cast<uint8_t*>(bits[i].mutable_data_ptr());
    space.layers.push_back(layer);
  }
  run(space, value, rule);
  return bits;
}

void refresh_cpu(std::vector<Tensor> scores, std::vector<Tensor> weights, std::vector<int64_t> k, std::vector<Tensor> bits,
                 std::vector<Tensor> w_eff, std::vector<Tensor> hints, std::string by, std::string ties) {
  const char* const op = "refresh_";
  check_lengths(op, scores.size(), weights.size(), "weights");
  check_lengths(op, scores.size(), k.size(), "values of k");
  check_lengths(op, scores.size(), bits.size(), "bits");
  check_lengths(op, scores.size(), w_eff.size(), "effective weights");
  check_lengths(op, scores.size(), hints.size(), "hints");
  const bool value = by_value(op, by);
  const Ties rule = tie_rule(op, ties);
  Workspace& space = workspace();
  for (size_t i = 0; i < scores.size(); i++) {
    if (!scores[i].is_contiguous()) scores[i] = torch::stable::contiguous(scores[i]);
    Layer layer = layer_of(op, scores[i], k[i]);
    check_bits(op, bits[i], layer.n);
    layer.bits = static_cast<uint8_t*>(bits[i].mutable_data_ptr());
    STD_TORCH_CHECK(hints[i].scalar_type() == ScalarType::Double && hints[i].numel() == 4 && hints[i].is_contiguous(), op,
                    ": hints must be contiguous float64 with 4 elements, got ", hints[i].numel());
    layer.hint = static_cast<double*>(hints[i].mutable_data_ptr());
    if (w_eff[i].numel()) take_weight(op, weights[i], w_eff[i], layer.n, layer.weight_size, layer.weight, layer.w_eff);
    space.layers.push_back(layer);
  }
  run(space, value, rule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("select", TORCH_BOX(&select_cpu));
  m.impl("refresh_", TORCH_BOX(&refresh_cpu));
}
