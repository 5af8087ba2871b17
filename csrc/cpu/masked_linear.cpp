// masked_linear and its gradients in float32: y = x (W where open)^T, dx = G_y (W where open), and G = G_y^T x with the
// straight-through rule behind it. Other dtypes go through apply and PyTorch's own product.
//
// The forward product of few rows multiplies rows by rows, both contiguous: no packing, and a mask piece costs a load beside the
// FMAs of several rows. That of many rows, and the gradients, are sums of outer products over packed panels of 32 columns; the
// mask is applied while W is packed. There a sum over more than kDepth terms is made of partial sums of kDepth, in order. The
// threads divide outputs, never sums.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "lanes.h"

namespace {

constexpr int kRows = 12;            // rows of an outer product
constexpr int kPanel = 32;           // columns of one
constexpr int kAhead = 4;            // rows that are asked for before they are packed
constexpr int kWide = 4 * kPanel;    // columns of a weight that a thread takes at least
constexpr int64_t kDepth = 256;      // terms of a partial sum: a panel of them fits a first-level cache beside a tile
constexpr int64_t kDirect = kRows;   // rows of a gradient up to which an unmasked weight is used where it lies
constexpr int64_t kFew = 12;         // rows of x up to which masking in the registers costs less than masking once
constexpr int64_t kMany = 48;        // rows of x from which a weight is turned for outer products
constexpr int64_t kPast = 1 << 18;   // weights from which their gradients are written past the caches
constexpr int64_t kSpare = 1 << 22;  // floats up to which a thread keeps a buffer
constexpr int64_t kWork = 1 << 18;   // multiply-adds below which a thread costs more than it saves

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

// Where a tile of sums goes, in rows that lie `row` apart: onto what is there if it is more of a sum, else onto a bias if any.
struct Place {
  float* out;
  int64_t row;
  const float* bias = nullptr;
  bool more = false;
};

// The weights and scores of the next tile of G, which lie `row` apart.
struct Ahead {
  const float *weight, *scores;
  int64_t row;
};

// What the gradients of weight and scores are made from, and where they go: d_weight and d_scores are null where not wanted.
struct Gradients {
  const float *weight, *scores;
  Bits open, shut;
  float *d_weight, *d_scores;
  int64_t row;
  bool magnitude, past;
};

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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

// Float32, 64-byte aligned, not initialised. A thread keeps the last one for the next: fresh pages cost more than filling them.
struct Buffer {
  explicit Buffer(int64_t n) {
    if (spare.size < n) {
      std::free(spare.p);
      spare.size = 0;
      spare.p = static_cast<float*>(std::aligned_alloc(64, padded(n, 16) * sizeof(float)));
      if (!spare.p) throw std::bad_alloc();
      spare.size = n;
    }
    std::swap(p, spare.p);
    std::swap(size, spare.size);
  }
  ~Buffer() {
    if (size <= kSpare && size > spare.size) {
      std::swap(p, spare.p);
      std::swap(size, spare.size);
    }
    std::free(p);
  }
  Buffer(const Buffer&) = delete;
  float* p = nullptr;
  int64_t size = 0;

 private:
  struct Spare {
    ~Spare() { std::free(p); }
    float* p = nullptr;
    int64_t size = 0;
  };
  static thread_local Spare spare;
};
thread_local Buffer::Spare Buffer::spare;

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

// The left sides of outer products: rows [0, rows) of `depth` terms that lie `term` apart, as tiles [tile][depth][kRows].
void pack_across(const float* from, int64_t term, int64_t depth, int64_t rows, float* to) {
  for (int64_t first = 0; first < rows; first += kRows, to += depth * kRows) {
    const int64_t n = std::min<int64_t>(kRows, rows - first);
    for (int64_t k = 0; k < depth; k++) {
      const float* terms = from + k * term + first;
      if (n == kRows)
        std::memcpy(to + k * kRows, terms, kRows * sizeof(float));  // of a known size: three moves
      else
        std::copy_n(terms, n, to + k * kRows);
    }
  }
}

// Rows that lie `row` apart, of `depth` contiguous terms, as [row][kDepth].
void pack_along(const float* from, int64_t row, int64_t depth, int64_t rows, float* to) {
  for (int64_t r = 0; r < rows; r++) std::copy_n(from + r * row, depth, to + r * kDepth);
}

// c[r][l] = sum_k a[r][k] w[k][l], or w[l][k] where w is turned, (+ bias[l]): y and dx. A panel of w is packed, then meets all
// rows of a while it is in the first-level cache.
void by_panels(const float* a, int64_t rows, int64_t terms, const float* w, const Bits& open, int64_t w_row, bool turned,
               const float* bias, float* c, int64_t lanes) {
  const int64_t runs = (rows + kRows - 1) / kRows;
  const Buffer tiles(rows * padded(terms, kDepth) + kRows * kDepth);
  for (int64_t k = 0; k < terms; k += kDepth) pack_along(a + k, terms, std::min(kDepth, terms - k), rows, tiles.p + k * rows);
  const auto pack = turned ? for_isa(portable::pack_turned, avx2::pack_turned, avx512::pack_turned)
                           : for_isa(portable::pack_panels, avx2::pack_panels, avx512::pack_panels);
  const auto outer = for_isa(portable::outer_tile<true>, avx2::outer_tile<true>, avx512::outer_tile<true>);
  parallel((lanes + kWide - 1) / kWide, std::max<int64_t>(1, kWork / (rows * terms * kWide)), [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(lanes, end * kWide);
    alignas(64) float panel[kDepth * kPanel];
    for (int64_t l = begin * kWide; l < last; l += kPanel)
      for (int64_t k = 0; k < terms; k += kDepth) {
        const int64_t depth = std::min(kDepth, terms - k), here = std::min<int64_t>(kPanel, last - l);
        const int64_t first = turned ? l * w_row + k : k * w_row + l;
        const bool direct = !turned && !open.begin && rows <= kDirect && here == kPanel;
        if (!direct) pack(w + first, w_row, open, first, depth, here, panel);
        for (int64_t t = 0; t < runs; t++) {  // of nearly one length
          const int64_t b = rows * t / runs;
          outer(tiles.p + k * rows + b * kDepth, direct ? w + first : panel, direct ? w_row : kPanel, depth,
                static_cast<int>(rows * (t + 1) / runs - b), {c + b * lanes + l, lanes, bias ? bias + l : nullptr, k > 0}, here,
                {});
        }
      }
  });
}

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
  if (rows >= kMany && in > 0) {
    by_panels(floats(x), rows, in, floats(weight), bits_of(op, bits, out * in), in, true, bias ? floats(*bias) : nullptr,
              floats_of(y), out);
    return y;
  }
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
  by_panels(g, rows, out, w, open, in, false, nullptr, to, in);
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
  const Buffer tiles((all_out + panels * kPanel) * rows);
  float* const packed = tiles.p + all_out * rows;
  const auto pack_panels = for_isa(portable::pack_panels, avx2::pack_panels, avx512::pack_panels);
  for (int64_t k = 0; k < rows; k += kDepth) {
    const int64_t depth = std::min(kDepth, rows - k);
    pack_across(g + k * out, out, depth, out, tiles.p + k * all_out);
    pack_panels(from + k * in, in, {}, 0, depth, in, packed + k * panels * kPanel);
  }
  const auto outer = for_isa(portable::outer_tile<false>, avx2::outer_tile<false>, avx512::outer_tile<false>);
  const auto straight_through =
      for_isa(portable::straight_through_tile, avx2::straight_through_tile, avx512::straight_through_tile);
  const Gradients to = {weight ? floats(*weight) : nullptr,
                        scores ? floats(*scores) : nullptr,
                        open,
                        shut,
                        to_weight,
                        to_scores,
                        in,
                        by == "magnitude",
                        n >= kPast && in % kLanes == 0};
  parallel((out + kRows - 1) / kRows, std::max<int64_t>(1, kWork / (std::max<int64_t>(1, rows) * in * kRows)),
           [&](int64_t begin, int64_t end) {
             alignas(64) float sums[kRows * kPanel];
             for (int64_t o = begin * kRows; o < std::min(out, end * kRows); o += kRows)
               for (int64_t l = 0; l < in; l += kPanel) {
                 const int group = static_cast<int>(std::min<int64_t>(kRows, out - o));
                 const int64_t next = l + kPanel < in ? o * in + l + kPanel : (o + kRows) * in;
                 const int64_t lanes = std::min<int64_t>(kPanel, in - l);
                 const Place place = bits ? Place{sums, kPanel} : Place{to_weight + o * in + l, in};
                 const Ahead ahead = scores ? Ahead{to.weight + next, to.scores + next, in} : Ahead{tiles.p, tiles.p, 0};
                 int64_t k = 0;
                 do {  // once without rows too: sums of nothing
                   const int64_t depth = std::min(kDepth, rows - k);
                   outer(tiles.p + k * all_out + o * depth, packed + k * panels * kPanel + l * depth, kPanel, depth, group,
                         {place.out, place.row, nullptr, k > 0}, lanes, ahead);
                   k += kDepth;
                 } while (k < rows);
                 if (bits) straight_through(sums, to, o * in + l, group, lanes);
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
