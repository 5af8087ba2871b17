// max_pool_relu and its gradient: maxima of windows past ReLU, of activations whose channels lie last. One pass over memory each,
// where pooling, ReLU and the copy that parts the channels are five.
#include "../pool.h"

#include <algorithm>
#include <tuple>

#include "../tensors.h"

namespace {

// Choices are made by bits: of branches GCC makes loops that it cannot vectorise.

// One place of n windows: what is above the maxima so far, which start at zero, takes their position. Of equals the first stays,
// of NaN the last, as in PyTorch.
template <class K>
static inline __attribute__((always_inline)) void pool_run(const K* in, uint8_t place, K inf, int64_t n, K* __restrict__ most,
                                                           uint8_t* __restrict__ places) {
  for (int64_t i = 0; i < n; i++) {
    const K nan = static_cast<K>(-static_cast<K>(static_cast<K>(in[i] & kNanKey<K>) > inf));
    const K x = static_cast<K>((in[i] & ~nan) | (kNanKey<K> & nan));
    const K more = static_cast<K>(-static_cast<K>(x > most[i]) | nan);
    most[i] = static_cast<K>((x & more) | (most[i] & ~more));
    places[i] = static_cast<uint8_t>((place & more) | (places[i] & ~more));
  }
}
template <class K>
static void pool_run_portable(const K* in, uint8_t place, K inf, int64_t n, K* __restrict__ most, uint8_t* __restrict__ places) {
  pool_run(in, place, inf, n, most, places);
}
template <class K>
SK_AVX2 static void pool_run_avx2(const K* in, uint8_t place, K inf, int64_t n, K* __restrict__ most,
                                  uint8_t* __restrict__ places) {
  pool_run(in, place, inf, n, most, places);
}
template <class K>
SK_AVX512 static void pool_run_avx512(const K* in, uint8_t place, K inf, int64_t n, K* __restrict__ most,
                                      uint8_t* __restrict__ places) {
  pool_run(in, place, inf, n, most, places);
}

// out[i] = the maximum came from this place ? grad[i] : 0.
template <class K>
static inline __attribute__((always_inline)) void grad_run(const K* grad, const uint8_t* places, uint8_t place, int64_t n,
                                                           K* __restrict__ out) {
  for (int64_t i = 0; i < n; i++) out[i] = places[i] == place ? grad[i] : K{0};
}
template <class K>
static void grad_run_portable(const K* grad, const uint8_t* places, uint8_t place, int64_t n, K* __restrict__ out) {
  grad_run(grad, places, place, n, out);
}
template <class K>
SK_AVX2 static void grad_run_avx2(const K* grad, const uint8_t* places, uint8_t place, int64_t n, K* __restrict__ out) {
  grad_run(grad, places, place, n, out);
}
template <class K>
SK_AVX512 static void grad_run_avx512(const K* grad, const uint8_t* places, uint8_t place, int64_t n, K* __restrict__ out) {
  grad_run(grad, places, place, n, out);
}

// Where the output of a row of windows begins.
static int64_t pooled(const Pool& s, int64_t image, int64_t row, int64_t half) {
  return ((half * s.n + image) * s.rows + row) * s.columns * s.part();
}

// f(image, row) over all rows of windows, on as many threads as are worth it.
template <class F>
static void each_row(const Pool& s, const F& f) {
  const int64_t elements = s.window * s.width * s.channels;
  parallel(s.n * s.rows, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i / s.rows, i % s.rows);
  });
}

template <class K>
static void pool(const Pool& s, const void* x_, K inf, void* y_, uint8_t* places) {
  const auto kernel = for_isa(pool_run_portable<K>, pool_run_avx2<K>, pool_run_avx512<K>);
  const auto* x = static_cast<const K*>(x_);
  auto* y = static_cast<K*>(y_);
  each_row(s, [&](int64_t image, int64_t row) {
    const int64_t top = row * s.window, bottom = std::min(top + s.window, s.height);
    for (int64_t half = 0; half < s.halves; half++) {
      const int64_t begin = pooled(s, image, row, half);
      std::fill_n(y + begin, s.columns * s.part(), K{0});
      std::fill_n(places + begin, s.columns * s.part(), kNowhere);
    }
    for (int64_t i = top; i < bottom; i++)
      for (int64_t j = 0; j < s.width; j++)
        for (int64_t half = 0; half < s.halves; half++) {
          const int64_t to = pooled(s, image, row, half) + j / s.window * s.part();
          const auto place = static_cast<uint8_t>((i - top) * s.window + j % s.window);
          kernel(x + ((image * s.height + i) * s.width + j) * s.channels + half * s.part(), place, inf, s.part(), y + to,
                 places + to);
        }
  });
}

template <class K>
static void pool_grad(const Pool& s, const void* grad_, const uint8_t* places, void* out_) {
  const auto kernel = for_isa(grad_run_portable<K>, grad_run_avx2<K>, grad_run_avx512<K>);
  const auto* grad = static_cast<const K*>(grad_);
  auto* out = static_cast<K*>(out_);
  each_row(s, [&](int64_t image, int64_t row) {
    const int64_t top = row * s.window, bottom = std::min(top + s.window, s.height);
    for (int64_t i = top; i < bottom; i++)
      for (int64_t j = 0; j < s.width; j++)
        for (int64_t half = 0; half < s.halves; half++) {
          const int64_t from = pooled(s, image, row, half) + j / s.window * s.part();
          const auto place = static_cast<uint8_t>((i - top) * s.window + j % s.window);
          kernel(grad + from, places + from, place, s.part(),
                 out + ((image * s.height + i) * s.width + j) * s.channels + half * s.part());
        }
  });
}

static std::tuple<Tensor, Tensor> max_pool_relu_cpu(const Tensor& x_, int64_t window, bool split) {
  const Tensor x = dense(x_);
  const Pool s = Pool::of("max_pool_relu", x, window, split);
  const int64_t sizes[] = {s.n * s.halves, s.rows, s.columns, s.part()};
  Tensor y = new_dense(sizes, 4, dtype_code(x)), places = new_dense(sizes, 4, aoti_torch_dtype_uint8());
  with_pool_keys("max_pool_relu", "x", x.scalar_type(), [&](auto inf) {
    if (s.n) pool(s, x.const_data_ptr(), inf, y.mutable_data_ptr(), static_cast<uint8_t*>(places.mutable_data_ptr()));
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
    if (s.n)
      pool_grad<decltype(inf)>(s, grad.const_data_ptr(), static_cast<const uint8_t*>(places.const_data_ptr()),
                               out.mutable_data_ptr());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("max_pool_relu", TORCH_BOX(&max_pool_relu_cpu));
  m.impl("max_pool_relu_grad", TORCH_BOX(&max_pool_relu_grad_cpu));
}
