// The guesses: a window of keys that should hold the k-th largest one, from the last call, from a sample, or from all scores; and
// what a call keeps about its layers meanwhile.
#pragma once
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "select_rank.h"

namespace {

// Memory that grows, is never initialised, and serves the next call of the same thread.
class Buffer {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > size_) {
      memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      STD_TORCH_CHECK(memory_, "select: no memory for a workspace of ", bytes, " bytes");
      size_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

enum class Ties { last, first, all };

// How sure a guess of the window is; each stage is tried after the one before it has missed.
enum class Stage { hint, sample, exact, done };

struct Chunk {
  int64_t layer, first, last;  // words of a layer
  int64_t pieces, keys;        // where its part of the buffers begins
  int64_t capacity;
  int64_t above, within, pieces_found, keys_found;
};

struct Layer {
  Format format;
  const void* scores;
  int64_t n, k;
  uint8_t* bits;
  double* hint;     // null for `select`
  int weight_size;  // 0 where no effective weight is asked for
  const void* weight;
  void* w_eff;
  Stage stage;
  int64_t missed;               // windows so far
  int64_t lo, hi;               // the window
  int64_t first_chunk, chunks;  // of this round
};

struct Workspace {
  Buffer pieces, keys, scratch;
  std::vector<Layer> layers;
  std::vector<Chunk> chunks;
  std::vector<int64_t> shares;  // the first chunk of each worker
};

template <class K, bool Value>
struct Limits {
  K least, most;
  explicit Limits(const Format& f) : least(Value ? static_cast<K>(-f.inf) : 0), most(static_cast<K>(f.inf + 1)) {}
};

// A hint is (threshold key, half-width of the window in keys, keys in the last window, windows missed so far). A half-width of 0,
// or anything that makes no sense, is no hint.
template <class K, bool Value>
static bool window_from_hint(Layer& layer) {
  const Limits<K, Value> limits(layer.format);
  const double key = layer.hint[0], half = layer.hint[1];
  if (!(half > 0 && half < 1e19 && std::abs(key) < 1e19)) return false;
  const auto inside = [&](double x) {
    return x <= double(limits.least) ? int64_t{limits.least} : x >= double(limits.most) ? int64_t{limits.most} : int64_t(x);
  };
  layer.lo = inside(std::ceil(key - half));
  layer.hi = inside(std::floor(key + half));
  return layer.lo <= layer.hi;
}

constexpr int64_t kAll = 1024;  // up to so many scores all are candidates

// The window from n^(2/3) scores, in groups of four at hashed places: four standard deviations of the rank to either side.
template <class K, bool Value>
static void window_from_sample(Layer& layer, Workspace& space) {
  const Limits<K, Value> limits(layer.format);
  layer.lo = limits.least, layer.hi = limits.most;
  if (layer.n <= kAll) return;
  const auto* scores = static_cast<const K*>(layer.scores);
  const K inf = static_cast<K>(layer.format.inf);
  const int64_t groups = int64_t(std::cbrt(double(layer.n) * double(layer.n))) / 4, size = groups * 4, stride = layer.n / groups;
  K* sample = space.scratch.get<K>(2 * (size + kSlack));
  K* again = sample + size + kSlack;
  for (int64_t g = 0; g < groups; g++) {
    uint64_t hash = (uint64_t(g) + 1) * 0x9e3779b97f4a7c15u;  // splitmix64, shortened
    hash = (hash ^ hash >> 29) * 0xbf58476d1ce4e5b9u >> 32;
    const K* group = scores + g * stride + int64_t(hash * uint64_t(stride - 3) >> 32);
    for (int j = 0; j < 4; j++) sample[g * 4 + j] = key_of<K, Value>(group[j], inf);
  }
  const double share = double(layer.k) / double(layer.n), middle = share * double(size);
  const double margin = 4 * std::sqrt(middle * (1 - share)) + 3;
  const auto upper = int64_t(std::floor(middle - margin)), lower = int64_t(std::ceil(middle + margin));
  if (upper >= 1 && lower <= size)
    std::memcpy(again, sample, size * sizeof(K));
  else
    again = sample;
  if (upper >= 1) layer.hi = rank(sample, size, limits.least, limits.most, upper).key;
  if (lower <= size) layer.lo = rank(again, size, limits.least, limits.most, lower).key;
}

// The k-th largest key itself, 11 bits at a time: a read of all scores for each.
template <class K, bool Value>
static void window_exact(Layer& layer, Workspace& space) {
  constexpr int kDigit = 11;
  const Limits<K, Value> limits(layer.format);
  const auto* scores = static_cast<const K*>(layer.scores);
  const K inf = static_cast<K>(layer.format.inf);
  auto* bins = space.scratch.get<int64_t>(1 << kDigit);
  uint64_t prefix = 0;  // of key - least
  int64_t need = layer.k;
  for (int done = 0, bits = 8 * sizeof(K); done < bits; done += kDigit) {
    const int shift = std::max(bits - done - kDigit, 0), width = bits - done - shift;
    std::fill(bins, bins + (1 << width), 0);
    for (int64_t i = 0; i < layer.n; i++) {
      const uint64_t key = uint64_t(key_of<K, Value>(scores[i], inf)) - uint64_t(limits.least);
      if (done == 0 || key >> (shift + width) == prefix) bins[key >> shift & ((1 << width) - 1)]++;
    }
    int digit = (1 << width) - 1;
    for (; digit > 0 && bins[digit] < need; digit--) need -= bins[digit];  // digit > 0: another thread may write scores
    prefix = prefix << width | digit;
  }
  layer.lo = layer.hi = int64_t(prefix + uint64_t(limits.least));
}

}  // namespace
