// Optimizer steps that leave frozen weights and their state bit-identical: SGD, RMSprop, Adam and AdamW over many tensors at
// once.
//
// A tile of 512 weights is the unit of work. Tiles of float and double tensors that lie in logical order are updated in place;
// others (half precision, other strides) pass through a buffer. New values are computed everywhere and then *selected*, so
// nothing behind a frozen bit gets out. A tile that is frozen as a whole is not touched.
//
// The loops are plain C++ and compiled once for each instruction set. Every operation is rounded by itself, in the order of the
// reference, so all instruction sets, thread counts and layouts give the same bits.
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common.h"

#define SK_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int kStates = 3;  // most state tensors that a rule keeps for a parameter
constexpr int kMaxDims = 64;

enum Rule : int {
  kSgd,
  kSgdFirst,
  kSgdMomentum,
  kNesterovFirst,
  kNesterov,
  kRms,
  kRmsMomentum,
  kRmsCentered,
  kRmsCenteredMomentum,
  kAdam,
  kAmsgrad,
  kRules
};

// The numbers of a step, in the type that it is computed in.
template <class A>
struct Scalars {
  A rate;                  // what the change is multiplied with
  A decay;                 // what the weight is multiplied with first (decoupled weight decay)
  A eps;                   // added to the root
  A root;                  // what the root is divided by (Adam's second bias correction)
  A mean, square;          // what is left of the running averages
  A new_mean, new_square;  // shares of what comes in
  A scale, weight_decay;   // of the gradient, before all else
};

// Half precision as it is stored.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// What a stored type is computed in.
template <class S>
using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

// All bits of `before` where keep is -1, of `after` where it is 0. Plain bit operations: a condition would be moved in front of
// the arithmetic by the compiler, which costs more than it saves.
template <class A>
SK_INLINE A select(int8_t keep, A before, A after) {
  using Word = std::conditional_t<sizeof(A) == 8, int64_t, std::conditional_t<sizeof(A) == 4, int32_t, int16_t>>;
  const Word mask = keep;
  return __builtin_bit_cast(
      A, static_cast<Word>((__builtin_bit_cast(Word, before) & mask) | (__builtin_bit_cast(Word, after) & ~mask)));
}

SK_INLINE float root(float x) { return __builtin_sqrtf(x); }
SK_INLINE double root(double x) { return __builtin_sqrt(x); }

// ------------------------------------------------------------------------------------------------------- one tile, any ISA

// One rule over n weights: w the weights, g their gradients, a, b, c their state; weights with a byte that is not 0 are kept.
template <Rule rule, bool masked, class A>
SK_INLINE void step(A* __restrict w, const A* __restrict g, A* __restrict a, A* __restrict b, A* __restrict c,
                    const int8_t* __restrict keep, int64_t n, const Scalars<A> s) {
#define SK_STORE(target, before, after) target[i] = masked ? select(keep[i], before, after) : after
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const A grad = g[i], weight = w[i];
    if constexpr (rule == kAdam || rule == kAmsgrad) {
      const A mean = a[i], square = b[i];
      const A new_mean = mean + s.new_mean * (grad - mean);
      const A new_square = s.square * square + s.new_square * (grad * grad);
      A variance = new_square;
      if constexpr (rule == kAmsgrad) {
        const A most = c[i];
        variance = (most > new_square) | (most != most) ? most : new_square;
        SK_STORE(c, most, variance);
      }
      const A denominator = root(variance) / s.root + s.eps;
      const A moved = weight * s.decay - s.rate * (new_mean / denominator);
      SK_STORE(a, mean, new_mean);
      SK_STORE(b, square, new_square);
      SK_STORE(w, weight, moved);
    } else if constexpr (rule >= kRms && rule <= kRmsCenteredMomentum) {
      const A square = a[i];
      const A new_square = s.square * square + s.new_square * (grad * grad);
      A variance = new_square;
      if constexpr (rule == kRmsCentered || rule == kRmsCenteredMomentum) {
        const A mean = b[i];
        const A new_mean = mean + s.new_square * (grad - mean);
        variance = new_square - new_mean * new_mean;
        SK_STORE(b, mean, new_mean);
      }
      A change = grad / (root(variance) + s.eps);
      if constexpr (rule == kRmsMomentum || rule == kRmsCenteredMomentum) {
        const A buffer = c[i];
        change = s.mean * buffer + change;
        SK_STORE(c, buffer, change);
      }
      const A moved = weight - s.rate * change;
      SK_STORE(a, square, new_square);
      SK_STORE(w, weight, moved);
    } else {
      A change = grad;
      if constexpr (rule != kSgd) {
        const A buffer = a[i];
        if constexpr (rule == kSgdMomentum || rule == kNesterov) change = s.mean * buffer + s.new_mean * grad;
        SK_STORE(a, buffer, change);
        if constexpr (rule == kNesterov || rule == kNesterovFirst) change = grad + s.mean * change;
      }
      const A moved = weight - s.rate * change;
      SK_STORE(w, weight, moved);
    }
  }
#undef SK_STORE
}

enum Prepare : int { kScale = 1, kNegate = 2, kDecay = 4 };

// The gradient that a rule sees: unscaled, negated to maximize, with weight decay added.
template <class A>
SK_INLINE void prepare(A* out, const A* g, const A* w, int64_t n, int what, const Scalars<A> s) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) out[i] = what & kScale ? g[i] / s.scale : g[i];
  if (what & kNegate)
    for (int64_t i = 0; i < n; i++) out[i] = -out[i];
  if (what & kDecay)
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) out[i] = out[i] + s.weight_decay * w[i];
}

// The bits of a tile, a byte each: -1 where frozen.
SK_INLINE void spread_portable(int8_t* keep, const uint8_t* bits) {
  for (int64_t i = 0; i < kTile; i++) keep[i] = is_open(bits, i) ? -1 : 0;
}

SK_AVX2 SK_INLINE void spread_avx2(int8_t* keep, const uint8_t* bits) {
  const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  for (int64_t i = 0; i < kTile; i += 32) {
    int32_t word;
    __builtin_memcpy(&word, bits + i / 8, 4);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), byte_of);
    _mm256_store_si256(reinterpret_cast<__m256i*>(keep + i), _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of));
  }
}

SK_AVX512 SK_INLINE void spread_avx512(int8_t* keep, const uint8_t* bits) {
  for (int64_t i = 0; i < kTile; i += 64) {
    uint64_t word;
    __builtin_memcpy(&word, bits + i / 8, 8);
    _mm512_store_si512(keep + i, _mm512_movm_epi8(word));
  }
}

SK_INLINE void widen(float* __restrict out, const Bf16* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = __builtin_bit_cast(float, static_cast<uint32_t>(in[i].bits) << 16);
}

SK_INLINE void narrow(Bf16* __restrict out, const float* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t word = __builtin_bit_cast(uint32_t, in[i]);
    const uint32_t nearest = (word + 0x7fff + (word >> 16 & 1)) >> 16;  // ties to even
    out[i].bits = static_cast<uint16_t>((word & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
  }
}

SK_INLINE void widen_portable(float* out, const Fp16* in, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = c10::detail::fp16_ieee_to_fp32_value(in[i].bits);
}

SK_INLINE void narrow_portable(Fp16* out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i].bits = c10::detail::fp16_ieee_from_fp32_value(in[i]);
}

SK_AVX2 SK_INLINE void widen_avx2(float* out, const Fp16* in, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    __m128i half = _mm_setzero_si128();
    __builtin_memcpy(&half, in + i, n - i < 8 ? 2 * (n - i) : 16);
    _mm256_store_ps(out + i, _mm256_cvtph_ps(half));  // out is a whole tile
  }
}

SK_AVX2 SK_INLINE void narrow_avx2(Fp16* out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_load_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_store_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
}

#define SK_SAME(isa, attribute)                                                                      \
  attribute SK_INLINE void widen_##isa(float* out, const Bf16* in, int64_t n) { widen(out, in, n); } \
  attribute SK_INLINE void narrow_##isa(Bf16* out, const float* in, int64_t n) { narrow(out, in, n); }
SK_SAME(portable, )
SK_SAME(avx2, SK_AVX2)
SK_SAME(avx512, SK_AVX512)
#undef SK_SAME
SK_AVX512 SK_INLINE void widen_avx512(float* out, const Fp16* in, int64_t n) { widen_avx2(out, in, n); }
SK_AVX512 SK_INLINE void narrow_avx512(Fp16* out, const float* in, int64_t n) { narrow_avx2(out, in, n); }

template <class S>
SK_INLINE void put(S* __restrict out, const S* __restrict in, const int8_t* __restrict keep, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = select(keep[i], out[i], in[i]);
}

template <class S>
using Tile = void (*)(S*, const S*, S*, S*, S*, const uint8_t*, int64_t, int, const Scalars<Acc<S>>&);

// A tile in place. a, b, c: null where the rule has no such state; bits: 64 bytes, or null where nothing is frozen; n <= 512.
#define SK_TILE(isa, attribute)                                                                           \
  template <Rule rule, class S>                                                                           \
  attribute void tile_##isa(S* w, const S* g, S* a, S* b, S* c, const uint8_t* bits, int64_t n, int what, \
                            const Scalars<Acc<S>>& s) {                                                   \
    using A = Acc<S>;                                                                                     \
    alignas(64) int8_t keep[kTile] = {};                                                                  \
    if (bits) spread_##isa(keep, bits);                                                                   \
    if constexpr (sizeof(S) > 2) {                                                                        \
      alignas(64) A buffer[kTile];                                                                        \
      if (what) {                                                                                         \
        prepare<A>(buffer, g, w, n, what, s);                                                             \
        g = buffer;                                                                                       \
      }                                                                                                   \
      if (bits) return step<rule, true, A>(w, g, a, b, c, keep, n, s);                                    \
      step<rule, false, A>(w, g, a, b, c, nullptr, n, s);                                                 \
    } else {                                                                                              \
      alignas(64) A wide[2 + kStates][kTile];                                                             \
      alignas(64) S rounded[kTile];                                                                       \
      S* streams[2 + kStates] = {w, const_cast<S*>(g), a, b, c};                                          \
      for (int t = 0; t < 2 + kStates; t++)                                                               \
        if (streams[t]) widen_##isa(wide[t], streams[t], n);                                              \
      if (what) prepare<A>(wide[1], wide[1], wide[0], n, what, s);                                        \
      step<rule, false, A>(wide[0], wide[1], wide[2], wide[3], wide[4], nullptr, n, s);                   \
      for (int t = 0; t < 2 + kStates; t++) {                                                             \
        if (t == 1 || !streams[t]) continue;                                                              \
        narrow_##isa(rounded, wide[t], n);                                                                \
        put(streams[t], rounded, keep, n);                                                                \
      }                                                                                                   \
    }                                                                                                     \
  }
SK_TILE(portable, )
SK_TILE(avx2, SK_AVX2)
SK_TILE(avx512, SK_AVX512)
#undef SK_TILE

template <class S, int... rule>
Tile<S> pick(int wanted, std::integer_sequence<int, rule...>) {
  static constexpr Tile<S> kTable[3][kRules] = {
      {tile_portable<Rule(rule), S>...}, {tile_avx2<Rule(rule), S>...}, {tile_avx512<Rule(rule), S>...}};
  return kTable[static_cast<int>(isa())][wanted];
}

// ------------------------------------------------------------------------------------------------------------ many tensors

// The order in which a parameter is walked, and how far apart its elements are.
struct Walk {
  std::vector<int64_t> sizes, strides;
};

// One parameter. Streams are the weight, the gradient and the state.
struct Job {
  int64_t n, first_tile, index;
  const uint8_t* frozen;
  ScalarType type;
  char* streams[2 + kStates];
  Walk logical;             // where the bits are, for tensors that are walked in memory order; else empty
  std::vector<Walk> apart;  // where each stream is, for streams whose strides differ; else empty
  Scalars<double> scalars;
};

// Calls f(k, offset) for elements [first, first + n) of a walk.
template <class F>
SK_INLINE void follow(const Walk& walk, int64_t first, int64_t n, F f) {
  const int64_t last = static_cast<int64_t>(walk.sizes.size()) - 1;
  const int64_t *sizes = walk.sizes.data(), *strides = walk.strides.data();
  int64_t at[kMaxDims], rest = first, offset = 0;
  for (int64_t d = last; d >= 0; d--) {
    at[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += at[d] * strides[d];
  }
  for (int64_t k = 0; k < n;) {
    const int64_t run = std::min(n - k, sizes[last] - at[last]), stride = strides[last];
    for (int64_t i = 0; i < run; i++) f(k + i, offset + i * stride);
    k += run;
    offset -= at[last] * stride;
    at[last] = 0;
    for (int64_t d = last - 1; d >= 0; d--) {
      offset += strides[d];
      if (++at[d] < sizes[d]) break;
      offset -= at[d] * strides[d];
      at[d] = 0;
    }
  }
}

enum class Frozen { none, some, all };

Frozen frozen(const uint8_t* bits, int64_t n) {
  uint64_t words[8], all = ~uint64_t{0}, any = 0;
  std::memcpy(words, bits, sizeof(words));
  for (int i = 0; i < 8; i++) {
    const int64_t left = std::clamp<int64_t>(n - 64 * i, 0, 64);
    all &= left == 64 ? words[i] : words[i] | ~uint64_t{0} << left;
    any |= words[i];
  }
  return all == ~uint64_t{0} ? Frozen::all : any ? Frozen::some : Frozen::none;
}

template <class S>
void run(const Job& job, Rule rule, int what, int64_t begin, int64_t end) {
  using A = Acc<S>;
  const Tile<S> f = pick<S>(rule, std::make_integer_sequence<int, kRules>());
  const Scalars<double>& d = job.scalars;
  const Scalars<A> s = {A(d.rate),   A(d.decay),    A(d.eps),        A(d.root),  A(d.mean),
                        A(d.square), A(d.new_mean), A(d.new_square), A(d.scale), A(d.weight_decay)};
  for (int64_t t = begin; t < end; t++) {
    const int64_t first = t * kTile, n = std::min(kTile, job.n - first);
    const uint8_t* bits = job.frozen ? job.frozen + t * kTileBytes : nullptr;
    uint8_t moved[kTileBytes];
    if (bits && !job.logical.sizes.empty()) {
      std::memset(moved, 0, sizeof(moved));
      follow(job.logical, first, n, [&](int64_t k, int64_t i) { moved[k >> 3] |= is_open(job.frozen, i) << (k & 7); });
      bits = moved;
    }
    if (bits) {
      const Frozen kind = frozen(bits, n);
      if (kind == Frozen::all) continue;
      if (kind == Frozen::none) bits = nullptr;
    }
    S* p[2 + kStates];
    if (job.apart.empty()) {
      for (int i = 0; i < 2 + kStates; i++) p[i] = job.streams[i] ? reinterpret_cast<S*>(job.streams[i]) + first : nullptr;
      f(p[0], p[1], p[2], p[3], p[4], bits, n, what, s);
      continue;
    }
    alignas(64) S buffer[2 + kStates][kTile];
    for (int i = 0; i < 2 + kStates; i++) {
      p[i] = job.streams[i] ? buffer[i] : nullptr;
      const S* from = reinterpret_cast<const S*>(job.streams[i]);
      if (from) follow(job.apart[i], first, n, [&](int64_t k, int64_t at) { buffer[i][k] = from[at]; });
    }
    f(p[0], p[1], p[2], p[3], p[4], bits, n, what, s);
    for (int i = 0; i < 2 + kStates; i++) {
      S* to = reinterpret_cast<S*>(job.streams[i]);
      if (to && i != 1) follow(job.apart[i], first, n, [&](int64_t k, int64_t at) { to[at] = buffer[i][k]; });
    }
  }
}

void run(const Job& job, Rule rule, int what, int64_t begin, int64_t end) {
  switch (job.type) {
    case ScalarType::Float:
      return run<float>(job, rule, what, begin, end);
    case ScalarType::Double:
      return run<double>(job, rule, what, begin, end);
    case ScalarType::BFloat16:
      return run<Bf16>(job, rule, what, begin, end);
    default:
      return run<Fp16>(job, rule, what, begin, end);
  }
}

// All tiles of all tensors are one range, so that many small tensors share the threads as one large one does.
void run_all(const std::vector<Job>& jobs, Rule rule, int what) {
  if (jobs.empty()) return;
  const auto range = [&](int64_t begin, int64_t end) {
    auto job = std::upper_bound(jobs.begin(), jobs.end(), begin, [](int64_t t, const Job& j) { return t < j.first_tile; }) - 1;
    for (; begin < end; ++job) {
      const int64_t stop = std::min(end, job->first_tile + tiles(job->n));
      run(*job, rule, what, begin - job->first_tile, stop - job->first_tile);
      begin = stop;
    }
  };
  const int64_t total = jobs.back().first_tile + tiles(jobs.back().n);
  if (total * kTile <= kGrain) return range(0, total);
  torch::stable::parallel_for(0, total, kGrain / kTile, range);
}

// ------------------------------------------------------------------------------------------------------- arguments and checks

using Tensors = std::vector<Tensor>;
using Masks = std::vector<std::optional<Tensor>>;

double number(const char* op, const Tensor& value, const char* what) {
  STD_TORCH_CHECK(value.numel() == 1, op, ": ", what, " must have one element, got ", value.numel());
  switch (value.scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(value.const_data_ptr());
    case ScalarType::Float:
      return *static_cast<const float*>(value.const_data_ptr());
    case ScalarType::BFloat16:
      return *static_cast<const c10::BFloat16*>(value.const_data_ptr());
    case ScalarType::Half:
      return *static_cast<const c10::Half*>(value.const_data_ptr());
    default:
      STD_TORCH_CHECK(false, op, ": ", what, " must be of a floating dtype");
  }
}

bool overflowed(const char* op, const std::optional<Tensor>& found_inf) {
  return found_inf && number(op, *found_inf, "found_inf") != 0;
}

// Where the step counters are.
std::vector<float*> counters(const char* op, const Tensors& params, const Tensors& steps) {
  check_lengths(op, params.size(), steps.size(), "steps");
  std::vector<float*> at;
  for (const Tensor& step : steps) {
    STD_TORCH_CHECK(step.scalar_type() == ScalarType::Float && step.numel() == 1, op,
                    ": steps must be float32 with one element each");
    at.push_back(static_cast<float*>(step.mutable_data_ptr()));
  }
  return at;
}

// The dimensions of a tensor from the one with the largest stride to the one with the smallest, with the strides that they have
// in logical order; nothing where memory does not hold every element once.
Walk in_memory(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<int64_t> order, logical(sizes.size());
  int64_t expected = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; d--) {
    logical[d] = expected;
    expected *= sizes[d];
    if (sizes[d] != 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  Walk walk;
  for (const int64_t d : order) {
    walk.sizes.push_back(sizes[d]);
    walk.strides.push_back(logical[d]);
    expected /= sizes[d];
    if (strides[d] != expected) return {};
  }
  return walk;
}

Walk logically(const Tensor& t) { return {{t.sizes().begin(), t.sizes().end()}, {t.strides().begin(), t.strides().end()}}; }

bool same(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// The jobs of one call. `grads` is replaced where a gradient has another dtype than its parameter.
std::vector<Job> jobs_of(const char* op, const Tensors& params, Tensors& grads, const std::vector<const Tensors*>& states,
                         const Masks& frozen) {
  check_lengths(op, params.size(), grads.size(), "gradients");
  check_lengths(op, params.size(), frozen.size(), "frozen masks (None where nothing is frozen)");
  for (const Tensors* list : states)
    if (list) check_lengths(op, params.size(), list->size(), "tensors in each list of state");
  std::vector<Job> jobs(params.size());
  int64_t next = 0;
  for (size_t i = 0; i < params.size(); i++) {
    Job& job = jobs[i];
    const Tensor& p = params[i];
    job.type = p.scalar_type();
    STD_TORCH_CHECK(job.type == ScalarType::Float || job.type == ScalarType::Double || job.type == ScalarType::BFloat16 ||
                        job.type == ScalarType::Half,
                    op, ": parameters must be float32, float64, bfloat16 or float16, got another dtype for parameter ", i);
    STD_TORCH_CHECK(p.dim() <= kMaxDims, op, ": parameters must have at most ", kMaxDims, " dimensions, got ", p.dim());
    if (grads[i].scalar_type() != job.type) grads[i] = torch::stable::to(grads[i], job.type);
    const Tensor* streams[2 + kStates] = {&p, &grads[i]};
    for (int k = 0; k < kStates; k++) streams[2 + k] = k < int(states.size()) && states[k] ? &(*states[k])[i] : nullptr;
    job.index = static_cast<int64_t>(i);
    job.n = p.numel();
    job.first_tile = next;
    next += tiles(job.n);
    const auto sizes = p.sizes(), strides = p.strides();
    bool ordered = true, alike = true;
    for (int k = 0; k < 2 + kStates; k++) {
      job.streams[k] = nullptr;
      if (streams[k] == nullptr) continue;
      const Tensor& t = *streams[k];
      STD_TORCH_CHECK(k == 0 || same(t.sizes(), sizes), op, ": gradient and state of parameter ", i, " must have its shape, ",
                      job.n, " elements, got ", t.numel());
      STD_TORCH_CHECK(k < 2 || t.scalar_type() == job.type, op, ": the state of parameter ", i, " must have its dtype");
      job.streams[k] = static_cast<char*>(k == 1 ? const_cast<void*>(t.const_data_ptr()) : t.mutable_data_ptr());
      const bool contiguous = t.is_contiguous();
      ordered = ordered && contiguous;
      alike = alike && !contiguous && same(t.strides(), strides);
    }
    job.frozen = nullptr;
    if (frozen[i]) {
      check_bits(op, *frozen[i], job.n);
      job.frozen = static_cast<const uint8_t*>(frozen[i]->const_data_ptr());
    }
    if (ordered || job.n == 0) continue;
    if (alike) job.logical = in_memory(p);
    if (job.logical.sizes.empty())
      for (const Tensor* t : streams) job.apart.push_back(t ? logically(*t) : Walk());
  }
  jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const Job& job) { return job.n == 0; }), jobs.end());
  return jobs;
}

int preparation(const std::optional<Tensor>& grad_scale, bool maximize, bool decay) {
  return (grad_scale ? kScale : 0) | (maximize ? kNegate : 0) | (decay ? kDecay : 0);
}

// ---------------------------------------------------------------------------------------------------------------- operators

void update_sgd_(const Tensors& params, Tensors grads, const Tensors& momentum_buffers, const Masks& frozen, const Tensor& lr,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double momentum,
                 double dampening, double weight_decay, bool nesterov, bool maximize, bool first_step) {
  const char* op = "update_sgd_";
  std::vector<Job> jobs = jobs_of(op, params, grads, {momentum != 0 ? &momentum_buffers : nullptr}, frozen);
  if (overflowed(op, found_inf)) return;
  Scalars<double> s = {};
  s.rate = number(op, lr, "lr");
  s.mean = momentum;
  s.new_mean = 1 - dampening;
  s.scale = grad_scale ? number(op, *grad_scale, "grad_scale") : 1;
  s.weight_decay = weight_decay;
  for (Job& job : jobs) job.scalars = s;
  Rule rule = kSgd;
  if (momentum != 0) rule = nesterov ? (first_step ? kNesterovFirst : kNesterov) : (first_step ? kSgdFirst : kSgdMomentum);
  run_all(jobs, rule, preparation(grad_scale, maximize, weight_decay != 0));
}

void update_rmsprop_(const Tensors& params, Tensors grads, const Tensors& square_avgs, const Tensors& grad_avgs,
                     const Tensors& momentum_buffers, const Tensors& steps, const Masks& frozen, const Tensor& lr,
                     const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double alpha, double eps,
                     double weight_decay, double momentum, bool centered, bool maximize) {
  const char* op = "update_rmsprop_";
  const bool with_momentum = momentum > 0;
  const std::vector<float*> counts = counters(op, params, steps);
  std::vector<Job> jobs = jobs_of(
      op, params, grads, {&square_avgs, centered ? &grad_avgs : nullptr, with_momentum ? &momentum_buffers : nullptr}, frozen);
  if (overflowed(op, found_inf)) return;
  for (float* count : counts) *count += 1;
  Scalars<double> s = {};
  s.rate = number(op, lr, "lr");
  s.eps = eps;
  s.mean = momentum;
  s.square = alpha;
  s.new_square = 1 - alpha;
  s.scale = grad_scale ? number(op, *grad_scale, "grad_scale") : 1;
  s.weight_decay = weight_decay;
  for (Job& job : jobs) job.scalars = s;
  const Rule rule = centered ? (with_momentum ? kRmsCenteredMomentum : kRmsCentered) : (with_momentum ? kRmsMomentum : kRms);
  run_all(jobs, rule, preparation(grad_scale, maximize, weight_decay != 0));
}

void update_adam_(const Tensors& params, Tensors grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                  const Tensors& max_exp_avg_sqs, const Tensors& steps, const Masks& frozen, const Tensor& lr,
                  const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double beta1, double beta2,
                  double eps, double weight_decay, bool amsgrad, bool maximize, bool decoupled) {
  const char* op = "update_adam_";
  const std::vector<float*> counts = counters(op, params, steps);
  std::vector<Job> jobs = jobs_of(op, params, grads, {&exp_avgs, &exp_avg_sqs, amsgrad ? &max_exp_avg_sqs : nullptr}, frozen);
  if (overflowed(op, found_inf)) return;
  const double rate = number(op, lr, "lr");
  Scalars<double> s = {};
  s.decay = decoupled && weight_decay != 0 ? 1 - rate * weight_decay : 1;
  s.eps = eps;
  s.new_mean = 1 - beta1;
  s.square = beta2;
  s.new_square = 1 - beta2;
  s.scale = grad_scale ? number(op, *grad_scale, "grad_scale") : 1;
  s.weight_decay = weight_decay;
  for (float* count : counts) *count += 1;
  double known = 0;
  for (Job& job : jobs) {
    const double count = *counts[job.index];
    if (count != known) {  // most often all parameters are at the same step
      s.rate = rate / (1 - std::pow(beta1, count));
      s.root = std::sqrt(1 - std::pow(beta2, count));
      known = count;
    }
    job.scalars = s;
  }
  run_all(jobs, amsgrad ? kAmsgrad : kAdam, preparation(grad_scale, maximize, weight_decay != 0 && !decoupled));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("update_sgd_", TORCH_BOX(&update_sgd_));
  m.impl("update_rmsprop_", TORCH_BOX(&update_rmsprop_));
  m.impl("update_adam_", TORCH_BOX(&update_adam_));
}
