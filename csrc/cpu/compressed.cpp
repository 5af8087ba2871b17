// compressed_linear, decompress: products with weights of which only the open ones are stored.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../floats.h"
#include "lanes.h"

namespace {

constexpr int64_t kBatch = 16;  // rows of x that share a reading of the weight
constexpr int64_t kFew = 2;     // rows of x up to which an index list gathers from each; above, a lane is a row

#define SK_TARGET
namespace portable {
#include "compressed_kernels.h"
}
#undef SK_TARGET
#define SK_TARGET SK_AVX2
namespace avx2 {
#include "compressed_kernels.h"
}
#undef SK_TARGET
#define SK_TARGET SK_AVX512
namespace avx512 {
#include "compressed_kernels.h"
}
#undef SK_TARGET

// A compressed weight. Of its rows, the values of row o are [offsets[o], offsets[o + 1]); where they are in the row is either a
// bitmap, whole words a row, or their columns.
enum class Format { bitmap, short_index, long_index };
struct Compressed {
  Tensor values, positions, offsets;
  Format format;
  ScalarType dtype;
  int64_t outputs, inputs, words, count;
  const int64_t* begin;  // offsets
};

static Compressed read_compressed(const char* op, const Tensor& values, const Tensor& positions, const Tensor& offsets,
                                  int64_t inputs) {
  Compressed c{dense(values), dense(positions),   dense(offsets), Format::bitmap, floating(op, "values", values), 0,
               inputs,        (inputs + 63) / 64, values.numel(), nullptr};
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 && offsets.numel() > 0, op,
                  ": offsets must be int64 (O + 1,)");
  c.outputs = offsets.numel() - 1;
  c.begin = static_cast<const int64_t*>(c.offsets.const_data_ptr());
  if (positions.scalar_type() == ScalarType::Byte) {
    STD_TORCH_CHECK(positions.dim() == 2 && positions.size(0) == c.outputs && positions.size(1) == c.words * 8, op,
                    ": a bitmap must have ", c.words * 8, " bytes for each of ", c.outputs, " rows");
  } else {
    STD_TORCH_CHECK(positions.scalar_type() == ScalarType::UInt16 || positions.scalar_type() == ScalarType::Int, op,
                    ": positions must be a uint8 bitmap, or uint16 or int32 columns");
    STD_TORCH_CHECK(positions.dim() == 1 && positions.numel() == c.count, op, ": columns must be one for each of ", c.count,
                    " values, got ", positions.numel());
    c.format = positions.scalar_type() == ScalarType::UInt16 ? Format::short_index : Format::long_index;
  }
  STD_TORCH_CHECK(c.begin[0] == 0 && c.begin[c.outputs] == c.count, op, ": offsets must go from 0 to the ", c.count, " values");
  for (int64_t o = 0; o < c.outputs; o++)
    STD_TORCH_CHECK(c.begin[o] <= c.begin[o + 1] && c.begin[o + 1] - c.begin[o] <= inputs, op, ": offsets must grow by at most ",
                    inputs, " a row");
  return c;
}

// f(column, number of the value) for every value of row o.
template <class F>
static void each_value(const Compressed& c, int64_t o, const F& f) {
  int64_t i = c.begin[o];
  if (c.format == Format::bitmap) {
    const auto* open = static_cast<const uint8_t*>(c.positions.const_data_ptr()) + o * c.words * 8;
    for (int64_t column = 0; column < c.inputs && i < c.begin[o + 1]; column++)
      if (is_open(open, column)) f(column, i++);
  } else if (c.format == Format::short_index) {
    const auto* columns = static_cast<const uint16_t*>(c.positions.const_data_ptr());
    for (; i < c.begin[o + 1]; i++) f(int64_t{columns[i]}, i);
  } else {
    const auto* columns = static_cast<const int32_t*>(c.positions.const_data_ptr());
    for (; i < c.begin[o + 1]; i++) f(int64_t{columns[i]}, i);
  }
}

static int64_t grain_of(const Compressed& c, int64_t rows) {
  return std::max<int64_t>(1, kGrain * c.outputs / std::max<int64_t>(1, c.count * rows));
}

// kernel(o, values of row o, its columns or null). At the end of the values those of a row, and their columns, come from a copy
// with zeros behind it. A bitmap's row counts as full there, so that one which disagrees with the offsets is wrong but reads no
// foreign memory.
template <class T, class Column, class F>
static void each_row(const Compressed& c, int64_t begin, int64_t end, const F& kernel) {
  const auto* values = static_cast<const T*>(c.values.const_data_ptr());
  const Column* columns = c.format == Format::bitmap ? nullptr : static_cast<const Column*>(c.positions.const_data_ptr());
  std::vector<T> some;
  std::vector<Column> their_columns;
  for (int64_t o = begin; o < end; o++) {
    const int64_t first = c.begin[o], n = c.begin[o + 1] - first;
    const int64_t most = columns ? n : c.words * 64;
    if (first + most + kLanes <= c.count) {
      kernel(o, values + first, columns ? columns + first : nullptr);
      continue;
    }
    some.assign(most + kLanes, T(0.0f));
    std::copy_n(values + first, n, some.data());
    if (columns) {
      their_columns.assign(n + kLanes, 0);
      std::copy_n(columns + first, n, their_columns.data());
    }
    kernel(o, some.data(), columns ? their_columns.data() : nullptr);
  }
}

// sums[o * step + r] for up to kBatch rows of x.
template <class T>
static void products_bitmap(const Compressed& c, const float* x, int64_t stride, int64_t rows, float* sums, int64_t step) {
  const auto kernel = for_isa(portable::bitmap<T>, avx2::bitmap<T>, avx512::bitmap<T>);
  const auto* open = static_cast<const uint8_t*>(c.positions.const_data_ptr());
  parallel(c.outputs, grain_of(c, rows), [&](int64_t begin, int64_t end) {
    each_row<T, uint16_t>(c, begin, end, [&](int64_t o, const T* values, const uint16_t*) {
      kernel(values, open + o * c.words * 8, c.words, x, stride, rows, sums + o * step);
    });
  });
}
template <class T, class Column>
static void products_index(const Compressed& c, const float* x, int64_t stride, int64_t rows, float* sums, int64_t step) {
  const auto kernel = rows <= kFew
                          ? for_isa(portable::index_few<T, Column>, avx2::index_few<T, Column>, avx512::index_few<T, Column>)
                          : for_isa(portable::index_many<T, Column>, avx2::index_many<T, Column>, avx512::index_many<T, Column>);
  parallel(c.outputs, grain_of(c, rows), [&](int64_t begin, int64_t end) {
    each_row<T, Column>(c, begin, end, [&](int64_t o, const T* values, const Column* columns) {
      kernel(values, columns, c.begin[o + 1] - c.begin[o], x, stride, rows, sums + o * step);
    });
  });
}
template <class T>
static void products(const Compressed& c, const float* x, int64_t stride, int64_t rows, float* sums, int64_t step) {
  if (c.format == Format::bitmap)
    products_bitmap<T>(c, x, stride, rows, sums, step);
  else if (c.format == Format::short_index)
    products_index<T, uint16_t>(c, x, stride, rows, sums, step);
  else
    products_index<T, int32_t>(c, x, stride, rows, sums, step);
}

template <class T>
static void linear_in(const Compressed& c, const Tensor& x, const Tensor* bias, Tensor& y) {
  const int64_t all = c.inputs > 0 ? x.numel() / c.inputs : y.numel() / c.outputs, inputs = c.inputs, outputs = c.outputs;
  const bool lanes = c.format != Format::bitmap;
  const int64_t stride = c.words * 64, most = std::min(kBatch, all);
  const int64_t step = lanes && all > kFew ? kBatch : most;
  Floats in(most * stride), in_lanes(lanes && all > kFew ? inputs * kBatch : 0), sums(outputs * step), shift(outputs, 0.0f),
      row(outputs);
  if (bias) read_tile(c.dtype, bias->const_data_ptr(), shift.data(), 0, outputs);
  for (int64_t first = 0; first < all; first += kBatch) {
    const int64_t rows = std::min(kBatch, all - first);
    for (int64_t r = 0; r < rows; r++)
      read_tile(c.dtype, x.const_data_ptr(), in.data() + r * stride, (first + r) * inputs, inputs);
    const bool transposed = lanes && rows > kFew;
    if (transposed)
      for (int64_t i = 0; i < inputs; i++)
        for (int64_t r = 0; r < kBatch; r++) in_lanes[i * kBatch + r] = r < rows ? in[r * stride + i] : 0.0f;
    products<T>(c, transposed ? in_lanes.data() : in.data(), stride, rows, sums.data(), step);
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t o = 0; o < outputs; o++) row[o] = sums[o * step + r] + shift[o];
      write_tile(c.dtype, row.data(), y.mutable_data_ptr(), (first + r) * outputs, outputs);
    }
  }
}

static void linear_double(const Compressed& c, const Tensor& x, const Tensor* bias, Tensor& y) {
  const auto *in = static_cast<const double*>(x.const_data_ptr()),
             *values = static_cast<const double*>(c.values.const_data_ptr());
  auto* out = static_cast<double*>(y.mutable_data_ptr());
  const int64_t rows = y.numel() / c.outputs;
  const auto* shift = bias ? static_cast<const double*>(bias->const_data_ptr()) : nullptr;
  parallel(c.outputs, grain_of(c, rows), [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t o = begin; o < end; o++) {
        double sum = 0;
        each_value(c, o, [&](int64_t column, int64_t i) { sum += values[i] * in[r * c.inputs + column]; });
        out[r * c.outputs + o] = shift ? sum + shift[o] : sum;
      }
  });
}

static Tensor compressed_linear_cpu(const Tensor& x_, const Tensor& values, const Tensor& positions, const Tensor& offsets,
                                    std::optional<Tensor> bias) {
  const char* op = "compressed_linear";
  const Tensor x = dense(x_);
  STD_TORCH_CHECK(x.dim() > 0, op, ": x must be (..., I)");
  const Compressed c = read_compressed(op, values, positions, offsets, x.size(x.dim() - 1));
  STD_TORCH_CHECK(x.scalar_type() == c.dtype, op, ": x must have the dtype of values");
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == c.dtype && bias->numel() == c.outputs, op, ": bias must be (", c.outputs,
                    ",) in the dtype of values, got ", bias->numel());
    bias = dense(*bias);
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = c.outputs;
  Tensor y = new_dense(sizes.data(), x.dim(), dtype_code(x));
  if (y.numel() == 0) return y;
  const Tensor* shift = bias ? &*bias : nullptr;
  switch (c.dtype) {
    case ScalarType::Double:
      linear_double(c, x, shift, y);
      break;
    case ScalarType::Float:
      linear_in<float>(c, x, shift, y);
      break;
    case ScalarType::Half:
      linear_in<Half>(c, x, shift, y);
      break;
    default:
      linear_in<BFloat16>(c, x, shift, y);
  }
  return y;
}

static Tensor decompress_cpu(const Tensor& values, const Tensor& positions, const Tensor& offsets, int64_t inputs) {
  const Compressed c = read_compressed("decompress", values, positions, offsets, inputs);
  const int64_t sizes[] = {c.outputs, inputs};
  Tensor out = new_dense(sizes, 2, dtype_code(values));
  const auto element = static_cast<int64_t>(values.element_size());
  const auto* from = static_cast<const uint8_t*>(c.values.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;  // memset must not be given a null pointer, even for no bytes
  parallel(c.outputs, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, inputs)), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) {
      uint8_t* row = to + o * inputs * element;
      std::memset(row, 0, inputs * element);
      each_value(c, o, [&](int64_t column, int64_t i) { std::memcpy(row + column * element, from + i * element, element); });
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("compressed_linear", TORCH_BOX(&compressed_linear_cpu));
  m.impl("decompress", TORCH_BOX(&decompress_cpu));
}
