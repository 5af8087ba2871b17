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

// All bits of `before` where keep is -1, of `after` where it is 0. Plain bit operations: a condition would be moved in front of
// the arithmetic by the compiler, which costs more than it saves.
template <class A>
SK_INLINE A select(int8_t keep, A before, A after) {
  using Word = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  const Word mask = keep;
  return __builtin_bit_cast(A, (__builtin_bit_cast(Word, before) & mask) | (__builtin_bit_cast(Word, after) & ~mask));
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

template <class A>
using Tile = void (*)(A*, const A*, A*, A*, A*, const uint8_t*, int64_t, int, const Scalars<A>&);

// A tile in place. bits: 64 bytes, or null where nothing is frozen; partial tiles have n < 512.
#define SK_TILE(isa, attribute)                                                                                                  \
  template <Rule rule, class A>                                                                                                  \
  attribute void tile_##isa(A* w, const A* g, A* a, A* b, A* c, const uint8_t* bits, int64_t n, int what, const Scalars<A>& s) { \
    alignas(64) A buffer[kTile];                                                                                                 \
    if (what) {                                                                                                                  \
      prepare<A>(buffer, g, w, n, what, s);                                                                                      \
      g = buffer;                                                                                                                \
    }                                                                                                                            \
    if (bits == nullptr) return step<rule, false, A>(w, g, a, b, c, nullptr, n, s);                                              \
    alignas(64) int8_t keep[kTile];                                                                                              \
    spread_##isa(keep, bits);                                                                                                    \
    step<rule, true, A>(w, g, a, b, c, keep, n, s);                                                                              \
  }
SK_TILE(portable, )
SK_TILE(avx2, SK_AVX2)
SK_TILE(avx512, SK_AVX512)
#undef SK_TILE

template <class A, int... rule>
Tile<A> pick(int wanted, std::integer_sequence<int, rule...>) {
  static constexpr Tile<A> kTable[3][kRules] = {
      {tile_portable<Rule(rule), A>...}, {tile_avx2<Rule(rule), A>...}, {tile_avx512<Rule(rule), A>...}};
  return kTable[static_cast<int>(isa())][wanted];
}

// ------------------------------------------------------------------------------------------------------------ many tensors

// A tensor's data with the strides to walk it in logical order; strides is null where memory is in that order already.
struct View {
  char* data = nullptr;
  const int64_t* strides = nullptr;
};

// One parameter. Streams are the weight, the gradient and the state.
struct Job {
  int64_t n, first_tile, index;
  const uint8_t* frozen;
  ScalarType type;
  bool in_place;  // float or double with every stream in order
  const int64_t* sizes;
  int64_t dim;
  View streams[2 + kStates];
  Scalars<double> scalars;
};

// Calls f(k, p) for elements [first, first + n) in logical order, p being element first + k of the view.
template <class S, class F>
SK_INLINE void walk(const View& view, const Job& job, int64_t first, int64_t n, F f) {
  S* data = reinterpret_cast<S*>(view.data);
  if (view.strides == nullptr) {
    for (int64_t k = 0; k < n; k++) f(k, data + first + k);
    return;
  }
  int64_t at[kMaxDims], rest = first;
  for (int64_t d = job.dim - 1; d >= 0; d--) {
    at[d] = rest % job.sizes[d];
    rest /= job.sizes[d];
    data += at[d] * view.strides[d];
  }
  const int64_t last = job.dim - 1;
  for (int64_t k = 0; k < n;) {
    const int64_t run = std::min(n - k, job.sizes[last] - at[last]), stride = view.strides[last];
    for (int64_t i = 0; i < run; i++) f(k + i, data + i * stride);
    k += run;
    if (k == n) return;
    data -= at[last] * stride;
    at[last] = 0;
    for (int64_t d = last - 1; d >= 0; d--) {
      data += view.strides[d];
      if (++at[d] < job.sizes[d]) break;
      data -= at[d] * view.strides[d];
      at[d] = 0;
    }
  }
}

// A tile through a buffer; frozen elements are not written.
template <class S, class A>
void buffered(const Job& job, int64_t first, int64_t n, const uint8_t* bits, Tile<A> f, int what, const Scalars<A>& s) {
  alignas(64) A buffer[2 + kStates][kTile];
  for (int t = 0; t < 2 + kStates; t++)
    if (job.streams[t].data)
      walk<S>(job.streams[t], job, first, n, [&](int64_t k, const S* p) { buffer[t][k] = static_cast<A>(*p); });
  f(buffer[0], buffer[1], buffer[2], buffer[3], buffer[4], bits, n, what, s);
  for (int t = 0; t < 2 + kStates; t++)
    if (job.streams[t].data && t != 1)
      walk<S>(job.streams[t], job, first, n, [&](int64_t k, S* p) {
        if (bits == nullptr || !is_open(bits, k)) *p = static_cast<S>(buffer[t][k]);
      });
}

template <class S, class A>
void run(const Job& job, Rule rule, int what, int64_t begin, int64_t end) {
  const Tile<A> f = pick<A>(rule, std::make_integer_sequence<int, kRules>());
  const Scalars<double>& d = job.scalars;
  const Scalars<A> s = {A(d.rate),   A(d.decay),    A(d.eps),        A(d.root),  A(d.mean),
                        A(d.square), A(d.new_mean), A(d.new_square), A(d.scale), A(d.weight_decay)};
  for (int64_t t = begin; t < end; t++) {
    const int64_t first = t * kTile, n = std::min(kTile, job.n - first);
    const uint8_t* bits = job.frozen ? job.frozen + t * kTileBytes : nullptr;
    if (bits) {
      uint64_t words[8], all = ~uint64_t{0}, any = 0;
      std::memcpy(words, bits, sizeof(words));
      for (int i = 0; i < 8; i++) {
        const int64_t left = std::clamp<int64_t>(n - 64 * i, 0, 64);
        all &= left == 64 ? words[i] : words[i] | ~uint64_t{0} << left;
        any |= words[i];
      }
      if (all == ~uint64_t{0}) continue;
      if (any == 0) bits = nullptr;
    }
    if constexpr (std::is_same_v<S, A>) {
      if (job.in_place) {
        A* p[2 + kStates];
        for (int i = 0; i < 2 + kStates; i++)
          p[i] = reinterpret_cast<A*>(job.streams[i].data) + (job.streams[i].data ? first : 0);
        f(p[0], p[1], p[2], p[3], p[4], bits, n, what, s);
        continue;
      }
    }
    buffered<S, A>(job, first, n, bits, f, what, s);
  }
}

void run(const Job& job, Rule rule, int what, int64_t begin, int64_t end) {
  switch (job.type) {
    case ScalarType::Float:
      return run<float, float>(job, rule, what, begin, end);
    case ScalarType::Double:
      return run<double, double>(job, rule, what, begin, end);
    case ScalarType::BFloat16:
      return run<c10::BFloat16, float>(job, rule, what, begin, end);
    default:
      return run<c10::Half, float>(job, rule, what, begin, end);
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

// Whether memory holds every element once, in some order of the dimensions.
bool dense(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t order[kMaxDims], count = 0, expected = 1;
  for (int64_t d = 0; d < t.dim(); d++)
    if (sizes[d] != 1) order[count++] = d;
  std::sort(order, order + count, [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  for (int64_t i = 0; i < count; i++) {
    if (strides[order[i]] != expected) return false;
    expected *= sizes[order[i]];
  }
  return true;
}

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
    job.sizes = sizes.data();
    job.dim = static_cast<int64_t>(sizes.size());
    bool ordered = true, alike = true;
    for (int k = 0; k < 2 + kStates; k++) {
      if (streams[k] == nullptr) continue;
      const Tensor& t = *streams[k];
      STD_TORCH_CHECK(k == 0 || same(t.sizes(), sizes), op, ": gradient and state of parameter ", i, " must have its shape, ",
                      job.n, " elements, got ", t.numel());
      STD_TORCH_CHECK(k < 2 || t.scalar_type() == job.type, op, ": the state of parameter ", i, " must have its dtype");
      job.streams[k].data = static_cast<char*>(k == 1 ? const_cast<void*>(t.const_data_ptr()) : t.mutable_data_ptr());
      const bool contiguous = t.is_contiguous();
      if (!contiguous) job.streams[k].strides = t.strides().data();
      ordered = ordered && contiguous;
      alike = alike && !contiguous && same(t.strides(), strides);
    }
    job.frozen = nullptr;
    if (frozen[i]) {
      check_bits(op, *frozen[i], job.n);
      job.frozen = static_cast<const uint8_t*>(frozen[i]->const_data_ptr());
    } else if (!ordered && alike && dense(p)) {  // without bits any one order does
      ordered = true;
      for (View& view : job.streams) view.strides = nullptr;
    }
    job.in_place = ordered;
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
