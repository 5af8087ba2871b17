// max_pool_relu and its gradient: maxima of windows past ReLU, of activations whose channels lie last. One pass over memory each,
// where pooling, ReLU and the copy that parts the channels make three, and their gradients four.
#include "../pool.h"

#include <algorithm>
#include <tuple>

#include "../tensors.h"

namespace {

// Choices are made by bits: of branches GCC makes loops that it cannot vectorise. Channels go by kRun at a time, a count that the
// compiler knows: most layers have few more, and a loop of any length costs as much to begin.
constexpr int kRun = 32;

// f(first channel, count) over n channels.
template <class F>
static inline __attribute__((always_inline)) void by_runs(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) f(i, kRun);
  if (i < n) f(i, static_cast<int>(n - i));
}

// Where the output of a row of windows begins.
static inline __attribute__((always_inline)) int64_t pooled(const Pool& s, int64_t image, int64_t row, int64_t half) {
  return ((half * s.n + image) * s.rows + row) * s.columns * s.part();
}

// One place of n windows: what is above the maxima so far takes their position. Of equals the first stays, of NaN the last, as in
// PyTorch. Before the first place the maxima are zero and nowhere.
template <bool kFirst, class K>
static inline __attribute__((always_inline)) void pool_run(const K* in, uint8_t place, K inf, int n, K* __restrict__ most,
                                                           uint8_t* __restrict__ places) {
  for (int k = 0; k < n; k++) {
    const K before = kFirst ? K{0} : most[k];
    const uint8_t at = kFirst ? kNowhere : places[k];
    const K nan = static_cast<K>(-static_cast<K>(static_cast<K>(in[k] & kNanKey<K>) > inf));
    const K x = static_cast<K>((in[k] & ~nan) | (kNanKey<K> & nan));
    const K more = static_cast<K>(-static_cast<K>(x > before) | nan);
    most[k] = static_cast<K>((x & more) | (before & ~more));
    places[k] = static_cast<uint8_t>((place & more) | (at & ~more));
  }
}

// Rows of windows [begin, end), counted over the images.
template <class K>
static inline __attribute__((always_inline)) void pool_rows(const Pool& s, const K* x, K inf, K* y, uint8_t* places,
                                                            int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; line++) {
    const int64_t image = line / s.rows, row = line % s.rows, top = row * s.window;
    const int64_t bottom = std::min(top + s.window, s.height);
    for (int64_t i = top; i < bottom; i++)
      for (int64_t half = 0; half < s.halves; half++) {
        const K* in = x + (image * s.height + i) * s.width * s.channels + half * s.part();
        for (int64_t column = 0; column < s.columns; column++) {
          const int64_t to = pooled(s, image, row, half) + column * s.part(), left = column * s.window;
          const int64_t right = std::min(left + s.window, s.width);
          for (int64_t j = left; j < right; j++, in += s.channels) {
            const auto place = static_cast<uint8_t>((i - top) * s.window + j - left);
            by_runs(s.part(), [&](int64_t c, int n) __attribute__((always_inline)) {
              if (place == 0)
                pool_run<true>(in + c, place, inf, n, y + to + c, places + to + c);
              else
                pool_run<false>(in + c, place, inf, n, y + to + c, places + to + c);
            });
          }
        }
      }
  }
}
template <class K>
static void pool_rows_portable(const Pool& s, const K* x, K inf, K* y, uint8_t* places, int64_t begin, int64_t end) {
  pool_rows(s, x, inf, y, places, begin, end);
}
template <class K>
SK_AVX2 static void pool_rows_avx2(const Pool& s, const K* x, K inf, K* y, uint8_t* places, int64_t begin, int64_t end) {
  pool_rows(s, x, inf, y, places, begin, end);
}
template <class K>
SK_AVX512 static void pool_rows_avx512(const Pool& s, const K* x, K inf, K* y, uint8_t* places, int64_t begin, int64_t end) {
  pool_rows(s, x, inf, y, places, begin, end);
}

// Rows of pixels [begin, end), counted over the images: each of grad where its maximum came from, zero elsewhere.
template <class K>
static inline __attribute__((always_inline)) void grad_rows(const Pool& s, const K* grad, const uint8_t* places, K* out,
                                                            int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; line++) {
    const int64_t image = line / s.height, i = line % s.height, row = i / s.window;
    for (int64_t half = 0; half < s.halves; half++) {
      K* to = out + line * s.width * s.channels + half * s.part();
      for (int64_t column = 0; column < s.columns; column++) {
        const int64_t from = pooled(s, image, row, half) + column * s.part(), left = column * s.window;
        const int64_t right = std::min(left + s.window, s.width);
        for (int64_t j = left; j < right; j++, to += s.channels) {
          const auto place = static_cast<uint8_t>(i % s.window * s.window + j - left);
          by_runs(s.part(), [&](int64_t c, int n) __attribute__((always_inline)) {
            const K* of = grad + from + c;
            const uint8_t* at = places + from + c;
            K* __restrict__ here = to + c;
            for (int k = 0; k < n; k++) here[k] = static_cast<K>(of[k] & -static_cast<K>(at[k] == place));
          });
        }
      }
    }
  }
}
template <class K>
static void grad_rows_portable(const Pool& s, const K* grad, const uint8_t* places, K* out, int64_t begin, int64_t end) {
  grad_rows(s, grad, places, out, begin, end);
}
template <class K>
SK_AVX2 static void grad_rows_avx2(const Pool& s, const K* grad, const uint8_t* places, K* out, int64_t begin, int64_t end) {
  grad_rows(s, grad, places, out, begin, end);
}
template <class K>
SK_AVX512 static void grad_rows_avx512(const Pool& s, const K* grad, const uint8_t* places, K* out, int64_t begin, int64_t end) {
  grad_rows(s, grad, places, out, begin, end);
}

// Rows of so many elements that make a thread worth its start.
static int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / elements); }

static std::tuple<Tensor, Tensor> max_pool_relu_cpu(const Tensor& x_, int64_t window, bool split) {
  const Tensor x = dense(x_);
  const Pool s = Pool::of("max_pool_relu", x, window, split);
  const int64_t sizes[] = {s.n * s.halves, s.rows, s.columns, s.part()};
  Tensor y = new_dense(sizes, 4, dtype_code(x)), places = new_dense(sizes, 4, aoti_torch_dtype_uint8());
  with_pool_keys("max_pool_relu", "x", x.scalar_type(), [&](auto inf) {
    using K = decltype(inf);
    if (s.n == 0) return;
    const auto kernel = for_isa(pool_rows_portable<K>, pool_rows_avx2<K>, pool_rows_avx512<K>);
    const auto* from = static_cast<const K*>(x.const_data_ptr());
    auto* to = static_cast<K*>(y.mutable_data_ptr());
    auto* at = static_cast<uint8_t*>(places.mutable_data_ptr());
    parallel(s.n * s.rows, grain(window * s.width * s.channels),
             [&](int64_t begin, int64_t end) { kernel(s, from, inf, to, at, begin, end); });
  });
  return {y, places};
}

static Tensor max_pool_relu_grad_cpu(const Tensor& grad_, const Tensor& places_, int64_t window, bool split, int64_t height,
                                     int64_t width) {
  const Tensor grad = dense(grad_), places = dense(places_);
  const Pool s = Pool::of("max_pool_relu_grad", grad, places, window, split, height, width);
  const int64_t sizes[] = {s.n, height, width, s.channels};
  Tensor out = new_dense(sizes, 4, dtype_code(grad));
  with_pool_keys("max_pool_relu_grad", "grad", grad.scalar_type(), [&](auto inf) {
    using K = decltype(inf);
    if (s.n == 0) return;
    const auto kernel = for_isa(grad_rows_portable<K>, grad_rows_avx2<K>, grad_rows_avx512<K>);
    const auto* from = static_cast<const K*>(grad.const_data_ptr());
    const auto* at = static_cast<const uint8_t*>(places.const_data_ptr());
    auto* to = static_cast<K*>(out.mutable_data_ptr());
    parallel(s.n * height, grain(width * s.channels), [&](int64_t begin, int64_t end) { kernel(s, from, at, to, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("max_pool_relu", TORCH_BOX(&max_pool_relu_cpu));
  m.impl("max_pool_relu_grad", TORCH_BOX(&max_pool_relu_grad_cpu));
}
