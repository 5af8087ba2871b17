// max_pool_relu and its gradient: maxima of windows past ReLU, of activations whose channels lie last. Both move bytes and little
// else: a thread has up to 16 of them, of neighbouring channels, and each element is read and written once.
#include <tuple>

#include "../pool.h"
#include "device.h"

namespace {

constexpr int kThreads = 128;
constexpr unsigned kMostLines = 1 << 15;  // of a grid's second dimension; further lines are taken in turn

// Sizes as a thread counts them; a line is a row of windows of the output, or of pixels of the input.
struct Lines {
  unsigned n, height, width, channels, part, window, rows, columns, lines;

  Lines(const Place& place, const Pool& s, int64_t lines_)
      : n(static_cast<unsigned>(s.n)),
        height(static_cast<unsigned>(s.height)),
        width(static_cast<unsigned>(s.width)),
        channels(static_cast<unsigned>(s.channels)),
        part(static_cast<unsigned>(s.part())),
        window(static_cast<unsigned>(s.window)),
        rows(static_cast<unsigned>(s.rows)),
        columns(static_cast<unsigned>(s.columns)),
        lines(static_cast<unsigned>(lines_)) {
    constexpr int64_t kMost = int64_t{1} << 31;
    STD_TORCH_CHECK(s.width * s.channels < kMost && lines_ < kMost && s.height < kMost, place.op(),
                    ": there must be fewer than 2^31 rows, and numbers in a row, got ", lines_, " and ", s.width * s.channels);
  }
};

template <class K, int V>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(const K* x, K inf, const __grid_constant__ Lines s, K* y, uint8_t* places) {
  const unsigned pieces = s.part / V, piece = blockIdx.x * kThreads + threadIdx.x;
  const unsigned column = piece / pieces, channel = piece % pieces * V;
  if (column >= s.columns) return;
  for (unsigned line = blockIdx.y; line < s.lines; line += gridDim.y) {
    const unsigned row = line % s.rows, image = line / s.rows % s.n, half = line / s.rows / s.n;
    const unsigned top = row * s.window, left = column * s.window;
    Pack<K, V> most = {};
    Pack<uint8_t, V> at;
    for (int v = 0; v < V; v++) at.v[v] = kNowhere;
    for (unsigned i = 0; i < s.window && top + i < s.height; i++)
      for (unsigned j = 0; j < s.window && left + j < s.width; j++) {
        const int64_t pixel = (int64_t{image} * s.height + top + i) * s.width + left + j;
        const auto in = *reinterpret_cast<const Pack<K, V>*>(x + pixel * s.channels + half * s.part + channel);
        for (int v = 0; v < V; v++) {  // of equals the first stays, of NaN the last, as in PyTorch
          const bool nan = static_cast<K>(in.v[v] & kNanKey<K>) > inf;
          if (!nan && in.v[v] <= most.v[v]) continue;
          most.v[v] = nan ? kNanKey<K> : in.v[v];
          at.v[v] = static_cast<uint8_t>(i * s.window + j);
        }
      }
    const int64_t to = (int64_t{line} * s.columns + column) * s.part + channel;
    *reinterpret_cast<Pack<K, V>*>(y + to) = most;
    *reinterpret_cast<Pack<uint8_t, V>*>(places + to) = at;
  }
}

template <class K, int V>
__global__ void __launch_bounds__(kThreads)
    pool_grad_kernel(const K* grad, const uint8_t* places, const __grid_constant__ Lines s, K* out) {
  const unsigned pieces = s.channels / V, piece = blockIdx.x * kThreads + threadIdx.x;
  const unsigned pixel = piece / pieces, channel = piece % pieces * V, half = channel / s.part;
  if (pixel >= s.width) return;
  for (unsigned line = blockIdx.y; line < s.lines; line += gridDim.y) {
    const unsigned image = line / s.height, row = line % s.height;
    const unsigned place = row % s.window * s.window + pixel % s.window;
    const int64_t window = ((int64_t{half} * s.n + image) * s.rows + row / s.window) * s.columns + pixel / s.window;
    const int64_t from = window * s.part + channel - half * s.part;
    const auto at = *reinterpret_cast<const Pack<uint8_t, V>*>(places + from);
    auto taken = *reinterpret_cast<const Pack<K, V>*>(grad + from);
    for (int v = 0; v < V; v++)
      if (at.v[v] != place) taken.v[v] = 0;
    *reinterpret_cast<Pack<K, V>*>(out + (int64_t{line} * s.width + pixel) * s.channels + channel) = taken;
  }
}

// f of a constant: elements of 16 bytes where the channels of an output are a multiple of those, else one; of double always one,
// as with two the kernel spills.
template <class K, class F>
void with_width(const Pool& s, const F& f) {
  constexpr int kWide = sizeof(K) == 8 ? 1 : 16 / sizeof(K);
  if (s.part() % kWide == 0)
    f(std::integral_constant<int, kWide>{});
  else
    f(std::integral_constant<int, 1>{});
}

dim3 grid_of(int64_t pieces, const Lines& s) {
  return dim3(static_cast<unsigned>(ceil_div(pieces, kThreads)), std::min(s.lines, kMostLines));
}

std::tuple<Tensor, Tensor> max_pool_relu_cuda(const Tensor& x_, int64_t window, bool split) {
  const Place place("max_pool_relu", x_);
  const Tensor x = aligned(x_);
  const Pool s = Pool::of(place.op(), x, window, split);
  Tensor y = place.empty({s.n * s.halves, s.rows, s.columns, s.part()}, dtype_code(x));
  Tensor places = place.empty_like(y, aoti_torch_dtype_uint8());
  const Lines lines(place, s, s.halves * s.n * s.rows);
  with_pool_keys(place.op(), "x", x.scalar_type(), [&](auto inf) {
    using K = decltype(inf);
    with_width<K>(s, [&](auto wide) {
      place.launch(pool_kernel<K, wide()>, grid_of(s.columns * (s.part() / wide()), lines), kThreads, 0,
                   static_cast<const K*>(x.const_data_ptr()), inf, lines, static_cast<K*>(y.mutable_data_ptr()),
                   static_cast<uint8_t*>(places.mutable_data_ptr()));
    });
  });
  return {y, places};
}

Tensor max_pool_relu_grad_cuda(const Tensor& grad_, const Tensor& places_, int64_t window, bool split, int64_t height,
                               int64_t width) {
  const Place place("max_pool_relu_grad", grad_);
  place.check("places", places_);
  const Tensor grad = aligned(grad_), places = aligned(places_);
  const Pool s = Pool::of(place.op(), grad, places, window, split, height, width);
  Tensor out = place.empty({s.n, height, width, s.channels}, dtype_code(grad));
  const Lines lines(place, s, s.n * height);
  with_pool_keys(place.op(), "grad", grad.scalar_type(), [&](auto inf) {
    using K = decltype(inf);
    with_width<K>(s, [&](auto wide) {
      place.launch(pool_grad_kernel<K, wide()>, grid_of(width * (s.channels / wide()), lines), kThreads, 0,
                   static_cast<const K*>(grad.const_data_ptr()), static_cast<const uint8_t*>(places.const_data_ptr()), lines,
                   static_cast<K*>(out.mutable_data_ptr()));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("max_pool_relu", TORCH_BOX(&max_pool_relu_cuda));
  m.impl("max_pool_relu_grad", TORCH_BOX(&max_pool_relu_grad_cuda));
}
