// What max_pool_relu and its gradient are on every device: sizes, checks, and how elements are compared.
//
// Elements are compared as signed integers of their size, K. Positive floats are ordered as their bits are, and of the others,
// whose bits are negative, nothing passes ReLU; NaN, above infinity by magnitude, is taken for the greatest of all.
#pragma once
#include "common.h"

constexpr uint8_t kNowhere = 255;  // the place of a maximum that ReLU stopped

template <class K>
constexpr K kNanKey = static_cast<K>(~(K{1} << (sizeof(K) * 8 - 1)));  // all bits but the sign

// n x height x width x channels, pooled to rows x columns; split, the two halves of the channels are one after the other there.
struct Pool {
  int64_t n, height, width, channels, window, halves, rows, columns;

  Pool(const char* op, int64_t n, int64_t height, int64_t width, int64_t channels, int64_t window, bool split)
      : n(n), height(height), width(width), channels(channels), window(window), halves(split ? 2 : 1) {
    STD_TORCH_CHECK(1 <= window && window <= 15, op, ": window must be from 1 to 15, got ", window);
    STD_TORCH_CHECK(height > 0 && width > 0 && channels > 0, op, ": height, width and channels must be positive, got ", height,
                    ", ", width, " and ", channels);
    STD_TORCH_CHECK(channels % halves == 0, op, ": channels must be even to be split, got ", channels);
    rows = (height + window - 1) / window, columns = (width + window - 1) / window;
  }

  // Of the input of max_pool_relu.
  static Pool of(const char* op, const Tensor& x, int64_t window, bool split) {
    STD_TORCH_CHECK(x.dim() == 4, op, ": x must be (N, H, W, C), got ", x.dim(), " dimensions");
    return Pool(op, x.size(0), x.size(1), x.size(2), x.size(3), window, split);
  }

  // Of the arguments of max_pool_relu_grad.
  static Pool of(const char* op, const Tensor& grad, const Tensor& places, int64_t window, bool split, int64_t height,
                 int64_t width) {
    const int64_t halves = split ? 2 : 1;
    STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) % halves == 0, op,
                    ": grad must be (N, h, w, C), with N even where it was split");
    const Pool pool(op, grad.size(0) / halves, height, width, grad.size(3) * halves, window, split);
    STD_TORCH_CHECK(grad.size(1) == pool.rows && grad.size(2) == pool.columns, op, ": grad must be of ", pool.rows, " x ",
                    pool.columns, " windows, got ", grad.size(1), " x ", grad.size(2));
    bool alike = places.scalar_type() == ScalarType::Byte && places.dim() == 4;
    for (int64_t d = 0; alike && d < 4; d++) alike = places.size(d) == grad.size(d);
    STD_TORCH_CHECK(alike, op, ": places must be uint8 of the shape of grad");
    return pool;
  }

  int64_t part() const { return channels / halves; }  // channels of an output
};

// f of an integer of an element's size, infinity.
template <class F>
void with_pool_keys(const char* op, const char* name, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(int64_t{0x7ff0000000000000});
    case ScalarType::Float:
      return f(int32_t{0x7f800000});
    case ScalarType::Half:
      return f(int16_t{0x7c00});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::BFloat16, op, ": ", name, " must be float64, float32, float16 or bfloat16");
      return f(int16_t{0x7f80});
  }
}
