// masked_linear and its gradients in float32: y = x (W where open)^T, dx = G_y (W where open), and G = G_y^T x with the
// straight-through rule behind it. Other dtypes go through apply and PyTorch's own product.
//
// The forward product multiplies rows by rows, both contiguous: no packing, and a mask piece costs a load beside the FMAs of
// several rows. The gradients are sums of outer products over packed panels of 32 columns; the mask is applied while W is packed.
// A sum over more than kDepth terms is made of partial sums of kDepth, in order. The threads divide outputs, never sums.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "lanes.h"

namespace {

constexpr int kRows = 12;              // rows of an outer product
constexpr int kPanel = 32;             // columns of one
constexpr int kAhead = 4;              // rows that are asked for before they are packed
constexpr int kWide = 4 * kPanel;      // columns of a weight that are packed at once
constexpr int64_t kDepth = 128;        // terms of a partial sum: a panel of them is half of a first-level cache
constexpr int64_t kDirect = kRows;     // rows of a gradient up to which an unmasked weight is used where it lies
constexpr int64_t kFew = 12;           // rows of x up to which masking in the registers costs less than masking once
constexpr int64_t kGroup = 2 * kRows;  // rows of a weight gradient that end on a whole byte of bits
constexpr int64_t kPast = 1 << 18;     // weights from which their gradients are written past the caches
constexpr int64_t kWork = 1 << 18;     // multiply-adds below which a thread costs more than it saves

// Packed bits that may be read from any bit on, never beyond their end; begin is null where everything is open.
struct Bits {
  const uint8_t *begin = nullptr, *end = nullptr;
  // At least 32 bits from bit i on; what lies beyond the end is 0.
  inline __attribute__((always_inline)) uint64_t at(int64_t i) const {
    const uint8_t* p = begin + (i >> 3);
    return (__builtin_expect(p + 8 <= end, 1) ? load_word(p) : last(p)) >> (i & 7);
  }
  // All 64 bits from bit i on, which must be there.
  inline __attribute__((always_inline)) uint64_t word(int64_t i) const {
    const uint8_t* p = begin + (i >> 3);
    const int shift = i & 7;
    return shift ? load_word(p) >> shift | uint64_t{p[8]} << (64 - shift) : load_word(p);
  }
  uint64_t __attribute__((noinline)) last(const uint8_t* p) const {
    uint64_t word = 0;
    std::memcpy(&word, p, end - p);
    return word;
  }
};

// y = x w^T, all contiguous.
struct Product {
  const float *x, *w, *bias;
  Bits bits;
  float* y;
  int64_t rows, in, out;
};

// Where the gradients of weight and scores go, and what they are made from; d_weight is null where it is not wanted.
struct Gradients {
  const float *weight, *scores;
  float *d_weight, *d_scores;
  bool magnitude;
};

using OuterTile = void (*)(const float* a, const float* panel, int64_t pitch, int64_t depth, int rows, float* out,
                           int64_t out_row, int64_t lanes, bool more);

namespace portable {
#define SK_LEVEL 0
#define SK_TARGET
#include "masked_linear_tile.h"
#undef SK_LEVEL
#undef SK_TARGET
}  // namespace portable
namespace avx2 {
#define SK_LEVEL 1
#define SK_TARGET SK_AVX2
#include "masked_linear_tile.h"
#undef SK_LEVEL
#undef SK_TARGET
}  // namespace avx2
namespace avx512 {
#define SK_LEVEL 2
#define SK_TARGET SK_AVX512
#include "masked_linear_tile.h"
#undef SK_LEVEL
#undef SK_TARGET
}  // namespace avx512

// Float32, 64-byte aligned, not initialised.
struct Buffer {
  explicit Buffer(int64_t n) : p(static_cast<float*>(std::aligned_alloc(64, (n * 4 + 63) / 64 * 64))) {}
  ~Buffer() { std::free(p); }
  Buffer(const Buffer&) = delete;
  float* p;
};

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* floats_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Bits bits_of(const char* op, const std::optional<Tensor>& bits, int64_t n) {
  if (!bits) return {};
  check_bits(op, *bits, n);
  const auto* begin = static_cast<const uint8_t*>(bits->const_data_ptr());
  return {begin, begin + mask_bytes(n)};
}

// The product of the sizes before the last one.
int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); d++) rows *= t.size(d);
  return rows;
}

// Columns [0, columns) of `depth` rows as tiles [tile][depth][kRows], for the left side of outer products; the step between two
// terms of a sum and that between two rows of the result say which way round `from` lies.
void pack_tiles(const float* from, int64_t term, int64_t row, int64_t depth, int64_t rows, float* to) {
  for (int64_t first = 0; first < rows; first += kRows, to += depth * kRows) {
    const int64_t n = std::min<int64_t>(kRows, rows - first);
    for (int64_t k = 0; k < depth; k++)
      for (int64_t r = 0; r < n; r++) to[k * kRows + r] = from[k * term + (first + r) * row];
  }
}

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ------------------------------------------------------------------------------------------- other dtypes: PyTorch's own product

Tensor open_weight(const Tensor& weight, const std::optional<Tensor>& bits) {
  if (!bits) return weight;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(weight), torch::stable::detail::from(*bits)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("subnet_kernels::apply", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor product_of(const Tensor& grad, const Tensor& x) {
  const int64_t rows = rows_of(grad), shapes[2][2] = {{rows, grad.size(grad.dim() - 1)}, {rows, x.size(x.dim() - 1)}};
  return torch::stable::matmul(torch::stable::transpose(torch::stable::reshape(grad, {shapes[0], 2}), 0, 1),
                               torch::stable::reshape(x, {shapes[1], 2}));
}

std::tuple<Tensor, Tensor> straight_through(const Tensor& sums, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& scores, const std::optional<Tensor>& bits,
                                            const std::optional<Tensor>& frozen, const std::string& by, bool need_weight) {
  const Tensor none = new_vector(0, dtype_code(sums));
  if (!bits) return {need_weight ? sums : none, none};
  using torch::stable::detail::from;
  std::array<StableIValue, 8> stack{
      from(sums), from(weight.value_or(sums)), from(scores.value_or(sums)), from(*bits), from(frozen),
      from(by),   from(need_weight),           from(scores.has_value())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("subnet_kernels::straight_through", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

bool all_float(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return t->scalar_type() == ScalarType::Float; });
}

// ------------------------------------------------------------------------------------------------------------------- operators

Tensor masked_linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bits_,
                     const std::optional<Tensor>& bias_) {
  const char* op = "masked_linear";
  if (!all_float({&x_, &weight_}) || (bias_ && !all_float({&*bias_}))) return linear(x_, open_weight(weight_, bits_), bias_);
  const Tensor x = dense(x_), weight = dense(weight_);
  const std::optional<Tensor> bits = bits_ ? std::optional(dense(*bits_)) : std::nullopt;
  const std::optional<Tensor> bias = bias_ ? std::optional(dense(*bias_)) : std::nullopt;
  STD_TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), op,
                  ": x must be (..., I) and weight (O, I)");
  STD_TORCH_CHECK(!bias || bias->numel() == weight.size(0), op, ": bias must have one element for each output");
  const int64_t out = weight.size(0), in = weight.size(1), rows = rows_of(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out;
  Tensor y = new_dense(sizes.data(), static_cast<int64_t>(sizes.size()), dtype_code(x));
  const Product p = {
      floats(x), floats(weight), bias ? floats(*bias) : nullptr, bits_of(op, bits, out * in), floats_of(y), rows, in, out};
  const bool once = p.bits.begin && rows > kFew;
  const auto f = p.bits.begin && !once ? for_isa(portable::forward<true>, avx2::forward<true>, avx512::forward<true>)
                                       : for_isa(portable::forward<false>, avx2::forward<false>, avx512::forward<false>);
  parallel(out, std::max<int64_t>(4, kWork / std::max<int64_t>(1, rows * in)), [&](int64_t begin, int64_t end) {
    const Buffer buffer(once ? 4 * in : 0);
    f(p, begin, end, once ? buffer.p : nullptr);
  });
  return y;
}

Tensor masked_linear_grad_input(const Tensor& grad_, const Tensor& weight_, const std::optional<Tensor>& bits_) {
  const char* op = "masked_linear_grad_input";
  if (!all_float({&grad_, &weight_})) return torch::stable::matmul(grad_, open_weight(weight_, bits_));
  const Tensor grad = dense(grad_), weight = dense(weight_);
  const std::optional<Tensor> bits = bits_ ? std::optional(dense(*bits_)) : std::nullopt;
  STD_TORCH_CHECK(weight.dim() == 2 && grad.dim() >= 1 && grad.size(grad.dim() - 1) == weight.size(0), op,
                  ": grad_y must be (..., O) and weight (O, I)");
  const int64_t out = weight.size(0), in = weight.size(1), rows = rows_of(grad);
  std::vector<int64_t> sizes(grad.sizes().begin(), grad.sizes().end());
  sizes.back() = in;
  Tensor d_x = new_dense(sizes.data(), static_cast<int64_t>(sizes.size()), dtype_code(grad));
  const float *g = floats(grad), *w = floats(weight);
  const Bits open = bits_of(op, bits, out * in);
  float* to = floats_of(d_x);
  if (out == 0) std::fill(to, to + rows * in, 0.0f);
  if (out == 0 || rows == 0 || in == 0) return d_x;
  const int64_t all_rows = padded(rows, kRows);
  const Buffer tiles(all_rows * out);
  for (int64_t k = 0; k < out; k += kDepth) pack_tiles(g + k, 1, out, std::min(kDepth, out - k), rows, tiles.p + k * all_rows);
  const auto pack_panels = for_isa(portable::pack_panels, avx2::pack_panels, avx512::pack_panels);
  const auto outer = for_isa<std::remove_pointer_t<OuterTile>>(portable::outer_tile, avx2::outer_tile, avx512::outer_tile);
  parallel((in + kWide - 1) / kWide, std::max<int64_t>(1, kWork / (rows * out * kWide)), [&](int64_t begin, int64_t end) {
    const Buffer panels(kDepth * kWide);
    for (int64_t wide = begin * kWide; wide < std::min(in, end * kWide); wide += kWide) {
      const int64_t stop = std::min(in, wide + kWide);
      for (int64_t k = 0; k < out; k += kDepth) {
        const int64_t depth = std::min(kDepth, out - k);
        const bool direct = !open.begin && rows <= kDirect && (stop - wide) % kPanel == 0;
        if (!direct) pack_panels(w + k * in + wide, in, open, k * in + wide, depth, stop - wide, panels.p);
        for (int64_t l = wide; l < stop; l += kPanel)
          for (int64_t b = 0; b < rows; b += kRows)
            outer(tiles.p + k * all_rows + b * depth, direct ? w + k * in + l : panels.p + (l - wide) * depth,
                  direct ? in : kPanel, depth, static_cast<int>(std::min<int64_t>(kRows, rows - b)), to + b * in + l, in,
                  std::min<int64_t>(kPanel, stop - l), k > 0);
      }
    }
  });
  return d_x;
}

// G = G_y^T x. With bits: dW = G where open and not frozen; with scores: dS from G, whatever the mask is.
std::tuple<Tensor, Tensor> masked_linear_grad_weight(const Tensor& grad_, const Tensor& x_, const std::optional<Tensor>& weight_,
                                                     const std::optional<Tensor>& scores_, const std::optional<Tensor>& bits_,
                                                     const std::optional<Tensor>& frozen_, std::string by, bool need_weight) {
  const char* op = "masked_linear_grad_weight";
  STD_TORCH_CHECK(by == "magnitude" || by == "value", op, ": by must be 'magnitude' or 'value', got '", by, "'");
  STD_TORCH_CHECK(!scores_ || (weight_ && bits_), op, ": scores need their weight and bits");
  STD_TORCH_CHECK(!frozen_ || bits_, op, ": frozen bits need the mask's");
  if (!all_float({&grad_, &x_}) || (weight_ && !all_float({&*weight_})) || (scores_ && !all_float({&*scores_})))
    return straight_through(product_of(grad_, x_), weight_, scores_, bits_, frozen_, by, need_weight);
  const auto of = [](const std::optional<Tensor>& t) { return t ? std::optional(dense(*t)) : std::nullopt; };
  const Tensor grad = dense(grad_), x = dense(x_);
  const auto weight = of(weight_), scores = of(scores_), bits = of(bits_), frozen = of(frozen_);
  const int64_t rows = rows_of(grad), out = grad.size(grad.dim() - 1), in = x.size(x.dim() - 1), n = out * in;
  STD_TORCH_CHECK(rows_of(x) == rows, op, ": grad_y and x must have the same rows, got ", rows, " and ", rows_of(x));
  for (const auto* t : {&weight, &scores})
    STD_TORCH_CHECK(!*t || (*t)->numel() == n, op, ": weight and scores must be (O, I), ", n, " elements");
  const Bits open = bits_of(op, bits, n), shut = bits_of(op, frozen, n);
  const int64_t shape[] = {out, in}, none[] = {0};
  Tensor d_weight = need_weight ? new_dense(shape, 2, dtype_code(grad)) : new_dense(none, 1, dtype_code(grad));
  Tensor d_scores = scores ? new_dense(shape, 2, dtype_code(grad)) : new_dense(none, 1, dtype_code(grad));
  if (n == 0 || !(need_weight || scores)) return {d_weight, d_scores};
  const float *g = floats(grad), *from = floats(x);
  float *to_weight = need_weight ? floats_of(d_weight) : nullptr, *to_scores = scores ? floats_of(d_scores) : nullptr;
  const int64_t panels = padded(in, kPanel) / kPanel, all_out = padded(out, kRows);
  const Buffer tiles(all_out * rows), packed(panels * kPanel * rows);
  const auto pack_panels = for_isa(portable::pack_panels, avx2::pack_panels, avx512::pack_panels);
  for (int64_t k = 0; k < rows; k += kDepth) {
    const int64_t depth = std::min(kDepth, rows - k);
    pack_tiles(g + k * out, out, 1, depth, out, tiles.p + k * all_out);
    pack_panels(from + k * in, in, {}, 0, depth, in, packed.p + k * panels * kPanel);
  }
  const auto outer = for_isa<std::remove_pointer_t<OuterTile>>(portable::outer_tile, avx2::outer_tile, avx512::outer_tile);
  const auto straight_through =
      for_isa(portable::straight_through_rows, avx2::straight_through_rows, avx512::straight_through_rows);
  const ApplyKernel apply = apply_kernel(4);
  const Gradients to = {weight ? floats(*weight) : nullptr, scores ? floats(*scores) : nullptr, to_weight, to_scores,
                        by == "magnitude"};
  const bool past = n >= kPast && (kGroup * in) % kLanes == 0;
  parallel((out + kGroup - 1) / kGroup, std::max<int64_t>(1, kWork / (std::max<int64_t>(1, rows) * in * kGroup)),
           [&](int64_t begin, int64_t end) {
             const Buffer own(scores ? kGroup * in + kLanes : 0), live(bits ? kGroup * in / 32 + 16 : 0);
             for (int64_t o = begin * kGroup; o < std::min(out, end * kGroup); o += kGroup) {
               const int64_t group = std::min(kGroup, out - o), first = o * in, count = group * in;
               float* sums = scores ? own.p : to_weight + first;
               if (rows == 0) std::fill(sums, sums + count, 0.0f);
               for (int64_t k = 0; k < rows; k += kDepth) {
                 const int64_t depth = std::min(kDepth, rows - k);
                 for (int64_t r = 0; r < group; r += kRows)
                   for (int64_t l = 0; l < panels; l++)
                     outer(tiles.p + k * all_out + (o + r) * depth, packed.p + (k * panels + l * depth) * kPanel, kPanel, depth,
                           static_cast<int>(std::min<int64_t>(kRows, group - r)), sums + r * in + l * kPanel, in,
                           std::min<int64_t>(kPanel, in - l * kPanel), k > 0);
               }
               if (!bits) continue;
               auto* here = reinterpret_cast<uint8_t*>(live.p);  // a copy, because whole words are read from it
               const int64_t bytes = (count + 7) / 8;
               for (int64_t i = 0; i < bytes; i++) {
                 const int64_t at = first / 8 + i;
                 here[i] = shut.begin ? open.begin[at] & ~shut.begin[at] : open.begin[at];
               }
               if (scores)
                 straight_through(sums, to, here, first, count, past);
               else
                 apply(reinterpret_cast<const uint8_t*>(sums), here, reinterpret_cast<uint8_t*>(sums), count);
             }
           });
  return {d_weight, d_scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_grad_input", TORCH_BOX(&masked_linear_grad_input));
  m.impl("masked_linear_grad_weight", TORCH_BOX(&masked_linear_grad_weight));
}
