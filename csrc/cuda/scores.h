// What `select` and `threshold` share: scores as keys, 1,024 of them at a time, their bits, and the weights behind the bits.
//
// The key of a score is an unsigned integer that orders as the specification says. By magnitude it is the magnitude's bits, by
// value those above or below infinity's: -0.0 and +0.0 share a key, and every NaN has the one after infinity's, the largest.
// Scores of 16 bits are the upper halves of 32, so their keys are whole multiples of 65,536.
#pragma once
#include "device.h"

constexpr int kStrip = 1024;                            // scores that a warp takes at a time: one word of the mask a lane
constexpr int kStripThreads = 256;                      // of a block that works in strips
constexpr int kStripWarps = kStripThreads / kWarpSize;  // strips of its tile

__host__ __device__ constexpr int64_t strips(int64_t n) { return (n + kStrip - 1) / kStrip; }
__host__ __device__ constexpr int64_t mask_words(int64_t n) { return (n + kTile - 1) / kTile * (kTile / 32); }

// --------------------------------------------------------------------------------------------------------------------- keys

// S: the unsigned integer that a score is read as.
template <class S>
using Key = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;
// log2 of the step from one key to the next, for scores of that many bytes.
__host__ __device__ constexpr int key_unit(int size) { return size == 2 ? 16 : 0; }

// The key of NaN; inf is infinity's bits, widened.
template <class K>
__host__ __device__ constexpr K nan_key(K inf, int size, bool value) {
  return (value ? 2 * inf : inf) + (K{1} << key_unit(size));
}

// The key of a widened score.
template <class K>
__host__ __device__ __forceinline__ K key_of(K raw, K inf, K nan, bool value) {
  K key = raw & (~K{0} >> 1);
  if (value) {  // a negative NaN ends up below 0, that is, above everything
    const K sign = K{0} - (raw >> (8 * sizeof(K) - 1));
    key = (key ^ sign) - sign + inf;
  }
  return key < nan ? key : nan;
}

// Calls f with a value of the type that scores of that many bytes are read as, and whether their sign counts, as constants.
template <class F>
__device__ __forceinline__ void with_scores(int size, bool value, const F& f) {
  if (size == 4)
    value ? f(uint32_t{}, std::true_type{}) : f(uint32_t{}, std::false_type{});
  else if (size == 2)
    value ? f(uint16_t{}, std::true_type{}) : f(uint16_t{}, std::false_type{});
  else
    value ? f(uint64_t{}, std::true_type{}) : f(uint64_t{}, std::false_type{});
}

// ------------------------------------------------------------------------------------------------------------------- strips
//
// A lane reads 16 bytes of a strip at a time, E scores, next to the lanes beside it: a row. It has 32 / E rows, and bit r * E + e
// of what it holds is about score e of its piece of row r.

template <class S>
constexpr int kEach = 16 / sizeof(S);  // E

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarpSize; }

// The first score, counted from the tensor's start, of the lane's piece of a row.
template <int E>
__device__ __forceinline__ int64_t piece_start(int64_t strip, int row) {
  return strip * kStrip + row * (kWarpSize * E) + lane_of_thread() * E;
}

// 16 bytes in one instruction: of an aggregate that is loaded or stored in the language's way the compiler may make several.
#ifndef SUBNET_KERNELS_EMULATED
__device__ __forceinline__ uint4 load_16(const void* at) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
  return x;
}
__device__ __forceinline__ void store_16(void* at, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
// Asks for memory to be brought into the L2 cache; `bytes` is a multiple of 16, and so is the address. sm_90 or later.
__device__ __forceinline__ void prefetch(const void* at, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#endif
}
#else
inline void prefetch(const void*, int) {}
inline uint4 load_16(const void* at) { return *static_cast<const uint4*>(at); }
inline void store_16(void* at, uint4 x) { *static_cast<uint4*>(at) = x; }
#endif

// The widened score e of 16 bytes.
template <class S>
__device__ __forceinline__ Key<S> score_in(const uint4& x, int e) {
  const unsigned w[4] = {x.x, x.y, x.z, x.w};
  if constexpr (sizeof(S) == 4)
    return w[e];
  else if constexpr (sizeof(S) == 2)
    return e % 2 ? w[e / 2] & 0xffff0000u : w[e / 2] << 16;
  else
    return uint64_t{w[2 * e + 1]} << 32 | w[2 * e];
}

template <class S>
__device__ __forceinline__ uint4 partial_piece(const S* scores, int64_t first, int64_t n) {
  S part[kEach<S>];
  unsigned w[4];
#pragma unroll
  for (int e = 0; e < kEach<S>; e++) part[e] = first + e < n ? scores[first + e] : S{0};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(S) == 4)
      w[i] = part[i];
    else if constexpr (sizeof(S) == 2)
      w[i] = part[2 * i] | unsigned{part[2 * i + 1]} << 16;
    else
      w[i] = static_cast<unsigned>(part[i / 2] >> i % 2 * 32);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Of the lane's scores of a strip, those with key >= high and those with key >= low, low <= high.
struct Sides {
  unsigned above, reached;
};
template <class K>
struct Ends {
  K low, high;
};

// `ends` gives the Ends; it is asked after the first loads are on their way, so that it may wait for memory too.
template <class S, bool Value, class F>
__device__ __forceinline__ Sides read_strip(const S* scores, int64_t strip, int64_t n, Key<S> inf, const F& ends) {
  constexpr int E = kEach<S>, kRows = 32 / E, kBatch = sizeof(S) == 4 ? 8 : 4;  // loads in flight: as many as registers allow
  const Key<S> nan = nan_key(inf, sizeof(S), Value);
  const bool full = (strip + 1) * kStrip <= n;
  Sides sides = {0, 0};
  Ends<Key<S>> end = {};
#pragma unroll
  for (int batch = 0; batch < kRows; batch += kBatch) {
    uint4 x[kBatch];
    if (full) {
#pragma unroll
      for (int r = 0; r < kBatch; r++) x[r] = load_16(scores + piece_start<E>(strip, batch + r));
    } else {
#pragma unroll
      for (int r = 0; r < kBatch; r++) x[r] = partial_piece(scores, piece_start<E>(strip, batch + r), n);
    }
    if (batch == 0) end = ends();
#pragma unroll
    for (int r = 0; r < kBatch; r++)
#pragma unroll
      for (int e = 0; e < E; e++) {
        const Key<S> key = key_of(score_in<S>(x[r], e), inf, nan, Value);
        const unsigned bit = 1u << ((batch + r) * E + e);
        if (key >= end.high) sides.above |= bit;
        if (key >= end.low) sides.reached |= bit;
      }
  }
  if (!full) {
    unsigned valid = 0;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int64_t left = n - piece_start<E>(strip, r);
      const int there = left < 0 ? 0 : left < E ? static_cast<int>(left) : E;
      valid |= ((1u << there) - 1) << r * E;
    }
    sides.above &= valid, sides.reached &= valid;
  }
  return sides;
}

// From the lane's bits of its rows to word `lane` of the strip's 32: every E bits are a cell of a square of G = 32 / E lanes and
// rows, which is turned about its diagonal.
template <int E>
__device__ __forceinline__ unsigned word_of_strip(unsigned bits) {
  constexpr int G = 32 / E;
  const int lane = lane_of_thread();
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) {
    const int distance = step * E;
    const unsigned low = distance == 16 ? 0x0000ffffu : distance == 8 ? 0x00ff00ffu : distance == 4 ? 0x0f0f0f0fu : 0x33333333u;
    const bool upper = lane & step;
    const unsigned given = upper ? bits & low : bits >> distance & low;
    const unsigned got = __shfl_xor_sync(kAllLanes, given, step);
    bits = upper ? (bits & ~low) | got : (bits & low) | got << distance;
  }
  return __shfl_sync(kAllLanes, bits, lane % E * G + lane / E);
}

// Stores the strip's words, up to the end of the padded mask.
template <int E>
__device__ __forceinline__ void store_strip(uint32_t* bits, int64_t strip, int64_t n, unsigned open) {
  const unsigned word = word_of_strip<E>(open);
  const int64_t at = strip * kWarpSize + lane_of_thread();
  if (at < mask_words(n)) bits[at] = word;
}

// ------------------------------------------------------------------------------------------------------ weights behind bits

// All ones where the bits say open: word w of consecutive weights of type W.
template <class W>
__device__ __forceinline__ unsigned open_word(unsigned bits, int w) {
  if constexpr (sizeof(W) == 4)
    return 0u - (bits >> w & 1u);
  else if constexpr (sizeof(W) == 8)
    return 0u - (bits >> w / 2 & 1u);
  else
    return (bits >> 2 * w & 1u) * 0xffffu | (bits >> (2 * w + 1) & 1u) * 0xffff0000u;
}

// 4 words, or fewer, of weights or of what is kept of them.
template <int Words>
__device__ __forceinline__ uint4 load_words(const void* at) {
  if constexpr (Words == 4) return load_16(at);
  if constexpr (Words == 2) {
    const uint2 x = *static_cast<const uint2*>(at);
    return make_uint4(x.x, x.y, 0, 0);
  }
  return make_uint4(*static_cast<const unsigned*>(at), 0, 0, 0);
}
template <int Words>
__device__ __forceinline__ void store_words(void* at, uint4 x) {
  if constexpr (Words == 4)
    store_16(at, x);
  else if constexpr (Words == 2)
    *static_cast<uint2*>(at) = make_uint2(x.x, x.y);
  else
    *static_cast<unsigned*>(at) = x.x;
}

// w_eff = weight where open, +0 elsewhere, for the lane's scores of a strip; never a product.
template <int E, class W>
__device__ __forceinline__ void keep_strip(const W* weight, W* w_eff, int64_t strip, int64_t n, unsigned open) {
  if ((strip + 1) * kStrip > n) {
#pragma unroll 1
    for (int b = 0; b < 32; b++) {
      const int64_t i = piece_start<E>(strip, b / E) + b % E;
      if (i < n) w_eff[i] = open >> b & 1u ? weight[i] : W{0};
    }
    return;
  }
  constexpr int kWords = E * sizeof(W) / 4, kPart = kWords < 4 ? kWords : 4, kParts = kWords / kPart;  // of a piece
  constexpr int kBatch = 4;                                                                            // loads in flight
#pragma unroll
  for (int batch = 0; batch < 32 / E * kParts; batch += kBatch) {
    uint4 x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      const int row = (batch + j) / kParts, part = (batch + j) % kParts;
      x[j] = load_words<kPart>(reinterpret_cast<const unsigned*>(weight + piece_start<E>(strip, row)) + part * kPart);
    }
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      const int row = (batch + j) / kParts, part = (batch + j) % kParts;
      const unsigned bits = open >> row * E;
      x[j].x &= open_word<W>(bits, 4 * part), x[j].y &= open_word<W>(bits, 4 * part + 1);
      x[j].z &= open_word<W>(bits, 4 * part + 2), x[j].w &= open_word<W>(bits, 4 * part + 3);
      store_words<kPart>(reinterpret_cast<unsigned*>(w_eff + piece_start<E>(strip, row)) + part * kPart, x[j]);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------- layers

// One pair of scores and bits of a call.
struct Layer {
  const void* scores;
  uint32_t* bits;
  const void* weight;
  void* w_eff;
  int64_t n;
  int64_t first_tile;  // of the launch's tiles, of kStripWarps strips each
  uint64_t inf;        // infinity's bits, widened
  int size;            // bytes of a score
  int weight_size;     // of a weight; 0 where no effective weight is asked for
};

template <int E>
__device__ __forceinline__ void keep_strip(const Layer& layer, int64_t strip, unsigned open) {
  if (layer.weight_size == 4)
    keep_strip<E>(static_cast<const uint32_t*>(layer.weight), static_cast<uint32_t*>(layer.w_eff), strip, layer.n, open);
  else if (layer.weight_size == 2)
    keep_strip<E>(static_cast<const uint16_t*>(layer.weight), static_cast<uint16_t*>(layer.w_eff), strip, layer.n, open);
  else if (layer.weight_size == 8)
    keep_strip<E>(static_cast<const uint64_t*>(layer.weight), static_cast<uint64_t*>(layer.w_eff), strip, layer.n, open);
}

// The layers of a launch, which carries them. L is a Layer and what its op adds.
template <class L, int Most>
struct Table {
  static constexpr int kMost = Most;
  L layer[Most];
  int64_t tiles;
  int layers;

  // The layer of the tile: the last one that begins at it or before.
  __device__ const L& of_tile(int64_t tile) const {
    int low = 0, high = layers;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (layer[middle].first_tile <= tile ? low : high) = middle;
    }
    return layer[low];
  }
};

// f(table, first) for tables of all layers in turn, each as small as holds its layers: what a launch carries costs time. `tiles`
// says how many of a layer's tiles take part; f may still complete the layers of its table.
template <class L, class Tiles, class F>
void with_tables(std::vector<L>& layers, const Tiles& tiles, const F& f) {
  constexpr size_t kFew = 32, kMost = 128;
  for (size_t first = 0; first < layers.size(); first += kMost) {
    const size_t count = std::min(kMost, layers.size() - first);
    const auto with = [&](auto table) {
      for (size_t i = 0; i < count; i++) {
        L& layer = layers[first + i];
        layer.first_tile = table.tiles;
        table.tiles += tiles(layer);
        table.layer[table.layers++] = layer;
      }
      f(table);
    };
    if (count <= kFew)
      with(Table<L, kFew>{});
    else
      with(Table<L, kMost>{});
  }
}

// Takes the tensors of a call: checks them, and holds the copies of those that kernels cannot read or write where they lie.
class Arguments {
 public:
  explicit Arguments(const Place& place) : place_(place) {}

  void take_scores(Layer& layer, const Tensor& scores) {
    place_.check("scores", scores);
    switch (scores.scalar_type()) {
      case ScalarType::Half:
        layer.size = 2, layer.inf = 0x7c000000;
        break;
      case ScalarType::BFloat16:
        layer.size = 2, layer.inf = 0x7f800000;
        break;
      case ScalarType::Float:
        layer.size = 4, layer.inf = 0x7f800000;
        break;
      case ScalarType::Double:
        layer.size = 8, layer.inf = 0x7ff0000000000000;
        break;
      default:
        STD_TORCH_CHECK(false, place_.op(), ": scores must be float16, bfloat16, float32 or float64, got another dtype");
    }
    layer.n = scores.numel();
    layer.scores = read(scores);
  }

  Tensor new_bits(Layer& layer) {
    Tensor bits = place_.empty({mask_bytes(layer.n)}, aoti_torch_dtype_uint8());
    layer.bits = static_cast<uint32_t*>(bits.mutable_data_ptr());
    return bits;
  }

  void take_bits(Layer& layer, const Tensor& bits) {
    place_.check("bits", bits);
    check_bits(place_.op(), bits, layer.n);
    layer.bits = static_cast<uint32_t*>(written(bits));
  }

  // A weight and the effective weight; nothing where the latter is empty.
  void take_weight(Layer& layer, const Tensor& weight, const Tensor& w_eff) {
    if (w_eff.numel() == 0) return;
    const char* const op = place_.op();
    place_.check("weights", weight);
    place_.check("w_eff", w_eff);
    STD_TORCH_CHECK(weight.numel() == layer.n, op, ": weights must have the ", layer.n, " elements of their scores, got ",
                    weight.numel());
    STD_TORCH_CHECK(w_eff.numel() == layer.n && w_eff.is_contiguous(), op, ": w_eff must be contiguous with ", layer.n,
                    " elements or empty, got ", w_eff.numel());
    STD_TORCH_CHECK(weight.scalar_type() == w_eff.scalar_type(), op, ": w_eff must have its weight's dtype");
    const auto size = static_cast<int>(weight.element_size());
    STD_TORCH_CHECK(size == 2 || size == 4 || size == 8, op, ": weights must have elements of 2, 4 or 8 bytes, got ", size);
    layer.weight_size = size;
    layer.weight = read(weight);
    layer.w_eff = written(w_eff);
  }

  // Copies back what was written elsewhere than where it belongs.
  void flush() {
    for (Target& target : targets_) target.flush();
  }

 private:
  const void* read(const Tensor& t) {
    copies_.push_back(aligned(t));
    return copies_.back().const_data_ptr();
  }
  void* written(const Tensor& t) {
    targets_.emplace_back(t);
    return targets_.back().tensor().mutable_data_ptr();
  }

  const Place& place_;
  std::vector<Tensor> copies_;
  std::vector<Target> targets_;
};
