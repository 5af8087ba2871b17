// Packed masks near their entropy: every bit is coded given a context that the decoder knows already, such as whether an earlier
// task uses the weight. Pure C++ with pybind11, no libtorch; the layout is described in docs/codec.md, byte by byte.
//
// A mask is cut into blocks of 64 KB of bits, each decodable by itself. In a block the bits of each context are put side by side
// and taken by the byte; a byte's probability follows from the share of ones alone, so that share is all that is sent. The bytes
// go through range asymmetric numeral systems (Duda, arXiv 1311.2540): two 64-bit states in turn, words of 32 bits.
#ifndef SUBNET_CODEC_ALONE  // tests/fuzz_codec.cpp has a program of its own
#include <pybind11/pybind11.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using Bytes = std::vector<uint8_t>;

constexpr char kMagic[4] = {'S', 'K', 'M', '1'};
constexpr size_t kBlock = 65536;  // bytes of packed bits in a block
constexpr size_t kBlockWeights = kBlock * 8;
constexpr int kMostPlanes = 3;
constexpr int kMostContexts = 1 << kMostPlanes;
constexpr int kScale = 15;  // probabilities are multiples of 2^-15
constexpr uint32_t kWhole = 1u << kScale;
constexpr int kEscape = 256;           // the symbol before a byte that is too rare to have one of its own
constexpr uint64_t kLow = 1ull << 31;  // a state is in [2^31, 2^63) between symbols
constexpr size_t kLeast = 6;           // bytes of the smallest block: checksum, kind, a byte

[[noreturn]] void damaged(const char* what) {
  throw std::invalid_argument(std::string("decode: the coded mask is damaged: ") + what);
}

// ---- bytes -----------------------------------------------------------------------------------------------------------

struct Crc {
  uint32_t table[8][256];
  constexpr Crc() : table() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      table[0][i] = c;
    }
    for (int t = 1; t < 8; ++t)
      for (uint32_t i = 0; i < 256; ++i) table[t][i] = (table[t - 1][i] >> 8) ^ table[0][table[t - 1][i] & 255];
  }
};
constexpr Crc kCrc;

// CRC-32 as in zlib, eight bytes at a time.
uint32_t crc32(const uint8_t* p, size_t n) {
  uint32_t c = ~0u;
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    v ^= c;
    c = 0;
    for (int k = 0; k < 8; ++k) c ^= kCrc.table[7 - k][v >> (8 * k) & 255];
  }
  for (; n; ++p, --n) c = (c >> 8) ^ kCrc.table[0][(c ^ *p) & 255];
  return ~c;
}

template <class T>
void put(Bytes& out, T v) {
  const auto* p = reinterpret_cast<const uint8_t*>(&v);
  out.insert(out.end(), p, p + sizeof v);
}

void put_number(Bytes& out, uint64_t v) {  // seven bits a byte, the lowest first
  for (; v >= 128; v >>= 7) out.push_back(static_cast<uint8_t>(v | 128));
  out.push_back(static_cast<uint8_t>(v));
}

// Reads and never passes the end.
struct Reader {
  const uint8_t* p;
  const uint8_t* end;

  size_t left() const { return static_cast<size_t>(end - p); }
  template <class T>
  T get() {
    if (left() < sizeof(T)) damaged("it ends too early");
    T v;
    std::memcpy(&v, p, sizeof v);
    p += sizeof v;
    return v;
  }
  uint64_t number() {
    uint64_t v = 0;
    for (int shift = 0; shift < 63; shift += 7) {
      const auto byte = get<uint8_t>();
      v |= static_cast<uint64_t>(byte & 127) << shift;
      if (!(byte & 128)) return v;
    }
    damaged("a number is too long");
  }
};

// ---- contexts --------------------------------------------------------------------------------------------------------

using Planes = std::vector<const uint8_t*>;  // packed facts about the weights, at most kMostPlanes

int contexts_of(const Planes& planes) { return 1 << planes.size(); }

// The bits of one context side by side.
struct Stream {
  Bytes bytes;  // room for all of them, by whole words
  uint64_t acc = 0, ones = 0;
  size_t bits = 0;

  size_t size() const { return (bits + 7) / 8; }
  void put(uint64_t v, int n) {  // the low n bits; those above are zero
    const int filled = bits & 63;
    acc |= v << filled;
    if (filled + n >= 64) {
      store();
      acc = filled ? v >> (64 - filled) : 0;
    }
    bits += n;
    ones += std::popcount(v);
  }
  void finish(bool with) {  // fill the last byte with such bits
    if (with) acc |= ~0ull << (bits & 63);
    if (bits & 63) store();
  }
  void store() { std::memcpy(bytes.data() + bits / 64 * 8, &acc, 8); }
};

struct BitReader {
  const uint8_t* bytes;  // nine more than are read can be
  size_t bit = 0;

  uint64_t get(int n) {
    const uint8_t* at = bytes + (bit >> 3);
    const int shift = bit & 7;
    uint64_t v;
    std::memcpy(&v, at, 8);
    v = v >> shift | static_cast<uint64_t>(at[8]) << 1 << (63 - shift);
    bit += n;
    return n == 64 ? v : v & ((1ull << n) - 1);
  }
};

inline uint64_t word_at(const uint8_t* p, size_t bytes) {
  uint64_t w = 0;
  std::memcpy(&w, p, bytes);
  return w;
}

// Calls body(byte, bytes, masks) for every 64 of n weights: masks says which of them have each context.
template <int P, class Body>
inline __attribute__((always_inline)) void each_word(size_t n, const Planes& planes, Body body) {
  const uint8_t* plane[P + 1];
  for (int k = 0; k < P; ++k) plane[k] = planes[k];
  auto at = [&](size_t byte, size_t bytes, uint64_t valid) __attribute__((always_inline)) {
    uint64_t masks[1 << P];
    masks[0] = valid;
    for (int k = 0; k < P; ++k) {
      const uint64_t fact = word_at(plane[k] + byte, bytes);
      for (int c = 0; c < 1 << k; ++c) {
        masks[c | 1 << k] = masks[c] & fact;
        masks[c] &= ~fact;
      }
    }
    body(byte, bytes, masks);
  };
  size_t i = 0;
  for (; i + 64 <= n; i += 64) at(i / 8, 8, ~0ull);
  if (const size_t rest = n - i) at(i / 8, (rest + 7) / 8, (1ull << rest) - 1);
}

struct Portable {
  static uint64_t extract(uint64_t v, uint64_t mask) {
    uint64_t out = 0;
    for (int k = 0; mask; mask &= mask - 1, ++k) out |= (v >> std::countr_zero(mask) & 1) << k;
    return out;
  }
  static uint64_t deposit(uint64_t v, uint64_t mask) {
    uint64_t out = 0;
    for (; mask; mask &= mask - 1, v >>= 1) out |= (v & 1) << std::countr_zero(mask);
    return out;
  }
};

// The three passes over a block's weights: bits to streams, sizes of the streams, streams to bits.
template <class Ops>
struct Passes {
  template <int P>
  static inline __attribute__((always_inline)) void split_planes(const uint8_t* bits, size_t n, const Planes& planes,
                                                                 Stream* out) {
    each_word<P>(n, planes, [&](size_t byte, size_t bytes, const uint64_t* masks) __attribute__((always_inline)) {
      const uint64_t word = word_at(bits + byte, bytes);
      for (int c = 0; c < 1 << P; ++c) out[c].put(Ops::extract(word, masks[c]), std::popcount(masks[c]));
    });
  }
  template <int P>
  static inline __attribute__((always_inline)) void count_planes(size_t n, const Planes& planes, size_t* counts) {
    each_word<P>(n, planes, [&](size_t, size_t, const uint64_t* masks) __attribute__((always_inline)) {
      for (int c = 0; c < 1 << P; ++c) counts[c] += std::popcount(masks[c]);
    });
  }
  template <int P>
  static inline __attribute__((always_inline)) void merge_planes(BitReader* in, size_t n, const Planes& planes, uint8_t* bits) {
    each_word<P>(n, planes, [&](size_t byte, size_t bytes, const uint64_t* masks) __attribute__((always_inline)) {
      uint64_t word = 0;
      for (int c = 0; c < 1 << P; ++c) word |= Ops::deposit(in[c].get(std::popcount(masks[c])), masks[c]);
      std::memcpy(bits + byte, &word, bytes);
    });
  }
  static inline __attribute__((always_inline)) void split(const uint8_t* bits, size_t n, const Planes& planes, Stream* out) {
    switch (planes.size()) {
      case 0:
        return split_planes<0>(bits, n, planes, out);
      case 1:
        return split_planes<1>(bits, n, planes, out);
      case 2:
        return split_planes<2>(bits, n, planes, out);
      default:
        return split_planes<3>(bits, n, planes, out);
    }
  }
  static inline __attribute__((always_inline)) void count(size_t n, const Planes& planes, size_t* counts) {
    switch (planes.size()) {
      case 0:
        return count_planes<0>(n, planes, counts);
      case 1:
        return count_planes<1>(n, planes, counts);
      case 2:
        return count_planes<2>(n, planes, counts);
      default:
        return count_planes<3>(n, planes, counts);
    }
  }
  static inline __attribute__((always_inline)) void merge(BitReader* in, size_t n, const Planes& planes, uint8_t* bits) {
    switch (planes.size()) {
      case 0:
        return merge_planes<0>(in, n, planes, bits);
      case 1:
        return merge_planes<1>(in, n, planes, bits);
      case 2:
        return merge_planes<2>(in, n, planes, bits);
      default:
        return merge_planes<3>(in, n, planes, bits);
    }
  }
};

std::atomic<bool> portable{false};  // for tests

#if defined(__x86_64__)
struct Bmi {  // written out, as what has the intrinsics' target cannot be inlined into what has not
  static uint64_t extract(uint64_t v, uint64_t mask) {
    uint64_t out;
    asm("pext %2, %1, %0" : "=r"(out) : "r"(v), "r"(mask));
    return out;
  }
  static uint64_t deposit(uint64_t v, uint64_t mask) {
    uint64_t out;
    asm("pdep %2, %1, %0" : "=r"(out) : "r"(v), "r"(mask));
    return out;
  }
};
__attribute__((target("popcnt"))) void split_bmi(const uint8_t* bits, size_t n, const Planes& planes, Stream* out) {
  Passes<Bmi>::split(bits, n, planes, out);
}
__attribute__((target("popcnt"))) void count_bmi(size_t n, const Planes& planes, size_t* counts) {
  Passes<Bmi>::count(n, planes, counts);
}
__attribute__((target("popcnt"))) void merge_bmi(BitReader* in, size_t n, const Planes& planes, uint8_t* bits) {
  Passes<Bmi>::merge(in, n, planes, bits);
}
#endif

bool has_bmi() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  return has && !portable;
#else
  return false;
#endif
}

#if !defined(__x86_64__)
constexpr auto split_bmi = Passes<Portable>::split;
constexpr auto count_bmi = Passes<Portable>::count;
constexpr auto merge_bmi = Passes<Portable>::merge;
#endif

void split(const uint8_t* bits, size_t n, const Planes& planes, Stream* out) {
  has_bmi() ? split_bmi(bits, n, planes, out) : Passes<Portable>::split(bits, n, planes, out);
}

void count(size_t n, const Planes& planes, size_t* counts) {
  has_bmi() ? count_bmi(n, planes, counts) : Passes<Portable>::count(n, planes, counts);
}

void merge(BitReader* in, size_t n, const Planes& planes, uint8_t* bits) {
  has_bmi() ? merge_bmi(in, n, planes, bits) : Passes<Portable>::merge(in, n, planes, bits);
}

// ---- probabilities ---------------------------------------------------------------------------------------------------

// How often each byte occurs among kWhole, where a bit is one with probability ones / n, 0 < ones < n. Integers alone: every
// machine must come to the same table.
struct Model {
  uint32_t frequency[257];
  uint32_t start[257];

  Model(uint64_t ones, uint64_t n) {
    constexpr int kFine = 30;
    const uint64_t p = ((ones << kFine) + n / 2) / n, q = (1ull << kFine) - p;
    constexpr uint64_t kBytesWith[9] = {1, 8, 28, 56, 70, 56, 28, 8, 1};
    uint64_t mass[9];
    uint32_t of[9];
    uint64_t rare = 0;
    int64_t rest = kWhole;
    for (int j = 0; j <= 8; ++j) {
      uint64_t v = 1ull << kFine;
      for (int k = 0; k < 8; ++k) v = (v * (k < j ? p : q)) >> kFine;
      mass[j] = v;
      of[j] = static_cast<uint32_t>((v + (1ull << (kFine - kScale - 1))) >> (kFine - kScale));
      if (of[j] == 0) rare += kBytesWith[j] * v;
      rest -= static_cast<int64_t>(kBytesWith[j] * of[j]);
    }
    bool escapes = false;
    for (int j = 0; j <= 8; ++j) escapes |= of[j] == 0;
    frequency[kEscape] =
        escapes ? std::max<uint32_t>(1, static_cast<uint32_t>((rare + (1ull << (kFine - kScale - 1))) >> (kFine - kScale))) : 0;
    rest -= frequency[kEscape];
    for (int s = 0; s < 256; ++s) frequency[s] = of[std::popcount(static_cast<unsigned>(s))];
    // what rounding left over goes to the bytes in turn, the likeliest kind first
    int kinds[9] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
    std::stable_sort(kinds, kinds + 9, [&](int a, int b) { return mass[a] > mass[b]; });
    while (rest)
      for (int kind : kinds)
        for (int s = 0; s < 256 && rest; ++s) {
          if (std::popcount(static_cast<unsigned>(s)) != kind || frequency[s] < 2) continue;
          const int step = rest > 0 ? 1 : -1;
          frequency[s] += step;
          rest -= step;
        }
    for (uint32_t s = 0, at = 0; s <= kEscape; at += frequency[s++]) start[s] = at;
  }
};

// ---- a block ---------------------------------------------------------------------------------------------------------

struct Coder {
  uint64_t state[2] = {kLow, kLow};
  std::vector<uint32_t> words;  // in the order in which they came, which is the decoder's backwards

  void put(int which, const Model& model, int symbol) {
    uint64_t& x = state[which];
    const uint64_t f = model.frequency[symbol];
    if (x >= f << (63 - kScale)) {
      words.push_back(static_cast<uint32_t>(x));
      x >>= 32;
    }
    x = (x / f << kScale) + x % f + model.start[symbol];
  }
};

Bytes encode_block(const uint8_t* bits, size_t n, const Planes& planes) {
  const size_t size = (n + 7) / 8;
  const int contexts = contexts_of(planes);
  Stream streams[kMostContexts];
  for (int c = 0; c < contexts; ++c) streams[c].bytes.resize(size + 8);
  split(bits, n, planes, streams);
  Bytes coded(4);  // the checksum
  coded.push_back(1);
  for (int c = 0; c < contexts; ++c) {
    put_number(coded, streams[c].ones);
    streams[c].finish(2 * streams[c].ones > streams[c].bits);
  }
  Bytes rare;
  Coder coder;
  std::vector<Model> models;
  std::vector<int> coded_contexts;
  size_t total = 0;
  for (int c = 0; c < contexts; ++c)
    if (streams[c].ones && streams[c].ones < streams[c].bits) {
      coded_contexts.push_back(c);
      models.emplace_back(streams[c].ones, streams[c].bits);
      total += streams[c].size();
    }
  size_t place = total;
  for (size_t k = coded_contexts.size(); k--;) {
    const auto& bytes = streams[coded_contexts[k]].bytes;
    for (size_t i = streams[coded_contexts[k]].size(); i--;) {
      const int which = --place & 1;
      const bool escape = models[k].frequency[bytes[i]] == 0;
      if (escape) rare.push_back(bytes[i]);
      coder.put(which, models[k], escape ? kEscape : bytes[i]);
    }
  }
  if (total) {
    put_number(coded, coder.words.size());
    put(coded, coder.state[0]);
    put(coded, coder.state[1]);
    for (size_t i = coder.words.size(); i--;) put(coded, coder.words[i]);
    coded.insert(coded.end(), rare.rbegin(), rare.rend());
  }
  if (coded.size() >= 5 + size) {
    coded.resize(4);
    coded.push_back(0);
    coded.insert(coded.end(), bits, bits + size);
  }
  const uint32_t sum = crc32(coded.data() + 4, coded.size() - 4);
  std::memcpy(coded.data(), &sum, 4);
  return coded;
}

void decode_stream(Reader& words, Reader& rare, uint64_t* state, size_t& place, const Model& model, uint8_t* out, size_t count) {
  std::vector<uint8_t> symbol(kWhole);
  uint32_t pair[256];  // frequency, and start above it
  for (int s = 0; s < 256; ++s) {
    std::memset(symbol.data() + model.start[s], s, model.frequency[s]);
    pair[s] = model.frequency[s] | model.start[s] << 16;
  }
  const uint32_t escapes = model.start[kEscape];
  auto next = [&](uint64_t& x) {
    if (x < kLow) x = x << 32 | words.get<uint32_t>();
  };
  auto one = [&](uint64_t& x) -> uint8_t {
    const auto slot = static_cast<uint32_t>(x & (kWhole - 1));
    if (slot >= escapes) {
      x = model.frequency[kEscape] * (x >> kScale) + slot - escapes;
      next(x);
      return rare.get<uint8_t>();
    }
    const uint8_t s = symbol[slot];
    x = (pair[s] & 0xFFFF) * (x >> kScale) + slot - (pair[s] >> 16);
    next(x);
    return s;
  };
  size_t i = 0;
  if (place & 1 && count) out[i++] = one(state[1]);
  uint64_t a = state[0], b = state[1];
  for (; i + 2 <= count; i += 2) {
    out[i] = one(a);
    out[i + 1] = one(b);
  }
  state[0] = a, state[1] = b;
  if (i < count) out[i] = one(state[0]);
  place += count;
}

void decode_block(const uint8_t* coded, size_t length, size_t n, const Planes& planes, uint8_t* bits) {
  const size_t size = (n + 7) / 8;
  Reader in{coded, coded + length};
  if (in.get<uint32_t>() != crc32(coded + 4, length - 4)) damaged("a checksum is wrong");
  const auto kind = in.get<uint8_t>();
  if (kind > 1) damaged("a block is of no known kind");
  if (kind == 0) {
    if (in.left() != size) damaged("a raw block has another size");
    if (n % 8 && in.p[size - 1] >> n % 8) damaged("there is padding that is not zero");
    std::memcpy(bits, in.p, size);
    return;
  }
  size_t counts[kMostContexts] = {};
  const int contexts = contexts_of(planes);
  count(n, planes, counts);
  uint64_t ones[kMostContexts];
  bool any = false;
  for (int c = 0; c < contexts; ++c) {
    ones[c] = in.number();
    if (ones[c] > counts[c]) damaged("more bits are one than there are");
    any |= ones[c] && ones[c] < counts[c];
  }
  uint64_t state[2] = {kLow, kLow};
  Reader words{in.p, in.p}, rare{in.p, in.p};
  if (any) {
    const uint64_t number = in.number();
    state[0] = in.get<uint64_t>();
    state[1] = in.get<uint64_t>();
    if (number > in.left() / 4) damaged("it ends too early");
    words = {in.p, in.p + 4 * number};
    rare = {words.end, in.end};
    if (state[0] >> 63 || state[1] >> 63 || state[0] < kLow || state[1] < kLow) damaged("a state is out of range");
  }
  Bytes streams[kMostContexts];
  BitReader readers[kMostContexts];
  size_t place = 0;
  for (int c = 0; c < contexts; ++c) {
    const size_t bytes = (counts[c] + 7) / 8;
    streams[c].resize(bytes + 16);
    if (ones[c] && ones[c] < counts[c]) {
      decode_stream(words, rare, state, place, Model(ones[c], counts[c]), streams[c].data(), bytes);
    } else {
      std::memset(streams[c].data(), ones[c] ? 255 : 0, bytes);
    }
    readers[c] = {streams[c].data()};
  }
  if (any ? words.left() || rare.left() || state[0] != kLow || state[1] != kLow : in.left() != 0)
    damaged("it goes on behind its end");
  merge(readers, n, planes, bits);
}

// ---- a mask ----------------------------------------------------------------------------------------------------------

// Run for every block; the first error is thrown on.
template <class Body>
void each_block(size_t blocks, int threads, Body body) {
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex lock;
  auto work = [&] {
    for (size_t b; (b = next++) < blocks;) {
      try {
        body(b);
      } catch (...) {
        std::lock_guard guard(lock);
        if (!error) error = std::current_exception();
        next = blocks;
      }
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads && static_cast<size_t>(t) < blocks; ++t) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

Planes planes_at(Planes planes, size_t byte) {
  for (auto& plane : planes) plane += byte;
  return planes;
}

size_t weights_of(size_t block, size_t n) { return std::min(kBlockWeights, n - block * kBlockWeights); }

Bytes encode_mask(const uint8_t* bits, size_t n, const Planes& planes, int threads) {
  const size_t blocks = (n + kBlockWeights - 1) / kBlockWeights;
  std::vector<Bytes> coded(blocks);
  each_block(blocks, threads,
             [&](size_t b) { coded[b] = encode_block(bits + b * kBlock, weights_of(b, n), planes_at(planes, b * kBlock)); });
  Bytes out(kMagic, kMagic + 4);
  out.push_back(static_cast<uint8_t>(planes.size()));
  put_number(out, n);
  for (const auto& block : coded) put_number(out, block.size());
  put(out, crc32(out.data(), out.size()));
  for (const auto& block : coded) out.insert(out.end(), block.begin(), block.end());
  return out;
}

void decode_mask(const uint8_t* data, size_t length, size_t n, const Planes& planes, uint8_t* bits, int threads) {
  Reader in{data, data + length};
  if (length < 4 || std::memcmp(data, kMagic, 4)) damaged("it does not begin as one");
  in.p += 4;
  if (in.get<uint8_t>() != planes.size())
    throw std::invalid_argument("decode: context must have as many planes as the mask was coded with");
  const uint64_t weights = in.number();
  if (weights != n)
    throw std::invalid_argument("decode: the coded mask must be of " + std::to_string(n) + " weights, it is of " +
                                std::to_string(weights));
  const size_t blocks = (n + kBlockWeights - 1) / kBlockWeights;
  if (blocks > in.left() / (kLeast + 1)) damaged("it ends too early");  // before anything of that size is allocated
  std::vector<size_t> at(blocks + 1);
  for (size_t b = 0; b < blocks; ++b) {
    const uint64_t size = in.number();
    if (size < kLeast || size > length) damaged("a block has no possible size");
    at[b + 1] = at[b] + size;
    if (at[b + 1] > length) damaged("it ends too early");
  }
  const auto header = static_cast<size_t>(in.p - data);
  if (in.get<uint32_t>() != crc32(data, header)) damaged("a checksum is wrong");
  if (in.left() != at[blocks]) damaged(in.left() < at[blocks] ? "it ends too early" : "it goes on behind its end");
  each_block(blocks, threads, [&](size_t b) {
    decode_block(in.p + at[b], at[b + 1] - at[b], weights_of(b, n), planes_at(planes, b * kBlock), bits + b * kBlock);
  });
}

}  // namespace

#ifndef SUBNET_CODEC_ALONE
// ---- Python ----------------------------------------------------------------------------------------------------------

namespace py = pybind11;

namespace {

// The bytes of a buffer, at least `least`.
py::buffer_info bytes_of(const py::buffer& buffer, size_t least, const char* what, bool writable = false) {
  py::buffer_info info = buffer.request(writable);
  const bool flat = info.ndim == 1 && info.itemsize == 1 && (info.shape[0] < 2 || info.strides[0] == 1);
  if (!flat || static_cast<size_t>(info.shape[0]) < least)
    throw std::invalid_argument(std::string(what) + " must be at least " + std::to_string(least) + " contiguous bytes");
  return info;
}

struct Context {
  std::vector<py::buffer_info> held;
  Planes pointers;

  Context(const py::list& planes, size_t least) {
    if (planes.size() > kMostPlanes)
      throw std::invalid_argument("context must have at most 3 planes, got " + std::to_string(planes.size()));
    for (const auto& plane : planes) {
      held.push_back(bytes_of(py::cast<py::buffer>(plane), least, "context"));
      pointers.push_back(static_cast<const uint8_t*>(held.back().ptr));
    }
  }
};

py::bytes encode(const py::buffer& bits, size_t n, const py::list& planes, int threads) {
  const size_t least = (n + 7) / 8;
  const py::buffer_info given = bytes_of(bits, least, "bits");
  const Context context(planes, least);
  Bytes coded;
  {
    py::gil_scoped_release free;
    coded = encode_mask(static_cast<const uint8_t*>(given.ptr), n, context.pointers, threads);
  }
  return {reinterpret_cast<const char*>(coded.data()), coded.size()};
}

void decode(const py::buffer& data, size_t n, const py::list& planes, const py::buffer& out, int threads) {
  const py::buffer_info given = bytes_of(data, 0, "data"), to = bytes_of(out, (n + 7) / 8, "out", true);
  const Context context(planes, (n + 7) / 8);
  py::gil_scoped_release free;
  decode_mask(static_cast<const uint8_t*>(given.ptr), static_cast<size_t>(given.shape[0]), n, context.pointers,
              static_cast<uint8_t*>(to.ptr), threads);
}

}  // namespace

PYBIND11_MODULE(_codec, m) {
  m.def("encode", &encode);
  m.def("decode", &decode);
  m.def("use_portable", [](bool yes) { portable = yes; });
}
#endif
