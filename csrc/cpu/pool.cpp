// max_pool_relu and its gradient: maxima of windows past ReLU, for activations whose channels lie last. One pass over memory each,
// where pooling, ReLU and the copy that parts the channels are five.
#include <algorithm>
#include <limits>
#include <tuple>

#include "../floats.h"

namespace {

constexpr uint8_t kNowhere = 255;  // the place of a maximum that ReLU stops

// K is the signed integer of an element's size. Positive floats are ordered as their bits are, and of the others, whose bits are
// negative, nothing passes ReLU; NaN, above infinity by magnitude, becomes the greatest of all. Choices are made by bits: of
// branches GCC makes loops that it cannot vectorise.

// One place of n windows: what is above the maxima so far, which start at zero, takes their position. Of equals the first stays,
// of NaN the last, as in PyTorch.
template <class K>
static inline __attribute__((always_inline)) void pool_run(const K* in, uint8_t place, K inf, int64_t n, K* __restrict__ most,
                                                           uint8_t* __restrict__ places) {
  constexpr K kNan = std::numeric_limits<K>::max();
  for (int64_t i = 0; i < n; i++) {
    const K nan = static_cast<K>(-static_cast<K>(static_cast<K>(in[i] & kNan) > inf));
    const K x = static_cast<K>((in[i] & ~nan) | (kNan & nan));
    const K more = static_cast<K>(-static_cast<K>(x > most[i]) | nan);
    most[i] = static_cast<K>((x & more) | (most[i] & ~more));
    places[i] = static_cast<uint8_t>((place & more) | (places[i] & ~more));
  }
}
template <class K>
static void pool_run_portable(const K* in, uint8_t place, K inf, int64_t n, K* __restrict__ most,
                                                           uint8_t* __restrict__ places) {
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
static inline __attribute__((always_inline)) void grad_run(const K* grad, const uint8_t* places, uint8_t place, int64_t n, K* __restrict__ out) {
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

// The sizes of both sides: n x height x width x channels pooled to rows x columns, or, split, two halves of channels one after
// the other.
struct Shape {
  int64_t n, height, width, channels, window, rows, columns, halves;

  Shape(const char* op, int64_t n, int64_t height, int64_t width, int64_t channels, int64_t window, bool split)
      : n(n), height(height), width(width), channels(channels), window(window), halves(split ? 2 : 1) {
    STD_TORCH_CHECK(1 <= window && window <= 15, op, ": window must be from 1 to 15, got ", window);
    STD_TORCH_CHECK(height > 0 && width > 0 && channels > 0, op, ": height, width and channels must be positive, got ", height, ", ",
                    width, " and ", channels);
    STD_TORCH_CHECK(channels % halves == 0, op, ": channels must be even to be split, got ", channels);
    rows = (height + window - 1) / window, columns = (width + window - 1) / window;
  }

  int64_t part() const { return channels / halves; }
  int64_t pooled(int64_t image, int64_t row, int64_t half) const {  // where a row of windows begins
    return ((half * n + image) * rows + row) * columns * part();
  }

  // f(image, row) over all rows of windows, on as many threads as are worth it.
  template <class F>
  void each_row(const F& f) const {
    const int64_t elements = window * width * channels;
    parallel(n * rows, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i / rows, i % rows);
    });
  }
};

template <class K>
static void pool(const Shape& s, const void* x_, int64_t inf, void* y_, uint8_t* places) {
  const auto kernel = for_isa(pool_run_portable<K>, pool_run_avx2<K>, pool_run_avx512<K>);
  const auto* x = static_cast<const K*>(x_);
  auto* y = static_cast<K*>(y_);
  s.each_row([&](int64_t image, int64_t row) {
    const int64_t top = row * s.window, bottom = std::min(top + s.window, s.height);
    for (int64_t half = 0; half < s.halves; half++) {
      const int64_t begin = s.pooled(image, row, half);
      std::fill_n(y + begin, s.columns * s.part(), K{0});
      std::fill_n(places + begin, s.columns * s.part(), kNowhere);
    }
    for (int64_t i = top; i < bottom; i++)
      for (int64_t j = 0; j < s.width; j++)
        for (int64_t half = 0; half < s.halves; half++) {
          const int64_t to = s.pooled(image, row, half) + j / s.window * s.part();
          const auto place = static_cast<uint8_t>((i - top) * s.window + j % s.window);
          kernel(x + ((image * s.height + i) * s.width + j) * s.channels + half * s.part(), place, static_cast<K>(inf), s.part(),
                 y + to, places + to);
        }
  });
}

template <class K>
static void pool_grad(const Shape& s, const void* grad_, const uint8_t* places, void* out_) {
  const auto kernel = for_isa(grad_run_portable<K>, grad_run_avx2<K>, grad_run_avx512<K>);
  const auto* grad = static_cast<const K*>(grad_);
  auto* out = static_cast<K*>(out_);
  s.each_row([&](int64_t image, int64_t row) {
    const int64_t top = row * s.window, bottom = std::min(top + s.window, s.height);
    for (int64_t i = top; i < bottom; i++)
      for (int64_t j = 0; j < s.width; j++)
        for (int64_t half = 0; half < s.halves; half++) {
          const int64_t from = s.pooled(image, row, half) + j / s.window * s.part();
          const auto place = static_cast<uint8_t>((i - top) * s.window + j % s.window);
          kernel(grad + from, places + from, place, s.part(),
                 out + ((image * s.height + i) * s.width + j) * s.channels + half * s.part());
        }
  });
}

// f of an integer of an element's size.
template <class F>
static void with_bits(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(int64_t{});
    case ScalarType::Float:
      return f(int32_t{});
    default:
      return f(int16_t{});
  }
}

static int64_t infinity(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 0x7ff0000000000000;
    case ScalarType::Float:
      return 0x7f800000;
    case ScalarType::Half:
      return 0x7c00;
    default:
      return 0x7f80;
  }
}

static std::tuple<Tensor, Tensor> max_pool_relu_cpu(const Tensor& x_, int64_t window, bool split) {
  const char* const op = "max_pool_relu";
  STD_TORCH_CHECK(x_.dim() == 4, op, ": x must be (N, H, W, C), got ", x_.dim(), " dimensions");
  const Tensor x = dense(x_);
  const ScalarType dtype = floating(op, "x", x);
  const Shape s(op, x.size(0), x.size(1), x.size(2), x.size(3), window, split);
  const int64_t sizes[] = {s.n * s.halves, s.rows, s.columns, s.part()};
  Tensor y = new_dense(sizes, 4, dtype_code(x)), places = new_dense(sizes, 4, aoti_torch_dtype_uint8());
  if (s.n == 0) return {y, places};
  with_bits(dtype, [&](auto bits) {
    pool<decltype(bits)>(s, x.const_data_ptr(), infinity(dtype), y.mutable_data_ptr(),
                         static_cast<uint8_t*>(places.mutable_data_ptr()));
  });
  return {y, places};
}

static Tensor max_pool_relu_grad_cpu(const Tensor& grad_, const Tensor& places_, int64_t window, bool split, int64_t height,
                                     int64_t width) {
  const char* const op = "max_pool_relu_grad";
  STD_TORCH_CHECK(grad_.dim() == 4, op, ": grad must be (N, h, w, C), got ", grad_.dim(), " dimensions");
  const Tensor grad = dense(grad_), places = dense(places_);
  const ScalarType dtype = floating(op, "grad", grad);
  const int64_t halves = split ? 2 : 1;
  STD_TORCH_CHECK(grad.size(0) % halves == 0, op, ": rows of grad must be even where they were split, got ", grad.size(0));
  const Shape s(op, grad.size(0) / halves, height, width, grad.size(3) * halves, window, split);
  STD_TORCH_CHECK(grad.size(1) == s.rows && grad.size(2) == s.columns, op, ": grad must be of ", s.rows, " x ", s.columns,
                  " windows, got ", grad.size(1), " x ", grad.size(2));
  bool alike = places.scalar_type() == ScalarType::Byte && places.dim() == 4;
  for (int64_t d = 0; alike && d < 4; d++) alike = places.size(d) == grad.size(d);
  STD_TORCH_CHECK(alike, op, ": places must be uint8 of the shape of grad");
  const int64_t sizes[] = {s.n, height, width, s.channels};
  Tensor out = new_dense(sizes, 4, dtype_code(grad));
  if (s.n == 0) return out;
  with_bits(dtype, [&](auto bits) {
    pool_grad<decltype(bits)>(s, grad.const_data_ptr(), static_cast<const uint8_t*>(places.const_data_ptr()),
                              out.mutable_data_ptr());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("max_pool_relu", TORCH_BOX(&max_pool_relu_cpu));
  m.impl("max_pool_relu_grad", TORCH_BOX(&max_pool_relu_grad_cpu));
}
