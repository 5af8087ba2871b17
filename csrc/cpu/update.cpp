// Optimizer steps that leave frozen weights and their state bit-identical: SGD, RMSprop, Adam and AdamW over many tensors at
// once.
//
// A tile of 512 weights is the unit of work. New values are computed everywhere and then *selected*, so nothing behind a frozen
// bit gets out; a tile that is frozen as a whole is not touched. Tensors that share one dense order other than the logical one
// are walked in that order, with their bits brought into it; tensors whose strides differ pass through a buffer. Neither the
// order nor the threads change a bit of the result.
//
// A weight and its scores may come as a pair with one gradient, that of the effective weight. Their own gradients are then made
// tile by tile, a run of tiles of the scores before the same of the weight: theirs needs the weight as it was.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "../tensors.h"
#include "update_tile.h"

namespace {

constexpr int kMaxDims = 64;
constexpr int64_t kAhead = 64;  // tiles that scores are stepped ahead of their weight: long enough runs for the prefetcher

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
  int64_t span = 0;               // tiles that are walked for it: none for scores that go with their weight
  const uint8_t* open = nullptr;  // of a paired weight: its live bits
  const float* weight = nullptr;  // of paired scores: their weight
  bool magnitude = false;         // of paired scores: the sign of the score enters their gradient
  const Job* scores = nullptr;    // of a paired weight: its scores
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

// The gradient that a tile of a parameter steps by: of a pair made into `made` from that of the effective weight, else as it is.
template <class S>
SK_INLINE const S* own_gradient(const Job& job, const S* param, const S* grad, S* made, int64_t t, int64_t n) {
  if constexpr (std::is_same_v<S, float>) {
    if (job.weight) {
      score_grad_kernel()(grad, job.weight + t * kTile, param, made, n, job.magnitude);
      return made;
    }
    if (job.open) {
      apply_kernel(sizeof(S))(reinterpret_cast<const uint8_t*>(grad), job.open + t * kTileBytes, reinterpret_cast<uint8_t*>(made),
                              n);
      return made;
    }
  }
  return grad;
}

template <class S>
void run(const Job& job, Rule rule, int what, int64_t begin, int64_t end) {
  using A = Acc<S>;
  const Tile<S> f = pick<S>(rule, std::make_integer_sequence<int, kRules>());
  const Scalars<double>& d = job.scalars;
  const Scalars<A> s = {A(d.rate),     A(d.decay),      A(d.eps),   A(d.mean),        A(d.square),
                        A(d.new_mean), A(d.new_square), A(d.scale), A(d.weight_decay)};
  for (int64_t t = begin; t < end; t++) {
    const int64_t first = t * kTile, n = std::min(kTile, job.n - first);
    if (job.scores && (t - begin) % kAhead == 0) run<S>(*job.scores, rule, what, t, std::min(t + kAhead, end));
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
    alignas(64) S made[kTile];
    if (job.apart.empty()) {
      for (int i = 0; i < 2 + kStates; i++) p[i] = job.streams[i] ? reinterpret_cast<S*>(job.streams[i]) + first : nullptr;
      f(p[0], own_gradient(job, p[0], p[1], made, t, n), p[2], p[3], p[4], bits, n, what, s);
      continue;
    }
    alignas(64) S buffer[2 + kStates][kTile];
    for (int i = 0; i < 2 + kStates; i++) {
      p[i] = job.streams[i] ? buffer[i] : nullptr;
      const S* from = reinterpret_cast<const S*>(job.streams[i]);
      if (from) follow(job.apart[i], first, n, [&](int64_t k, int64_t at) { buffer[i][k] = from[at]; });
    }
    f(p[0], own_gradient(job, p[0], p[1], made, t, n), p[2], p[3], p[4], bits, n, what, s);
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
      const int64_t stop = std::min(end, job->first_tile + job->span);
      run(*job, rule, what, begin - job->first_tile, stop - job->first_tile);
      begin = stop;
    }
  };
  const int64_t total = jobs.back().first_tile + jobs.back().span;
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
    job.span = tiles(job.n);
    next += job.span;
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

// Makes pairs of jobs. `pairs` holds three numbers for each: the index of the scores, that of the weight, or -1 where it does not
// learn, and whether scores are compared by magnitude; `beside` the live bits of the weight, or the weight that does not learn.
void couple(const char* op, std::vector<Job>& jobs, const Tensors& params, const std::vector<int64_t>& pairs,
            const std::optional<Tensors>& beside) {
  if (pairs.empty()) return;
  STD_TORCH_CHECK(beside && pairs.size() == 3 * beside->size(), op,
                  ": expected three numbers for each tensor beside a pair, got ", pairs.size());
  std::vector<Job*> at(params.size(), nullptr);
  for (Job& job : jobs) at[job.index] = &job;
  std::vector<bool> taken(params.size(), false);
  const auto member = [&](int64_t i) {
    STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(params.size()) && !taken[i], op,
                    ": a pair must name parameters of this call, each once, got ", i);
    taken[i] = true;
    return i;
  };
  const auto plain = [&](const Tensor& t, int64_t n) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == n, op,
                    ": a weight and scores with one gradient must be contiguous, float32 and of one size");
  };
  for (size_t k = 0; k < beside->size(); k++) {
    const int64_t i = member(pairs[3 * k]);
    const Tensor &scores = params[i], &other = (*beside)[k];
    const bool learns = pairs[3 * k + 1] >= 0;
    const int64_t w = learns ? member(pairs[3 * k + 1]) : -1;
    const Tensor& weight = learns ? params[w] : other;
    plain(scores, scores.numel());
    plain(weight, scores.numel());
    if (learns) check_bits(op, other, scores.numel());
    if (scores.numel() == 0) continue;
    at[i]->weight = static_cast<const float*>(weight.const_data_ptr());
    at[i]->magnitude = pairs[3 * k + 2] != 0;
    if (!learns) continue;
    at[i]->span = 0;
    at[w]->open = static_cast<const uint8_t*>(other.const_data_ptr());
    at[w]->scores = at[i];
  }
  int64_t next = 0;
  for (Job& job : jobs) {
    job.first_tile = next;
    next += job.span;
  }
}

int preparation(const std::optional<Tensor>& grad_scale, bool maximize, bool decay) {
  return (grad_scale ? kScale : 0) | (maximize ? kNegate : 0) | (decay ? kDecay : 0);
}

// ---------------------------------------------------------------------------------------------------------------- operators

void update_sgd_(const Tensors& params, Tensors grads, const Tensors& momentum_buffers, const Masks& frozen, const Tensor& lr,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double momentum,
                 double dampening, double weight_decay, bool nesterov, bool maximize, bool first_step,
                 const std::vector<int64_t>& pairs, const std::optional<Tensors>& beside) {
  const char* op = "update_sgd_";
  std::vector<Job> jobs = jobs_of(op, params, grads, {momentum != 0 ? &momentum_buffers : nullptr}, frozen);
  couple(op, jobs, params, pairs, beside);
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
                     double weight_decay, double momentum, bool centered, bool maximize, const std::vector<int64_t>& pairs,
                     const std::optional<Tensors>& beside) {
  const char* op = "update_rmsprop_";
  const bool with_momentum = momentum > 0;
  const std::vector<float*> counts = counters(op, params, steps);
  std::vector<Job> jobs = jobs_of(
      op, params, grads, {&square_avgs, centered ? &grad_avgs : nullptr, with_momentum ? &momentum_buffers : nullptr}, frozen);
  couple(op, jobs, params, pairs, beside);
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
                  double eps, double weight_decay, bool amsgrad, bool maximize, bool decoupled, const std::vector<int64_t>& pairs,
                  const std::optional<Tensors>& beside) {
  const char* op = "update_adam_";
  const std::vector<float*> counts = counters(op, params, steps);
  std::vector<Job> jobs = jobs_of(op, params, grads, {&exp_avgs, &exp_avg_sqs, amsgrad ? &max_exp_avg_sqs : nullptr}, frozen);
  couple(op, jobs, params, pairs, beside);
  if (overflowed(op, found_inf)) return;
  const double rate = number(op, lr, "lr");
  Scalars<double> s = {};
  s.decay = decoupled && weight_decay != 0 ? 1 - rate * weight_decay : 1;
  s.new_mean = 1 - beta1;
  s.square = beta2;
  s.new_square = 1 - beta2;
  s.scale = grad_scale ? number(op, *grad_scale, "grad_scale") : 1;
  s.weight_decay = weight_decay;
  for (float* count : counts) *count += 1;
  double known = 0;
  for (Job& job : jobs) {
    const double count = *counts[job.index];
    if (count != known) {                                         // most often all parameters are at the same step
      const double root = std::sqrt(1 - std::pow(beta2, count));  // moved from under the root to both sides: one division less
      s.rate = rate * root / (1 - std::pow(beta1, count));
      s.eps = eps * root;
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
