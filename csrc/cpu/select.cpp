// Exact top-k of scores to bits, for many layers in one call: `select`, and `refresh_`, which also writes the effective weight.
//
// One read of the scores. A window [lo, hi] of keys that should hold the k-th largest one is guessed, from the last call or from
// a sample; the scan writes the bits of all scores above it, counts them and collects the few inside, among which the k-th
// largest is then found exactly. The counts prove the guess: if k is not between them, the layer is scanned again with the next
// better guess, the last of which is the threshold itself, from histograms. So guesses cost time and never change a bit.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../scores.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------- scan

// A word of 64 scores some of which lie within the window, in the order of the tensor.
struct Piece {
  int64_t word;
  uint64_t within;
};

// A run of words of one layer: what the scan reads, where it writes, and what it finds.
template <class K>
struct Scan {
  const K* scores;
  int64_t n;
  K lo, hi, inf;
  Word* bits;
  Piece* pieces;  // room for every word
  K* keys;        // keys within the window, in order, while there is room
  int64_t capacity;
  int64_t above = 0, within = 0, pieces_found = 0, keys_found = 0;
};

constexpr int kSlack = 64;  // a scan writes whole registers: keys that do not count may follow the last one

template <class K, bool Value>
static inline void note_keys(Scan<K>& s, const K* scores, uint64_t within) {
  for (uint64_t rest = within; rest; rest &= rest - 1)
    s.keys[s.keys_found++] = key_of<K, Value>(scores[__builtin_ctzll(rest)], s.inf);
}

template <class K>
static inline bool note_piece(Scan<K>& s, int64_t word, uint64_t within) {
  s.pieces[s.pieces_found++] = {word, within};
  return s.lo != s.hi && s.keys_found + kSlack <= s.capacity;  // a window of one key needs no list
}

// The 64 scores of a word; those past the end of the tensor are zeros of a copy.
template <class K>
static inline const K* word_scores(const Scan<K>& s, int64_t word, K* copy) {
  if (word * 64 + 64 <= s.n) return s.scores + word * 64;
  std::memset(copy, 0, 64 * sizeof(K));
  std::memcpy(copy, s.scores + word * 64, (s.n - word * 64) * sizeof(K));
  return copy;
}

template <class K, bool Value>
static void scan_portable(Scan<K>& s, int64_t first, int64_t last) {
  K copy[64];
  for (int64_t w = first; w < last; w++) {
    const K* scores = word_scores(s, w, copy);
    const uint64_t valid = valid_bits(w, s.n);
    Side side = side_portable<K, Value>(scores, s.lo, s.hi, s.inf);
    s.bits[w] = side.above &= valid;
    s.above += __builtin_popcountll(side.above);
    if (side.within &= valid) {
      if (note_piece(s, w, side.within)) note_keys<K, Value>(s, scores, side.within);
      s.within += __builtin_popcountll(side.within);
    }
  }
}

template <class K, bool Value>
SK_AVX2 static void scan_avx2(Scan<K>& s, int64_t first, int64_t last) {
  K copy[64];
  for (int64_t w = first; w < last; w++) {
    const K* scores = word_scores(s, w, copy);
    const uint64_t valid = valid_bits(w, s.n);
    Side side = side_avx2<Value>(scores, s.lo, s.hi, s.inf);
    s.bits[w] = side.above &= valid;
    s.above += __builtin_popcountll(side.above);
    if (side.within &= valid) {
      if (note_piece(s, w, side.within)) note_keys<K, Value>(s, scores, side.within);
      s.within += __builtin_popcountll(side.within);
    }
  }
}

// Compression goes through a register and a whole store: into memory it is microcode on Zen 4.
SK_AVX512 static inline void compress(int32_t* to, uint64_t mask, __m512i keys) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, keys));
}
SK_AVX512 static inline void compress(int16_t* to, uint64_t mask, __m512i keys) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(mask, keys));
}

template <class K, bool Value>
SK_AVX512 static void scan_avx512(Scan<K>& scan, int64_t first, int64_t last) {
  constexpr int kLanes = 64 / sizeof(K);
  constexpr uint64_t kOnes = (uint64_t{1} << kLanes) - 1;
  Scan<K> s = scan;  // a copy, because the bits might alias it
  K copy[64];
  for (int64_t w = first; w < last; w++) {
    const K* scores = word_scores(s, w, copy);
    const uint64_t valid = valid_bits(w, s.n);
    __m512i keys[sizeof(K)];
    Side side = side_avx512<Value>(scores, s.lo, s.hi, s.inf, keys);
    s.bits[w] = side.above &= valid;
    s.above += __builtin_popcountll(side.above);
    if (side.within &= valid) {
      if (note_piece(s, w, side.within)) {
#pragma GCC unroll 4
        for (int j = 0; j < int(sizeof(K)); j++) {
          const uint64_t mask = side.within >> j * kLanes & kOnes;
          compress(s.keys + s.keys_found, mask, keys[j]);
          s.keys_found += __builtin_popcountll(mask);
        }
      }
      s.within += __builtin_popcountll(side.within);
    }
  }
  scan = s;
}

// ---------------------------------------------------------------------------------------------- the k-th largest of a list

template <class K>
struct Rank {
  K key;         // the k-th largest key
  int64_t need;  // how many equal to it are among the k largest
  int64_t ties;  // how many equal to it there are
};

static inline bool is_avx512() { return isa() == Isa::avx512; }

template <class K>
static int64_t count_greater(const K* keys, int64_t m, K than) {
  int64_t count = 0;
  for (int64_t i = 0; i < m; i++) count += keys[i] > than;
  return count;
}

// Moves the keys greater than `than`, or the others, to the front; returns their number.
template <class K>
static int64_t keep_side(K* keys, int64_t m, K than, bool upper) {
  int64_t kept = 0;
  for (int64_t i = 0; i < m; i++) {
    const K key = keys[i];
    keys[kept] = key;
    kept += (key > than) == upper;
  }
  return kept;
}

template <class K>
SK_AVX512 static int64_t count_greater_avx512(const K* keys, int64_t m, K than) {
  constexpr int kLanes = 64 / sizeof(K);
  int64_t count = 0, i = 0;
  for (; i + kLanes <= m; i += kLanes) count += __builtin_popcountll(greater(_mm512_loadu_si512(keys + i), than));
  const uint64_t rest = (uint64_t{1} << (m - i)) - 1;
  return count + __builtin_popcountll(greater(_mm512_loadu_si512(keys + i), than) & rest);
}

template <class K>
SK_AVX512 static int64_t keep_side_avx512(K* keys, int64_t m, K than, bool upper) {
  constexpr int kLanes = 64 / sizeof(K);
  const uint64_t flip = upper ? 0 : ~uint64_t{0};
  int64_t kept = 0;
  for (int64_t i = 0; i < m; i += kLanes) {
    const uint64_t valid = m - i >= kLanes ? (uint64_t{1} << kLanes) - 1 : (uint64_t{1} << (m - i)) - 1;
    const __m512i block = _mm512_loadu_si512(keys + i);
    const uint64_t mask = (greater(block, than) ^ flip) & valid;
    compress(keys + kept, mask, block);
    kept += __builtin_popcountll(mask);
  }
  return kept;
}

static int64_t count_greater_avx512(const int64_t* keys, int64_t m, int64_t than) { return count_greater(keys, m, than); }
static int64_t keep_side_avx512(int64_t* keys, int64_t m, int64_t than, bool upper) { return keep_side(keys, m, than, upper); }

// The need-th largest of m keys, 1 <= need <= m, all in [lo, hi]; reorders the list, behind which kSlack keys may be overwritten.
template <class K>
static Rank<K> rank(K* keys, int64_t m, K lo, K hi, int64_t need) {
  const bool wide = is_avx512();
  while (lo < hi && m > 1) {
    const K middle = static_cast<K>((lo & hi) + ((lo ^ hi) >> 1));  // their mean, which cannot overflow
    const int64_t greater = wide ? count_greater_avx512(keys, m, middle) : count_greater(keys, m, middle);
    const bool upper = greater >= need;
    if (upper)
      lo = static_cast<K>(middle + 1);
    else
      hi = middle, need -= greater;
    if (greater != (upper ? m : 0)) m = wide ? keep_side_avx512(keys, m, middle, upper) : keep_side(keys, m, middle, upper);
  }
  return {m == 1 ? keys[0] : lo, need, m};
}

// ------------------------------------------------------------------------------------------------------------ workspace

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

// ------------------------------------------------------------------------------------------------------------- windows

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

// ------------------------------------------------------------------------------------------------------- after the scan

// Widths for the next window, from how far the threshold moved and how many scores a key is worth here.
template <class K>
static void learn(Layer& layer, K threshold, int64_t within) {
  double* hint = layer.hint;
  if (!hint) return;
  const double dense = double(within) / (double(layer.hi) - double(layer.lo) + 1);  // scores a key, about the threshold
  const auto half = [&](double share) { return share * double(layer.n) / (2 * dense); };
  const bool known = hint[1] > 0 && std::isfinite(hint[0]) && std::isfinite(hint[1]);
  double next = half(1. / 64);
  if (known) next = std::max(4 * std::abs(double(threshold) - hint[0]), layer.missed ? 0 : .75 * hint[1]);
  next = std::clamp(next, half(std::min(1. / 8192 + 32 / double(layer.n), 1. / 16)), half(1. / 16));
  hint[0] = double(threshold);
  hint[1] = std::max(next, .5);
  hint[2] = double(within);
  hint[3] = (hint[3] >= 0 && hint[3] < 1e15 ? hint[3] : 0) + double(layer.missed);
}

// What is kept of the scores within the window: keys above `key`, and of those equal to it the ordinals [from, to).
template <class K>
struct Cut {
  K key;
  int64_t from, to;
};

// The set bits of `ties` whose ordinals are kept; the first has the given ordinal.
static inline uint64_t kept_ties(uint64_t ties, int count, int64_t from, int64_t to, int64_t ordinal) {
  if (ordinal >= from && ordinal + count <= to) return ties;
  if (ordinal + count <= from || ordinal >= to) return 0;
  uint64_t kept = 0;
  for (uint64_t rest = ties; rest; rest &= rest - 1, ordinal++)
    if (ordinal >= from && ordinal < to) kept |= rest & -rest;
  return kept;
}

// Opens the bits of one chunk's pieces. `keys` lists the keys within the window in order, or is null where all equal the cut's;
// `ordinal` counts the ties so far.
template <class K>
static void settle_portable(const Piece* p, int64_t count, const K* keys, Cut<K> cut, Word* bits, int64_t& ordinal) {
  for (const Piece* last = p + count; p < last; p++) {
    uint64_t above = 0, ties = p->within;
    if (keys) {
      ties = 0;
      for (uint64_t rest = p->within; rest; rest &= rest - 1, keys++) {
        const uint64_t bit = rest & -rest;
        above |= *keys > cut.key ? bit : 0;
        ties |= *keys == cut.key ? bit : 0;
      }
    }
    const int tied = __builtin_popcountll(ties);
    bits[p->word] |= above | kept_ties(ties, tied, cut.from, cut.to, ordinal);
    ordinal += tied;
  }
}

template <class K>
SK_AVX512 static void settle_avx512(const Piece* p, int64_t count, const K* keys, Cut<K> cut, Word* bits, int64_t& ordinal) {
  constexpr int kLanes = 64 / sizeof(K);
  for (const Piece* last = p + count; p < last; p++) {
    uint64_t above = 0, ties = p->within;
    if (keys) {
      const int size = __builtin_popcountll(p->within);
      uint64_t reached = 0;
      for (int j = 0; j < size; j += kLanes) {
        const __m512i block = _mm512_loadu_si512(keys + j);
        above |= greater(block, cut.key) << j;
        reached |= greater(block, static_cast<K>(cut.key - 1)) << j;
      }
      above = _pdep_u64(above, p->within);
      ties = _pdep_u64(reached, p->within) & ~above;
      keys += size;
    }
    const int tied = __builtin_popcountll(ties);
    bits[p->word] |= above | kept_ties(ties, tied, cut.from, cut.to, ordinal);
    ordinal += tied;
  }
}

static void settle_avx512(const Piece* p, int64_t count, const int64_t* keys, Cut<int64_t> cut, Word* bits, int64_t& ordinal) {
  settle_portable(p, count, keys, cut, bits, ordinal);
}

// The effective weights of the bits that were opened after the scan, one by one: each costs cache lines that are long gone.
template <class T>
static void open_weights(const Layer& layer, const Piece* p, int64_t count) {
  const auto* bits = reinterpret_cast<const Word*>(layer.bits);
  const auto* weight = static_cast<const T*>(layer.weight);
  auto* w_eff = static_cast<T*>(layer.w_eff);
  for (const Piece* last = p + count; p < last; p++)
    for (uint64_t rest = bits[p->word] & p->within; rest; rest &= rest - 1) {
      const int64_t i = p->word * 64 + __builtin_ctzll(rest);
      w_eff[i] = weight[i];
    }
}

// Completes a scanned layer, or moves it to the next stage where the window has missed.
template <class K>
static void resolve(Layer& layer, Workspace& space, Ties ties) {
  const Chunk* const begin = space.chunks.data() + layer.first_chunk;
  const Chunk* const end = begin + layer.chunks;
  const bool one_key = layer.lo == layer.hi;
  int64_t above = 0, within = 0, listed = 0;
  for (const Chunk* c = begin; c < end; c++) above += c->above, within += c->within, listed += c->keys_found;
  if (layer.k == 0 || layer.k == layer.n) {
    layer.stage = Stage::done;
    return;
  }
  if (above >= layer.k || above + within < layer.k || (!one_key && listed < within)) {
    layer.stage = layer.stage == Stage::hint ? Stage::sample : Stage::exact;
    layer.missed++;
    return;
  }
  const K* const all_keys = space.keys.get<K>(0);
  Rank<K> found = {static_cast<K>(layer.lo), layer.k - above, within};
  if (!one_key) {
    K* list = space.scratch.get<K>(within + kSlack);
    int64_t m = 0;
    for (const Chunk* c = begin; c < end; m += c->keys_found, c++)
      std::memcpy(list + m, all_keys + c->keys, c->keys_found * sizeof(K));
    found = rank(list, m, static_cast<K>(layer.lo), static_cast<K>(layer.hi), layer.k - above);
  }
  learn(layer, found.key, within);
  const Cut<K> cut = {found.key, ties == Ties::last ? found.ties - found.need : 0, ties == Ties::first ? found.need : found.ties};
  auto* bits = reinterpret_cast<Word*>(layer.bits);
  const auto* all_pieces = space.pieces.get<Piece>(0);
  const bool wide = is_avx512();
  int64_t ordinal = 0;
  for (const Chunk* c = begin; c < end; c++) {
    const Piece* const pieces = all_pieces + c->pieces;
    const K* const keys = one_key ? nullptr : all_keys + c->keys;
    if (wide)
      settle_avx512(pieces, c->pieces_found, keys, cut, bits, ordinal);
    else
      settle_portable(pieces, c->pieces_found, keys, cut, bits, ordinal);
    if (layer.weight_size == 2) open_weights<uint16_t>(layer, pieces, c->pieces_found);
    if (layer.weight_size == 4) open_weights<uint32_t>(layer, pieces, c->pieces_found);
    if (layer.weight_size == 8) open_weights<uint64_t>(layer, pieces, c->pieces_found);
  }
  layer.stage = Stage::done;
}

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
  auto* bits = reinterpret_cast<Word*>(layer.bits);
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
  if (chunk.last == words(layer.n)) std::fill(bits + chunk.last, bits + tiles(layer.n) * 8, 0);
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
