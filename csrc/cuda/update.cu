// update_sgd_, update_rmsprop_, update_adam_: optimizer steps that leave frozen weights and their state bit-identical, over many
// tensors at once.
//
// A step is two launches. The first, of a few threads a tensor, takes the list of tensors along as its argument and lays it out
// in device memory, with the numbers that come from tensors: learning rate, bias corrections; it counts the steps up. In the
// second a block finds its chunk of a tensor in that list and passes over it once. New values are computed everywhere and then
// *selected*, so nothing behind a frozen bit gets out; what is frozen 16 bytes at a time is not even read. Where gradients
// overflowed, the list holds tensors without elements. Each dtype has a second launch of its own, and so have pairs.
//
// A weight and its scores may come as a pair with one gradient, that of the effective weight. Both are then stepped by the thread
// that read the two, so the scores see the weight as it was.
//
// Tensors that share one dense order other than the logical one are walked in that order, and their bits are looked up; tensors
// whose strides differ pass through contiguous copies.
#include "update_math.h"

namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;  // of 16 bytes, that a thread takes of each tensor
constexpr int kPackBytes = 16;
constexpr int64_t kChunkBytes = kThreads * kPacks * kPackBytes;  // of each tensor, that a block takes
constexpr int kWalkDims = 4;

// A parameter's weights and what belongs to them; null where it has none.
struct Member {
  void* weight;
  void* state[kStates];
  const uint8_t* frozen;
  float* step;
};

// Where the bits of tensors are that are walked in memory order: dimensions from the one of the largest stride to the one of the
// smallest, and how far apart their elements are in logical order.
struct Walk {
  uint32_t size[kWalkDims], stride[kWalkDims];
};

// A parameter, or a pair of scores (`own`) and weight.
struct Job {
  int64_t n;
  const void* grad;
  const uint8_t* open;  // live bits of a pair's weight that learns
  uint32_t first_chunk;
  bool packed;     // all of its tensors begin at a multiple of 16 bytes
  bool walked;     // its bits are looked up by `walk`
  bool magnitude;  // the sign of the score enters the scores' gradient
  Member own, weight;
  Walk walk;
};

// What the second launch needs of a job from tensors of the device; [1] is of a pair's weight.
struct Numbers {
  double rate[2], eps[2], decay, scale;

  template <class A>
  __device__ Scalars<A> of(int member) const {
    return {A(rate[member]), A(eps[member]), A(decay), A(scale)};
  }
};

// -------------------------------------------------------------------------------------------------------------- first launch

// A tensor of one floating number on the device; none where `at` is null.
struct Number {
  const void* at;
  ScalarType dtype;

  __device__ double value(double without) const {
    if (at == nullptr) return without;
    if (dtype == ScalarType::Double) return *static_cast<const double*>(at);
    if (dtype == ScalarType::Float) return *static_cast<const float*>(at);
    if (dtype == ScalarType::Half) return static_cast<float>(*static_cast<const Half*>(at));
    return static_cast<float>(*static_cast<const BFloat16*>(at));
  }
};

// A call, apart from its tensors.
struct Call {
  Number lr, grad_scale, found_inf;
  double eps, decoupled_decay;
  bool corrects;  // the bias of averages that began at zero
  double beta1, beta2;
  Settings<double> settings;
};

template <int Most>
struct Parcel {
  Job jobs[Most];
  int count;
};

constexpr int kPrepareThreads = 32;  // powers in double take long: many blocks of few
constexpr int kOfJob = 4;            // threads of a job: a power each, of two members and two betas

template <int Most>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ Parcel<Most> parcel, const Call call,
                                                                  Job* jobs, Numbers* numbers, uint32_t* first_chunks) {
  const int i = (blockIdx.x * kPrepareThreads + threadIdx.x) / kOfJob;
  const int member = threadIdx.x / 2 % 2, power = threadIdx.x % 2;
  const bool inside = i < parcel.count;
  float* const step = !inside ? nullptr : member == 0 ? parcel.jobs[i].own.step : parcel.jobs[i].weight.step;
  const double lr = call.lr.value(0);
  const float count = step == nullptr ? 0 : *step + 1;
  double correction = 1;
  if (step != nullptr && call.corrects) correction -= pow(power == 0 ? call.beta1 : call.beta2, static_cast<double>(count));
  const double of_square = __shfl_xor_sync(kAllLanes, correction, 1);  // as the first thread of a member needs it
  if (!inside) return;
  const bool overflowed = call.found_inf.value(0) != 0;
  if (power == 0) {
    if (step != nullptr && !overflowed) *step = count;
    // Moved from under the root of the variance to rate and eps: one division less a weight.
    const double moved = sqrt(of_square);
    numbers[i].rate[member] = lr * moved / correction;
    numbers[i].eps[member] = call.eps * moved;
  }
  if (threadIdx.x % kOfJob != 0) return;
  numbers[i].decay = call.decoupled_decay != 0 ? 1 - product(lr, call.decoupled_decay) : 1;
  numbers[i].scale = call.grad_scale.value(1);
  jobs[i] = parcel.jobs[i];
  if (overflowed) jobs[i].n = 0;
  first_chunks[i] = jobs[i].first_chunk;
}

// ------------------------------------------------------------------------------------------------------------- second launch

template <class S, int L>
struct Held {
  Pack<S, L> weight, state[kStates];
};

template <int L, class S>
__device__ __forceinline__ Pack<S, L> load(const S* at, int i) {
  return *reinterpret_cast<const Pack<S, L>*>(at + i);
}
template <int L, class S>
__device__ __forceinline__ void store(S* at, int i, const Pack<S, L>& pack) {
  *reinterpret_cast<Pack<S, L>*>(at + i) = pack;
}

// The bits of L weights from the i-th on, a multiple of L.
template <int L>
__device__ __forceinline__ unsigned bits_at(const uint8_t* bits, int i) {
  return unsigned{bits[i >> 3]} >> (i & 7) & ((1u << L) - 1);
}

// The same for the weights of a job that is walked, in memory order. A call: it is rare, and would take many registers.
template <int L>
__device__ __noinline__ unsigned bits_along(const Job* job, uint32_t first) {
  const Walk walk = job->walk;
  unsigned found = 0;
#pragma unroll 1
  for (int l = 0; l < L; l++) {
    uint32_t rest = first + l, at = 0;
#pragma unroll
    for (int d = kWalkDims - 1; d > 0; d--) {
      const uint32_t before = rest / walk.size[d];
      at += (rest - before * walk.size[d]) * walk.stride[d];
      rest = before;
    }
    at += rest * walk.stride[0];
    found |= (unsigned{job->own.frozen[at >> 3]} >> (at & 7) & 1u) << l;
  }
  return found;
}

// A chunk of a parameter under the hands of a block.
template <Rule rule, class S>
struct Stepper {
  using A = Wide<S>;
  S* weight;
  S* state[kStates];
  const uint8_t* frozen;
  Scalars<A> scalars;

  __device__ Stepper(const Member& m, const Scalars<A>& x, int64_t first)
      : weight(static_cast<S*>(m.weight) + first), frozen(m.frozen == nullptr ? nullptr : m.frozen + (first >> 3)), scalars(x) {
#pragma unroll
    for (int k = 0; k < kStates; k++) state[k] = static_cast<S*>(m.state[k]) + first;
  }

  template <int L>
  __device__ __forceinline__ void load_state(Held<S, L>& held, int i, const Settings<A>& s) const {
#pragma unroll
    for (int k = 0; k < kStates; k++)
      if (keeps<rule>(s, k)) held.state[k] = load<L>(state[k], i);
  }

  // Steps L weights by grad(l), the gradient of the l-th, and writes those that are not frozen; the others get what they had.
  template <int L, class F>
  __device__ __forceinline__ void advance(Held<S, L>& held, int i, unsigned kept, const Settings<A>& s, const F& grad) const {
#pragma unroll
    for (int l = 0; l < L; l++) {
      A value = static_cast<A>(held.weight.v[l]), now[kStates];
#pragma unroll
      for (int k = 0; k < kStates; k++) now[k] = static_cast<A>(held.state[k].v[l]);
      step<rule>(value, prepared(grad(l), value, s, scalars), now, s, scalars);
      const bool open = (kept >> l & 1u) == 0;
      held.weight.v[l] = open ? static_cast<S>(value) : held.weight.v[l];
#pragma unroll
      for (int k = 0; k < kStates; k++) held.state[k].v[l] = open ? static_cast<S>(now[k]) : held.state[k].v[l];
    }
    store<L>(weight, i, held.weight);
#pragma unroll
    for (int k = 0; k < kStates; k++)
      if (keeps<rule>(s, k)) store<L>(state[k], i, held.state[k]);
  }
};

// Which chunk of a job is the block's.
__device__ __forceinline__ uint32_t chunk_in(const Job& job) { return blockIdx.x - job.first_chunk; }

// A block's chunk of a job: elements from `first` on.
template <Rule rule, class S, bool Paired>
struct Chunk {
  using A = Wide<S>;
  static constexpr int kLanes = kPackBytes / sizeof(S), kSize = kThreads * kPacks * kLanes;
  Stepper<rule, S> own, other;
  const S* grads;
  const uint8_t* opened;
  bool magnitude;
  const Job* walked;  // null where the bits are in order

  __device__ Chunk(const Job& job, const Numbers& numbers, int64_t first)
      : own(job.own, numbers.of<A>(0), first),
        other(job.weight, numbers.of<A>(1), first),
        grads(static_cast<const S*>(job.grad) + first),
        opened(Paired && job.open != nullptr ? job.open + (first >> 3) : nullptr),
        magnitude(Paired && job.magnitude),
        walked(!Paired && job.walked ? &job : nullptr) {}

  // The block's threads take elements [begin, end) of the chunk, L at a time; both are multiples of L.
  template <int L>
  __device__ __forceinline__ void sweep(int begin, int end, const Settings<A>& s) const {
    constexpr unsigned kAll = (1u << L) - 1;
    for (int i = begin + static_cast<int>(threadIdx.x) * L; i < end;) {
      // The bits of all packs at once: what they say decides what is loaded. Those of pack u are at u * L; what is outside counts
      // as frozen.
      unsigned kept = ~0u, kept_weights = ~0u, open = 0;
#pragma unroll
      for (int u = 0; u < kPacks; u++) {
        const int at = i + u * kThreads * L;
        if (at >= end) continue;
        const unsigned bits = walked != nullptr       ? bits_along<L>(walked, chunk_in(*walked) * kSize + at)
                              : own.frozen != nullptr ? bits_at<L>(own.frozen, at)
                                                      : 0u;
        kept &= ~((kAll & ~bits) << u * L);
        if (opened == nullptr) continue;
        const unsigned of_weights = other.frozen == nullptr ? 0u : bits_at<L>(other.frozen, at);
        kept_weights &= ~((kAll & ~of_weights) << u * L);
        open |= bits_at<L>(opened, at) << u * L;
      }
#pragma unroll 1
      for (int u = 0; u < kPacks; u++, i += kThreads * L, kept >>= L, kept_weights >>= L, open >>= L) {
        const bool moves = (kept & kAll) != kAll, weights_move = Paired && (kept_weights & kAll) != kAll;
        if (!moves && !weights_move) continue;
        const Pack<S, L> grad = load<L>(grads, i);
        Held<S, L> mine{}, weights{};
        mine.weight = load<L>(own.weight, i);
        if constexpr (Paired) weights.weight = load<L>(other.weight, i);
        if (moves) own.load_state(mine, i, s);
        if (weights_move) other.load_state(weights, i, s);
        if (moves) {
          own.advance(mine, i, kept, s, [&](int l) {
            A made = static_cast<A>(grad.v[l]);
            if constexpr (Paired) {
              const A score = static_cast<A>(mine.weight.v[l]);
              made = product(made, static_cast<A>(weights.weight.v[l]));
              if (magnitude) made = product(made, A(score > 0) - A(score < 0));
            }
            return made;
          });
        }
        if constexpr (Paired) {
          if (weights_move)
            other.advance(weights, i, kept_weights, s, [&](int l) { return open >> l & 1u ? static_cast<A>(grad.v[l]) : A(0); });
        }
      }
      if constexpr (L == kLanes) break;  // that was the whole chunk
    }
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFewer = 1;  // the compiler takes more registers there
#else
constexpr int kFewer = 0;
#endif
// Blocks that are to fit on a multiprocessor: enough to keep its memory busy, few enough that nothing spills, but for 16 bytes of
// a thread where RMSprop steps pairs on sm_100.
template <Rule rule, class S, bool Paired>
constexpr int kBlocks = Paired || sizeof(S) == 8     ? 2
                        : sizeof(S) == 2             ? (rule == Rule::rmsprop ? 2 : 3 - kFewer)
                        : rule == Rule::adam_amsgrad ? 3 - kFewer
                                                     : 4 - kFewer;

template <Rule rule, class S, bool Paired>
__global__ void __launch_bounds__(kThreads, (kBlocks<rule, S, Paired>))
    step_kernel(const Job* __restrict__ jobs, const Numbers* __restrict__ numbers, const uint32_t* __restrict__ first_chunks,
                int count, const Settings<Wide<S>> settings) {
  using C = Chunk<rule, S, Paired>;
  int before = 0;  // jobs that begin at this block's chunk or before it
  for (int at = 0; at < count; at += kThreads) {
    const int i = at + static_cast<int>(threadIdx.x);
    before += __syncthreads_count(i < count && first_chunks[i] <= blockIdx.x);
  }
  const Job& job = jobs[before - 1];
  const int64_t first = int64_t{chunk_in(job)} * C::kSize;
  if (first >= job.n) return;  // gradients overflowed
  const C chunk(job, numbers[before - 1], first);
  const int end = static_cast<int>(min(job.n - first, int64_t{C::kSize}));
  const int packed = job.packed ? end / C::kLanes * C::kLanes : 0;
  chunk.template sweep<C::kLanes>(0, packed, settings);
  chunk.template sweep<1>(packed, end, settings);
}

// ----------------------------------------------------------------------------------------------------- arguments and checks

using Tensors = std::vector<Tensor>;
using Masks = std::vector<std::optional<Tensor>>;
using IntArray = torch::headeronly::IntHeaderOnlyArrayRef;

bool same(IntArray a, IntArray b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()); }

Number number(const Place& place, const std::optional<Tensor>& value, const char* what) {
  if (!value) return {nullptr, ScalarType::Double};
  place.check(what, *value);
  STD_TORCH_CHECK(value->numel() == 1, place.op(), ": ", what, " must have one element, got ", value->numel());
  const ScalarType dtype = value->scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      place.op(), ": ", what, " must be of a floating dtype");
  return {value->const_data_ptr(), dtype};
}

// The order of a tensor's elements in memory, with as few dimensions as tell it; nothing where memory does not hold every element
// once, and no dimensions but a true `dense` where they are too many.
struct Order {
  bool dense, fits;
  Walk walk;
};

Order order_of(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<int64_t> logical(sizes.size()), dims;
  int64_t expected = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; d--) {
    logical[d] = expected;
    expected *= sizes[d];
    if (sizes[d] != 1) dims.push_back(d);
  }
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  std::vector<int64_t> size, stride;
  for (const int64_t d : dims) {
    expected /= sizes[d];
    if (strides[d] != expected) return {};
    if (!stride.empty() && stride.back() == logical[d] * sizes[d]) {
      size.back() *= sizes[d];
      stride.back() = logical[d];
    } else {
      size.push_back(sizes[d]);
      stride.push_back(logical[d]);
    }
  }
  Order order{true, size.size() <= kWalkDims && t.numel() <= INT32_MAX, {}};
  for (int d = 0; d < kWalkDims && order.fits; d++) {
    const int64_t from = d - (kWalkDims - static_cast<int64_t>(size.size()));
    order.walk.size[d] = from < 0 ? 1 : static_cast<uint32_t>(size[from]);
    order.walk.stride[d] = from < 0 ? 0 : static_cast<uint32_t>(stride[from]);
  }
  return order;
}

// The jobs of one call, checked; lives as long as the op, because it may hold copies.
class Work {
 public:
  Work(const Place& place, const Tensors& params, const Tensors& grads, const std::vector<const Tensors*>& states,
       const Tensors* steps, const Masks& frozen)
      : place_(place), params_(params) {
    const char* op = place.op();
    if (steps) {
      check_lengths(op, params.size(), steps->size(), "steps");
      for (const Tensor& step : *steps) {
        place.check("every step", step);
        STD_TORCH_CHECK(step.scalar_type() == ScalarType::Float && step.numel() == 1, op,
                        ": steps must be float32 with one element each");
      }
    }
    check_lengths(op, params.size(), grads.size(), "gradients");
    check_lengths(op, params.size(), frozen.size(), "frozen masks (None where nothing is frozen)");
    for (const Tensors* list : states)
      if (list) check_lengths(op, params.size(), list->size(), "tensors in each list of state");
    for (size_t i = 0; i < params.size(); i++) {
      Tensor streams[2 + kStates] = {params[i], grads[i]};
      bool there[2 + kStates] = {true, true};
      for (size_t k = 0; k < states.size(); k++) {
        there[2 + k] = states[k] != nullptr;
        if (there[2 + k]) streams[2 + k] = (*states[k])[i];
      }
      add(i, streams, there, frozen[i]);
      if (steps) items_.back().job.own.step = static_cast<float*>((*steps)[i].mutable_data_ptr());
    }
  }

  // Makes pairs of jobs. `pairs` holds three numbers for each: the index of the scores, that of the weight, or -1 where it does
  // not learn, and whether scores are compared by magnitude; `beside` the live bits of the weight, or the weight that does not
  // learn.
  void couple(const std::vector<int64_t>& pairs, const std::optional<Tensors>& beside) {
    if (pairs.empty()) return;
    const char* op = place_.op();
    STD_TORCH_CHECK(beside && pairs.size() == 3 * beside->size(), op,
                    ": expected three numbers for each tensor beside a pair, got ", pairs.size());
    std::vector<bool> taken(params_.size(), false);
    const auto member = [&](int64_t i) {
      STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(params_.size()) && !taken[i], op,
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
      const Tensor& other = (*beside)[k];
      place_.check("a tensor beside a pair", other);
      const bool learns = pairs[3 * k + 1] >= 0;
      const int64_t w = learns ? member(pairs[3 * k + 1]) : -1;
      plain(params_[i], params_[i].numel());
      plain(learns ? params_[w] : other, params_[i].numel());
      if (learns) check_bits(op, other, params_[i].numel());
      if (params_[i].numel() == 0) continue;
      Item& item = items_[i];
      item.kind = kPaired;
      item.job.magnitude = pairs[3 * k + 2] != 0;
      if (learns) {
        Item& of_weight = items_[w];
        item.job.open = static_cast<const uint8_t*>(other.const_data_ptr());
        item.job.weight = of_weight.job.own;
        item.job.packed = item.job.packed && of_weight.job.packed;
        of_weight.kind = kWithScores;
      } else {
        item.job.weight.weight = const_cast<void*>(other.const_data_ptr());  // is read alone
        item.job.packed = item.job.packed && is_aligned(other.const_data_ptr(), kPackBytes);
      }
    }
  }

  template <Rule rule>
  void run(const Call& call) {
    items_.erase(std::remove_if(items_.begin(), items_.end(), [](const Item& item) { return item.kind == kWithScores; }),
                 items_.end());
    if (items_.empty()) return;
    std::stable_sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) { return a.kind < b.kind; });
    const int count = static_cast<int>(items_.size());
    const Tensor memory = place_.scratch(count * static_cast<int64_t>(sizeof(Job) + sizeof(Numbers) + sizeof(uint32_t)));
    auto* jobs = static_cast<Job*>(memory.mutable_data_ptr());
    auto* numbers = reinterpret_cast<Numbers*>(jobs + count);
    auto* first_chunks = reinterpret_cast<uint32_t*>(numbers + count);
    uint32_t chunks[kKinds] = {};
    for (Item& item : items_) {
      item.job.first_chunk = chunks[item.kind];
      chunks[item.kind] += static_cast<uint32_t>(ceil_div(item.job.n * item.element_size, kChunkBytes));
    }
    for (int first = 0; first < count;) {
      const int left = count - first;
      if (left <= 6)
        first += prepare<6>(call, first, jobs, numbers, first_chunks);
      else if (left <= 24)
        first += prepare<24>(call, first, jobs, numbers, first_chunks);
      else
        first += prepare<160>(call, first, jobs, numbers, first_chunks);  // 25 KB of the 32 that a launch may carry
    }
    for (int first = 0, last; first < count; first = last) {
      const Kind kind = items_[first].kind;
      for (last = first; last < count && items_[last].kind == kind; last++) {
      }
      const auto launch = [&](auto type, auto paired) {
        using S = decltype(type);
        place_.launch(step_kernel<rule, S, decltype(paired)::value>, dim3(chunks[kind]), dim3(kThreads), 0, jobs + first,
                      numbers + first, first_chunks + first, last - first, settings<Wide<S>>(call.settings));
      };
      switch (kind) {
        case kPaired:
          launch(float{}, std::true_type{});
          break;
        case kFloat:
          launch(float{}, std::false_type{});
          break;
        case kDouble:
          launch(double{}, std::false_type{});
          break;
        case kBFloat16:
          launch(BFloat16{}, std::false_type{});
          break;
        default:
          launch(Half{}, std::false_type{});
      }
    }
    for (auto& [outer, inner] : copies_) torch::stable::copy_(outer, inner);
  }

 private:
  // What is launched together.
  enum Kind { kPaired, kFloat, kDouble, kBFloat16, kHalf, kWithScores, kKinds };

  struct Item {
    Kind kind;
    int64_t element_size;
    Job job;
  };

  void add(size_t index, Tensor (&streams)[2 + kStates], const bool (&there)[2 + kStates], const std::optional<Tensor>& frozen) {
    const char* op = place_.op();
    const Tensor p = streams[0];
    place_.check("every parameter", p);
    const ScalarType type = p.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
        ": parameters must be float32, float64, bfloat16 or float16, got another dtype for parameter ", index);
    const int64_t n = p.numel();
    bool ordered = true, alike = true;
    for (int k = 0; k < 2 + kStates; k++) {
      if (!there[k]) continue;
      Tensor& t = streams[k];
      place_.check("every gradient and state", t);
      if (k == 1 && t.scalar_type() != type) t = torch::stable::to(t, type);
      STD_TORCH_CHECK(same(t.sizes(), p.sizes()), op, ": gradient and state of parameter ", index, " must have its shape, ", n,
                      " elements, got ", t.numel());
      STD_TORCH_CHECK(t.scalar_type() == type, op, ": the state of parameter ", index, " must have its dtype");
      const bool contiguous = t.is_contiguous();
      ordered = ordered && contiguous;
      alike = alike && !contiguous && same(t.strides(), p.strides());
    }
    Item item{};
    item.kind = type == ScalarType::Float      ? kFloat
                : type == ScalarType::Double   ? kDouble
                : type == ScalarType::BFloat16 ? kBFloat16
                                               : kHalf;
    item.element_size = static_cast<int64_t>(p.element_size());
    Job& job = item.job;
    job.n = n;
    if (frozen) {
      place_.check("every frozen mask", *frozen);
      check_bits(op, *frozen, n);
      job.own.frozen = static_cast<const uint8_t*>(frozen->const_data_ptr());
    }
    if (!ordered && n > 0) {
      const Order order = alike ? order_of(p) : Order{};
      job.walked = order.dense && order.fits && frozen;
      if (job.walked) job.walk = order.walk;
      if (!job.walked && !(order.dense && !frozen)) {
        for (int k = 0; k < 2 + kStates; k++) {
          if (!there[k] || streams[k].is_contiguous()) continue;
          const Tensor inner = torch::stable::contiguous(streams[k]);
          if (k != 1) copies_.emplace_back(streams[k], inner);
          streams[k] = inner;
        }
      }
    }
    job.packed = true;
    for (int k = 0; k < 2 + kStates; k++)
      if (there[k]) job.packed = job.packed && is_aligned(streams[k].const_data_ptr(), kPackBytes);
    job.own.weight = streams[0].mutable_data_ptr();
    job.grad = streams[1].const_data_ptr();
    for (int k = 0; k < kStates; k++)
      if (there[2 + k]) job.own.state[k] = streams[2 + k].mutable_data_ptr();
    made_.push_back(streams[1]);
    items_.push_back(item);
  }

  template <int Most>
  int prepare(const Call& call, int first, Job* jobs, Numbers* numbers, uint32_t* first_chunks) const {
    Parcel<Most> parcel;
    parcel.count = std::min<int>(Most, static_cast<int>(items_.size()) - first);
    for (int i = 0; i < parcel.count; i++) parcel.jobs[i] = items_[first + i].job;
    place_.launch(prepare_kernel<Most>, dim3(static_cast<unsigned>(ceil_div(parcel.count * kOfJob, kPrepareThreads))),
                  dim3(kPrepareThreads), 0, parcel, call, jobs + first, numbers + first, first_chunks + first);
    return parcel.count;
  }

  template <class A>
  static Settings<A> settings(const Settings<double>& s) {
    return {A(s.mean),  A(s.square), A(s.new_mean), A(s.new_square), A(s.weight_decay), s.scaled,
            s.maximize, s.decays,    s.first,       s.nesterov,      s.centered,        s.momentum};
  }

  const Place& place_;
  const Tensors& params_;
  std::vector<Item> items_;                        // of the parameters in their order, until `run`
  std::vector<std::pair<Tensor, Tensor>> copies_;  // strided tensors that are written, and their contiguous stand-ins
  Tensors made_;                                   // gradients: kept, as they may be copies
};

// What all rules are told alike.
Call call_of(const Place& place, const Tensor& lr, const std::optional<Tensor>& grad_scale,
             const std::optional<Tensor>& found_inf, double weight_decay, bool maximize) {
  Call call{};
  call.lr = number(place, lr, "lr");
  call.grad_scale = number(place, grad_scale, "grad_scale");
  call.found_inf = number(place, found_inf, "found_inf");
  call.settings.weight_decay = weight_decay;
  call.settings.decays = weight_decay != 0;
  call.settings.scaled = grad_scale.has_value();
  call.settings.maximize = maximize;
  return call;
}

const Tensor& first_of(const Tensors& params, const Tensor& lr) { return params.empty() ? lr : params[0]; }

// ---------------------------------------------------------------------------------------------------------------- operators

void update_sgd_cuda(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers, const Masks& frozen,
                     const Tensor& lr, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                     double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool first_step,
                     const std::vector<int64_t>& pairs, const std::optional<Tensors>& beside) {
  const Place place("update_sgd_", first_of(params, lr));
  Work work(place, params, grads, {momentum != 0 ? &momentum_buffers : nullptr}, nullptr, frozen);
  work.couple(pairs, beside);
  Call call = call_of(place, lr, grad_scale, found_inf, weight_decay, maximize);
  call.settings.mean = momentum;
  call.settings.new_mean = 1 - dampening;
  call.settings.first = first_step;
  call.settings.nesterov = nesterov;
  momentum != 0 ? work.run<Rule::sgd_momentum>(call) : work.run<Rule::sgd>(call);
}

void update_rmsprop_cuda(const Tensors& params, const Tensors& grads, const Tensors& square_avgs, const Tensors& grad_avgs,
                         const Tensors& momentum_buffers, const Tensors& steps, const Masks& frozen, const Tensor& lr,
                         const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double alpha,
                         double eps, double weight_decay, double momentum, bool centered, bool maximize,
                         const std::vector<int64_t>& pairs, const std::optional<Tensors>& beside) {
  const Place place("update_rmsprop_", first_of(params, lr));
  Work work(place, params, grads, {&square_avgs, centered ? &grad_avgs : nullptr, momentum > 0 ? &momentum_buffers : nullptr},
            &steps, frozen);
  work.couple(pairs, beside);
  Call call = call_of(place, lr, grad_scale, found_inf, weight_decay, maximize);
  call.eps = eps;
  call.settings.mean = momentum;
  call.settings.square = alpha;
  call.settings.new_square = 1 - alpha;
  call.settings.momentum = momentum > 0;
  call.settings.centered = centered;
  work.run<Rule::rmsprop>(call);
}

void update_adam_cuda(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                      const Tensors& max_exp_avg_sqs, const Tensors& steps, const Masks& frozen, const Tensor& lr,
                      const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double beta1, double beta2,
                      double eps, double weight_decay, bool amsgrad, bool maximize, bool decoupled,
                      const std::vector<int64_t>& pairs, const std::optional<Tensors>& beside) {
  const Place place("update_adam_", first_of(params, lr));
  Work work(place, params, grads, {&exp_avgs, &exp_avg_sqs, amsgrad ? &max_exp_avg_sqs : nullptr}, &steps, frozen);
  work.couple(pairs, beside);
  Call call = call_of(place, lr, grad_scale, found_inf, decoupled ? 0 : weight_decay, maximize);
  call.eps = eps;
  call.decoupled_decay = decoupled ? weight_decay : 0;
  call.corrects = true;
  call.beta1 = beta1;
  call.beta2 = beta2;
  call.settings.square = beta2;
  call.settings.new_mean = 1 - beta1;
  call.settings.new_square = 1 - beta2;
  amsgrad ? work.run<Rule::adam_amsgrad>(call) : work.run<Rule::adam>(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("update_sgd_", TORCH_BOX(&update_sgd_cuda));
  m.impl("update_rmsprop_", TORCH_BOX(&update_rmsprop_cuda));
  m.impl("update_adam_", TORCH_BOX(&update_adam_cuda));
}
