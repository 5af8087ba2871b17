// apply, restore_, straight_through: weights through a mask, frozen ones put back, and the gradients of both.
//
// apply and straight_through are one pass over memory, 16 bytes a load. restore_ needs to know how many frozen weights lie before
// each one: one pass counts them over shares of the mask, and a second one writes, in two launches for a whole list of weights.
#include <tuple>

#include "../floats.h"
#include "device.h"

namespace {

constexpr int kThreads = 256;

// A 16-byte element where only 8 bytes are aligned.
struct Halves {
  uint64_t v[2];
};

// f(E{}) with E an unsigned type of that many bytes; elements are moved and never interpreted.
template <class F>
void with_element(const char* op, size_t bytes, const F& f) {
  switch (bytes) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    case 8:
      return f(uint64_t{});
    case 16:
      return f(Halves{});
  }
  STD_TORCH_CHECK(false, op, ": elements must have 1, 2, 4, 8 or 16 bytes, got ", bytes);
}

__device__ __forceinline__ bool open_at(const uint8_t* bits, int64_t i) { return bits[i >> 3] >> (i & 7) & 1; }

// The bits of weights Each * unit and on, lowest first, without what follows them.
template <int Each>
__device__ __forceinline__ unsigned unit_bits(const uint8_t* bits, int64_t unit) {
  if constexpr (Each == 16) return reinterpret_cast<const uint16_t*>(bits)[unit];
  if constexpr (Each == 8) return bits[unit];
  if constexpr (Each < 8) return bits[unit * Each / 8] >> (unit * Each % 8) & ((1u << Each) - 1);
}

// All ones in the bytes of a word whose elements of Size bytes are open.
template <int Size>
__device__ __forceinline__ unsigned open_bytes(unsigned bits) {
  if constexpr (Size == 1) return ((bits & 1u) | (bits & 2u) << 7 | (bits & 4u) << 14 | (bits & 8u) << 21) * 0xffu;
  if constexpr (Size == 2) return (bits & 1u ? 0xffffu : 0u) | (bits & 2u ? 0xffff0000u : 0u);
  if constexpr (Size >= 4) return bits & 1u ? 0xffffffffu : 0u;
}

// 16 bytes of elements, +0 where closed.
template <int Size>
__device__ __forceinline__ uint4 keep_open(uint4 x, unsigned bits) {
  x.x &= open_bytes<Size>(bits);
  x.y &= open_bytes<Size>(bits >> 4 / Size);
  x.z &= open_bytes<Size>(bits >> 8 / Size);
  x.w &= open_bytes<Size>(bits >> 12 / Size);
  return x;
}

// --------------------------------------------------------------------------------------------------------------- apply

constexpr int kApplyUnits = 4;  // 16-byte loads that a thread has in flight

// What is closed is not even read where a whole unit of it is: at low density that saves most of the reading.
template <class E>
__global__ void __launch_bounds__(kThreads) apply_kernel(const E* weight, const uint8_t* bits, E* out, int64_t n) {
  constexpr int kSize = sizeof(E), kEach = 16 / kSize;
  const int64_t whole = n / kEach, first = int64_t{blockIdx.x} * (kThreads * kApplyUnits) + threadIdx.x;
  unsigned open[kApplyUnits];
  uint4 w[kApplyUnits];
#pragma unroll
  for (int i = 0; i < kApplyUnits; i++) {
    const int64_t unit = first + i * kThreads;
    open[i] = unit < whole ? unit_bits<kEach>(bits, unit) : 0;
  }
#pragma unroll
  for (int i = 0; i < kApplyUnits; i++)
    w[i] = open[i] ? reinterpret_cast<const uint4*>(weight)[first + i * kThreads] : make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kApplyUnits; i++) {
    const int64_t unit = first + i * kThreads;
    if (unit < whole) reinterpret_cast<uint4*>(out)[unit] = keep_open<kSize>(w[i], open[i]);
  }
  const int64_t rest = whole * kEach + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && rest < n) out[rest] = open_at(bits, rest) ? weight[rest] : E{};
}

// The same from a weight whose memory begins anywhere.
template <class E>
__global__ void __launch_bounds__(kThreads) apply_unaligned_kernel(const E* weight, const uint8_t* bits, E* out, int64_t n) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kApplyUnits) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kApplyUnits; i++) {
    const int64_t at = first + i * kThreads;
    if (at < n) out[at] = open_at(bits, at) ? weight[at] : E{};
  }
}

dim3 apply_grid(int64_t items) { return dim3(static_cast<unsigned>(ceil_div(items, kThreads * kApplyUnits))); }

Tensor apply_cuda(const Tensor& weight_, const Tensor& bits_) {
  const Place place("apply", weight_);
  place.check("bits", bits_);
  const Tensor weight = dense(weight_), bits = aligned(bits_);
  const int64_t n = weight.numel();
  check_bits("apply", bits, n);
  Tensor out = place.empty_like(weight, dtype_code(weight));
  with_element("apply", weight.element_size(), [&](auto element) {
    using E = decltype(element);
    if (n == 0) return;
    const auto* from = static_cast<const E*>(weight.const_data_ptr());
    const auto* mask = static_cast<const uint8_t*>(bits.const_data_ptr());
    auto* to = static_cast<E*>(out.mutable_data_ptr());
    if (is_aligned(from, 16))
      place.launch(apply_kernel<E>, apply_grid(ceil_div(n * int64_t{sizeof(E)}, 16)), kThreads, 0, from, mask, to, n);
    else
      place.launch(apply_unaligned_kernel<E>, apply_grid(n), kThreads, 0, from, mask, to, n);
  });
  return out;
}

// ------------------------------------------------------------------------------------------------------------ restore_

constexpr int64_t kMostShares = 2048;  // of a weight: enough to fill the device, few enough that each block adds them all up
constexpr int kStep = kThreads;        // words of 32 bits that a block takes at a time

struct Frozen {
  void* weight;
  const uint32_t* bits;
  const void* values;
  int64_t n, count;       // weights; values
  int32_t first, shares;  // blocks before and of this weight
  int32_t words;          // of a share: a multiple of kStep
  int32_t element;        // bytes

  // Word i of the mask; nothing is open beyond the last weight.
  __device__ unsigned word(int64_t i) const {
    const int64_t left = n - i * 32;
    if (left <= 0) return 0;
    return left >= 32 ? bits[i] : bits[i] & ((1u << left) - 1);
  }
};

template <int Most>
struct FrozenTable {
  Frozen weight[Most];
  int32_t weights;

  __device__ const Frozen& of_block(int block) const {
    int low = 0, high = weights;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (weight[middle].first <= block ? low : high) = middle;
    }
    return weight[low];
  }
};

// counts[block] = frozen weights in the block's share.
template <class Table>
__global__ void __launch_bounds__(kThreads) count_frozen_kernel(const __grid_constant__ Table table, unsigned* counts) {
  __shared__ unsigned shared[kWarpSize];
  const Frozen& weight = table.of_block(blockIdx.x);
  const int64_t begin = int64_t{static_cast<int>(blockIdx.x) - weight.first} * weight.words;
  unsigned count = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < weight.words; i += kThreads) count += __popc(weight.word(begin + i));
  count = block_sum(count, shared);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// Puts the values from `values` on under 32 words of the mask, a lane's each; `rank` values come before the lane's own.
template <class E>
__device__ __forceinline__ void put_back(E* weight, const E* values, unsigned word, unsigned rank) {
  constexpr int kAtOnce = sizeof(E) > 8 ? 2 : sizeof(E) > 4 ? 4 : 8;  // words whose values a warp has in flight
  const int lane = threadIdx.x % kWarpSize;
  const unsigned before = (1u << lane) - 1;
#pragma unroll 1
  for (int first = 0; first < kWarpSize; first += kAtOnce) {
    E value[kAtOnce];
    unsigned open[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      open[j] = __shfl_sync(kAllLanes, word, first + j);
      const unsigned at = __shfl_sync(kAllLanes, rank, first + j) + __popc(open[j] & before);
      open[j] = open[j] >> lane & 1u;
      if (open[j]) value[j] = values[at];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; j++)
      if (open[j]) weight[(first + j) * kWarpSize + lane] = value[j];
  }
}

// A weight whose values are not as many as its frozen bits is left alone: nothing is read beyond them, nor half of it written.
template <class Table>
__global__ void __launch_bounds__(kThreads, 3) restore_kernel(const __grid_constant__ Table table, const unsigned* counts) {
  __shared__ long long shared[kWarpSize], found[2];
  __shared__ unsigned of_warp[2][kThreads / kWarpSize];
  const Frozen& weight = table.of_block(blockIdx.x);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int share = static_cast<int>(blockIdx.x) - weight.first;
  long long all = 0, earlier = 0;
  for (int i = threadIdx.x; i < weight.shares; i += kThreads) {
    const unsigned count = counts[weight.first + i];
    all += count;
    earlier += i < share ? count : 0;
  }
  all = block_sum(all, shared);
  earlier = block_sum(earlier, shared);
  if (threadIdx.x == 0) found[0] = all, found[1] = earlier;
  __syncthreads();
  if (found[0] != weight.count) return;
  int64_t used = found[1];
  for (int step = 0; step < weight.words / kStep; step++) {
    const int64_t first = int64_t{share} * weight.words + int64_t{step} * kStep + warp * kWarpSize;
    const unsigned word = weight.word(first + lane), ones = __popc(word);
    unsigned rank = ones;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const unsigned other = __shfl_up_sync(kAllLanes, rank, offset);
      if (lane >= offset) rank += other;
    }
    if (lane == kWarpSize - 1) of_warp[step & 1][warp] = rank;
    __syncthreads();  // one a step is enough: the next one writes the other half
    unsigned step_before = 0, step_all = 0;
#pragma unroll
    for (int i = 0; i < kThreads / kWarpSize; i++) {
      step_before += i < warp ? of_warp[step & 1][i] : 0;
      step_all += of_warp[step & 1][i];
    }
    const unsigned mine = __shfl_sync(kAllLanes, rank, kWarpSize - 1);
    rank -= ones;
    if (mine) {
      const auto put = [&](auto element) {
        using E = decltype(element);
        put_back(static_cast<E*>(weight.weight) + first * kWarpSize, static_cast<const E*>(weight.values) + used + step_before,
                 word, rank);
      };
      if (weight.element == 1) put(uint8_t{});
      if (weight.element == 2) put(uint16_t{});
      if (weight.element == 4) put(uint32_t{});
      if (weight.element == 8) put(uint64_t{});
      if (weight.element == 16) put(Halves{});
    }
    used += step_all;
  }
}

template <int Most>
void restore_some(const Place& place, const std::vector<Frozen>& weights, size_t begin, size_t end) {
  FrozenTable<Most> table{};
  int32_t blocks = 0;
  for (size_t i = begin; i < end; i++) {
    Frozen& weight = table.weight[table.weights++];
    weight = weights[i];
    weight.first = blocks;
    blocks += weight.shares;
  }
  const Tensor counts = place.scratch(int64_t{blocks} * 4);
  auto* at = static_cast<unsigned*>(counts.mutable_data_ptr());
  const dim3 grid(static_cast<unsigned>(blocks));
  place.launch(count_frozen_kernel<FrozenTable<Most>>, grid, kThreads, 0, table, at);
  place.launch(restore_kernel<FrozenTable<Most>>, grid, kThreads, 0, table, at);
}

void restore_cuda(std::vector<Tensor> weights, std::vector<Tensor> bits, std::vector<Tensor> values) {
  check_lengths("restore_", weights.size(), bits.size(), "tensors of bits");
  check_lengths("restore_", weights.size(), values.size(), "tensors of values");
  if (weights.empty()) return;
  const Place place("restore_", weights[0]);
  for (size_t t = 0; t < weights.size(); t++) {  // everything that the host can see is checked before anything is written
    place.check("weights", weights[t]), place.check("bits", bits[t]), place.check("values", values[t]);
    bits[t] = aligned(bits[t]), values[t] = dense(values[t]);
    check_bits("restore_", bits[t], weights[t].numel());
    STD_TORCH_CHECK(dtype_code(values[t]) == dtype_code(weights[t]), "restore_: values[", t,
                    "] must have the dtype of its weight");
    with_element("restore_", weights[t].element_size(), [](auto) {});
  }
  std::vector<Tensor> dense_weights;  // themselves, or a copy of one of other strides
  std::vector<Frozen> frozen;
  for (size_t t = 0; t < weights.size(); t++) {
    dense_weights.push_back(dense(weights[t]));
    const int64_t n = weights[t].numel(), words = ceil_div(n, 32);
    if (values[t].numel() == 0) continue;  // nothing is frozen
    const int64_t share = ceil_div(ceil_div(words, kMostShares), kStep) * kStep;
    frozen.push_back({dense_weights[t].mutable_data_ptr(), static_cast<const uint32_t*>(bits[t].const_data_ptr()),
                      values[t].const_data_ptr(), n, values[t].numel(), 0, static_cast<int32_t>(ceil_div(words, share)),
                      static_cast<int32_t>(share), static_cast<int32_t>(weights[t].element_size())});
  }
  // The smallest table that holds them: what a launch carries costs time.
  constexpr size_t kMost = 384;
  for (size_t begin = 0; begin < frozen.size(); begin += kMost) {
    const size_t end = std::min(frozen.size(), begin + kMost);
    if (end - begin <= 8)
      restore_some<8>(place, frozen, begin, end);
    else if (end - begin <= 64)
      restore_some<64>(place, frozen, begin, end);
    else
      restore_some<kMost>(place, frozen, begin, end);
  }
  for (size_t t = 0; t < weights.size(); t++)
    if (!weights[t].is_contiguous() && values[t].numel() > 0) torch::stable::copy_(weights[t], dense_weights[t]);
}

// ---------------------------------------------------------------------------------------------------- straight_through

struct Straight {
  const void *grad, *weight, *scores;
  ScalarType grad_dtype, weight_dtype, scores_dtype;
  const uint8_t *bits, *frozen;  // frozen may be null
  void *d_weight, *d_scores;     // null where not needed
  int64_t n;
  bool magnitude;
};

// The sign of a score for magnitude keys: 0 of 0 and of NaN.
template <class T>
__device__ __forceinline__ T sign_of(T score) {
  return static_cast<T>((score > T(0)) - (score < T(0)));
}

// grad * weight, rounded to T, then times the sign, which is exact: PyTorch's order and rounding.
template <class T>
__device__ __forceinline__ T score_grad(T grad, T weight, T score, bool magnitude) {
  using W = Wide<T>;
  const T product = static_cast<T>(static_cast<W>(grad) * static_cast<W>(weight));
  return magnitude ? static_cast<T>(static_cast<W>(product) * sign_of(static_cast<W>(score))) : product;
}

__device__ __forceinline__ bool is_live(const Straight& s, int64_t i) {
  return open_at(s.bits, i) && !(s.frozen && open_at(s.frozen, i));
}

constexpr int kStraightUnits = 2;  // 16-byte pieces of a thread

// One of them, as what is loaded and as what it is.
template <class T>
union Piece {
  uint4 raw;
  T v[16 / sizeof(T)];
  __device__ Piece() : raw{} {}
};

// All of one dtype and aligned.
template <class T>
__global__ void __launch_bounds__(kThreads) straight_through_kernel(const __grid_constant__ Straight s) {
  constexpr int kEach = 16 / sizeof(T);
  const auto *grad = static_cast<const T*>(s.grad), *weight = static_cast<const T*>(s.weight),
             *scores = static_cast<const T*>(s.scores);
  auto *d_weight = static_cast<T*>(s.d_weight), *d_scores = static_cast<T*>(s.d_scores);
  const int64_t whole = s.n / kEach, first = int64_t{blockIdx.x} * (kThreads * kStraightUnits) + threadIdx.x;
  Piece<T> g[kStraightUnits], w[kStraightUnits], k[kStraightUnits];
  unsigned live[kStraightUnits];
#pragma unroll
  for (int i = 0; i < kStraightUnits; i++) {
    const int64_t unit = first + i * kThreads;
    live[i] = 0;
    if (unit >= whole) continue;
    g[i].raw = reinterpret_cast<const uint4*>(grad)[unit];
    if (d_scores) {
      w[i].raw = reinterpret_cast<const uint4*>(weight)[unit];
      if (s.magnitude) k[i].raw = reinterpret_cast<const uint4*>(scores)[unit];
    }
    if (d_weight) {
      live[i] = unit_bits<kEach>(s.bits, unit);
      if (s.frozen) live[i] &= ~unit_bits<kEach>(s.frozen, unit);
    }
  }
#pragma unroll
  for (int i = 0; i < kStraightUnits; i++) {
    const int64_t unit = first + i * kThreads;
    if (unit >= whole) continue;
    if (d_weight) reinterpret_cast<uint4*>(d_weight)[unit] = keep_open<sizeof(T)>(g[i].raw, live[i]);
    if (d_scores) {
      Piece<T> out;
#pragma unroll
      for (int j = 0; j < kEach; j++) out.v[j] = score_grad(g[i].v[j], w[i].v[j], k[i].v[j], s.magnitude);
      reinterpret_cast<uint4*>(d_scores)[unit] = out.raw;
    }
  }
  const int64_t rest = whole * kEach + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && rest < s.n) {
    if (d_weight) d_weight[rest] = is_live(s, rest) ? grad[rest] : T(0.0f);
    if (d_scores) d_scores[rest] = score_grad(grad[rest], weight[rest], scores[rest], s.magnitude);
  }
}

template <class T>
__device__ T read_float(ScalarType dtype, const void* from, int64_t i) {
  switch (dtype) {
    case ScalarType::Double:
      return static_cast<T>(static_cast<const double*>(from)[i]);
    case ScalarType::Float:
      return static_cast<T>(static_cast<const float*>(from)[i]);
    case ScalarType::Half:
      return static_cast<T>(static_cast<float>(static_cast<const Half*>(from)[i]));
    default:
      return static_cast<T>(static_cast<float>(static_cast<const BFloat16*>(from)[i]));
  }
}
template <class T>
__device__ void write_float(ScalarType dtype, T value, void* to, int64_t i) {
  switch (dtype) {
    case ScalarType::Double:
      static_cast<double*>(to)[i] = value;
      return;
    case ScalarType::Float:
      static_cast<float*>(to)[i] = static_cast<float>(value);
      return;
    case ScalarType::Half:
      static_cast<Half*>(to)[i] = Half(static_cast<float>(value));
      return;
    default:
      static_cast<BFloat16*>(to)[i] = BFloat16(static_cast<float>(value));
  }
}
template <class T>
__device__ T round_float(ScalarType dtype, T value) {
  switch (dtype) {
    case ScalarType::Double:
      return value;
    case ScalarType::Float:
      return static_cast<T>(static_cast<float>(value));
    case ScalarType::Half:
      return static_cast<T>(static_cast<float>(Half(static_cast<float>(value))));
    default:
      return static_cast<T>(static_cast<float>(BFloat16(static_cast<float>(value))));
  }
}

// Of any dtypes, memory that begins anywhere, and computed in T, which is double where one of them is.
template <class T>
__global__ void __launch_bounds__(kThreads)
    straight_through_mixed_kernel(const __grid_constant__ Straight s, ScalarType product) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= s.n) return;
  const T grad = read_float<T>(s.grad_dtype, s.grad, i);
  if (s.d_weight) write_float(s.weight_dtype, is_live(s, i) ? grad : T(0), s.d_weight, i);
  if (!s.d_scores) return;
  T value = round_float(product, grad * read_float<T>(s.weight_dtype, s.weight, i));
  if (s.magnitude) value *= sign_of(read_float<T>(s.scores_dtype, s.scores, i));
  write_float(s.scores_dtype, value, s.d_scores, i);
}

std::tuple<Tensor, Tensor> straight_through_cuda(const Tensor& grad_, const Tensor& weight_, const Tensor& scores_,
                                                 const Tensor& bits_, std::optional<Tensor> frozen_, std::string by,
                                                 bool need_weight, bool need_scores) {
  const Place place("straight_through", grad_);
  place.check("weight", weight_), place.check("scores", scores_), place.check("bits", bits_);
  if (frozen_) place.check("frozen", *frozen_);
  const Tensor grad = dense(grad_), weight = dense(weight_), scores = dense(scores_), bits = aligned(bits_);
  const Tensor frozen = frozen_ ? aligned(*frozen_) : bits;
  const int64_t n = grad.numel();
  STD_TORCH_CHECK(weight.numel() == n && scores.numel() == n,
                  "straight_through: grad, weight and scores must have one shape, got ", n, ", ", weight.numel(), " and ",
                  scores.numel(), " elements");
  STD_TORCH_CHECK(by == "magnitude" || by == "value", "straight_through: by must be 'magnitude' or 'value', got '", by, "'");
  check_bits("straight_through", bits, n);
  check_bits("straight_through", frozen, n);
  Straight s{grad.const_data_ptr(),
             weight.const_data_ptr(),
             scores.const_data_ptr(),
             floating("straight_through", "grad", grad),
             floating("straight_through", "weight", weight),
             floating("straight_through", "scores", scores),
             static_cast<const uint8_t*>(bits.const_data_ptr()),
             frozen_ ? static_cast<const uint8_t*>(frozen.const_data_ptr()) : nullptr,
             nullptr,
             nullptr,
             n,
             by == "magnitude"};
  const int32_t weight_code = dtype_code(weight), scores_code = dtype_code(scores);
  Tensor d_weight = need_weight ? place.empty_like(weight, weight_code) : place.empty({0}, weight_code);
  Tensor d_scores = need_scores ? place.empty_like(scores, scores_code) : place.empty({0}, scores_code);
  if (n == 0 || !(need_weight || need_scores)) return {d_weight, d_scores};
  if (need_weight) s.d_weight = d_weight.mutable_data_ptr();
  if (need_scores) s.d_scores = d_scores.mutable_data_ptr();
  if (s.grad_dtype == s.weight_dtype && s.grad_dtype == s.scores_dtype && is_aligned(s.grad, 16) && is_aligned(s.weight, 16) &&
      is_aligned(s.scores, 16)) {
    with_float("straight_through", "grad", s.grad_dtype, [&](auto zero) {
      using T = decltype(zero);
      const int64_t units = ceil_div(n * int64_t{sizeof(T)}, 16);
      place.launch(straight_through_kernel<T>, dim3(static_cast<unsigned>(ceil_div(units, kThreads * kStraightUnits))), kThreads,
                   0, s);
    });
    return {d_weight, d_scores};
  }
  const bool wide =
      s.grad_dtype == ScalarType::Double || s.weight_dtype == ScalarType::Double || s.scores_dtype == ScalarType::Double;
  place.launch(wide ? straight_through_mixed_kernel<double> : straight_through_mixed_kernel<float>,
               dim3(static_cast<unsigned>(ceil_div(n, kThreads))), kThreads, 0, s, promote(s.grad_dtype, s.weight_dtype));
  return {d_weight, d_scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("apply", TORCH_BOX(&apply_cuda));
  m.impl("restore_", TORCH_BOX(&restore_cuda));
  m.impl("straight_through", TORCH_BOX(&straight_through_cuda));
}
