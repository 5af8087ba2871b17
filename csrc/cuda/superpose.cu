// superpose, superpose_counts, superpose_grad, alpha_grad: one weight through a whole bank of masks, and what each mask would
// have changed. Here arguments are checked and a way is chosen; each way is a file of its own:
//
//                    looked up in tables of sums      multiplied as matrices
//   superpose        superpose_tables.cu              superpose_products.cu; of several rows superpose_rows.cu
//   superpose_grad   superpose_grad_tables.cu         superpose_grad_products.cu
//   alpha_grad       superpose_grad_tables.cu         alpha_grad.cu
//
// Products take mask bits by 8-bit digits of a common scale, so that all sums are exact. Where numbers are too far apart for
// that, and for float64, sums take four masks, or four weights, at a time, by tables. Every sum is taken in an order that depends
// on sizes alone.
#include "superpose.h"

using namespace superposition;

namespace {

// ---------------------------------------------------------------------------------------------------------------------- choices

// A product takes half the operations of looking up, and more where the sums of a weight end: few tasks of many weights go by
// tables, which need no sharing of a tile there.
bool mixes_by_tables(const Place& place, ScalarType weight, int64_t n, const Bank& bank) {
  const bool few_of_many = bank.tasks() <= 2 * kBlockTasks && tiles(n) >= place.processors() * 64;
  return weight == ScalarType::Double || few_of_many;
}

// Equal shares gain where rows fill the device more than once; whole tiles are quicker for one. Both give the same bits.
bool mixes_in_shares(const Place& place, int64_t rows, const Bank& bank) { return rows > 1 && digits_fit(place, bank); }

// Few tasks hide tables of float64 behind the memory.
bool dots_by_tables(bool wide, int64_t tasks) { return wide || tasks <= kWarpSize; }

// Whether products take less time than tables, in clocks of a processor for a tile: a table of sums costs about 130 of them, and
// looking up 200 for 32 tasks, used or not; a product 5.3 a row and task, of rows that are rounded up. Tables are for
// few rows, and for many tasks where rounding adds many.
bool alpha_grad_multiplies(int64_t rows, int64_t tasks) {
  const int64_t rounded = rows > 32 ? ceil_div(rows, 128) * 128 : 32;
  return static_cast<double>(rounded) * static_cast<double>(tasks) * 5.3 <
         static_cast<double>(rows) * static_cast<double>(130 + 200 * ceil_div(tasks, kWarpSize));
}

// -------------------------------------------------------------------------------------------------------------------- superpose

ScalarType floating(const Place& place, const char* name, const Tensor& t) {
  with_float(place.op(), name, t.scalar_type(), [](auto) {});
  return t.scalar_type();
}

Floats floats(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type()}; }

Tensor superpose_cuda(const Tensor& weight_, std::vector<Tensor> blocks, std::optional<Tensor> alphas_) {
  const Place place("superpose", weight_);
  const Tensor weight = dense(weight_);
  const int64_t n = weight.numel();
  const ScalarType dtype = floating(place, "weight", weight);
  const Bank bank(place, blocks, n);
  STD_TORCH_CHECK(!alphas_ || ((alphas_->dim() == 1 || alphas_->dim() == 2) && alphas_->size(alphas_->dim() - 1) == bank.tasks()),
                  "superpose: alphas must be (K,) or (R, K), one for each of ", bank.tasks(), " tasks, got ",
                  alphas_ ? alphas_->numel() : 0);
  const bool many = alphas_ && alphas_->dim() == 2;
  Mix mix{floats(weight), {nullptr, dtype}, nullptr, n, many ? alphas_->size(0) : 1, 0, 1.0 / static_cast<double>(bank.tasks())};
  std::optional<Tensor> alphas;
  if (alphas_) {
    place.check("alphas", *alphas_);
    floating(place, "alphas", *alphas_);
    alphas = dense(*alphas_);
    mix.alphas = floats(*alphas);
  }
  std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
  if (many) sizes.insert(sizes.begin(), mix.rows);
  Tensor out = place.empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype_code(weight));
  if (n == 0 || mix.rows == 0) return out;
  mix.out = out.mutable_data_ptr();
  if (bank.tasks() == 0) {
    place.zero(mix.out, static_cast<size_t>(out.numel() * static_cast<int64_t>(out.element_size())));
    return out;
  }
  if (mixes_by_tables(place, dtype, n, bank))
    mix_by_tables(place, bank, mix);
  else if (mixes_in_shares(place, mix.rows, bank))
    mix_rows_by_products(place, bank, mix);
  else
    mix_by_products(place, bank, mix);
  return out;
}

// ------------------------------------------------------------------------------------------------------------- superpose_counts

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    superpose_counts_kernel(const T* weight, const int32_t* counts, Wide<T> tasks, T* out, int64_t n) {
  using W = Wide<T>;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  const auto weigh = [&](T w, int32_t count) {
    return narrow<T>(count > 0 ? widen<W>(w) * (static_cast<W>(count) / tasks) : W{});
  };
  if (first + 4 <= n) {
    using Packed = Pack<T, sizeof(T) == 8 ? 2 : 4>;
    constexpr int kPack = sizeof(Packed) / sizeof(T);
    const Pack<int32_t, 4> count = *reinterpret_cast<const Pack<int32_t, 4>*>(counts + first);
#pragma unroll
    for (int i = 0; i < 4; i += kPack) {
      Packed w = *reinterpret_cast<const Packed*>(weight + first + i);
#pragma unroll
      for (int j = 0; j < kPack; j++) w.v[j] = weigh(w.v[j], count.v[i + j]);
      *reinterpret_cast<Packed*>(out + first + i) = w;
    }
  } else {
    for (int64_t i = first; i < n; i++) out[i] = weigh(weight[i], counts[i]);
  }
}

Tensor superpose_counts_cuda(const Tensor& weight_, const Tensor& counts_, int64_t tasks) {
  const Place place("superpose_counts", weight_);
  place.check("counts", counts_);
  const Tensor weight = aligned(weight_), counts = aligned(counts_);
  const int64_t n = weight.numel();
  floating(place, "weight", weight);
  STD_TORCH_CHECK(counts.numel() == n && counts.scalar_type() == ScalarType::Int,
                  "superpose_counts: counts must be int32, one for each of ", n, " weights, got ", counts.numel());
  Tensor out = place.empty_like(weight, dtype_code(weight));
  with_float(place.op(), "weight", weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    place.launch(superpose_counts_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kThreads * 4))), kThreads, 0,
                 static_cast<const T*>(weight.const_data_ptr()), static_cast<const int32_t*>(counts.const_data_ptr()),
                 static_cast<Wide<T>>(tasks), static_cast<T*>(out.mutable_data_ptr()), n);
  });
  return out;
}

// --------------------------------------------------------------------------------------------------------------- superpose_grad

Tensor superpose_grad_cuda(const Tensor& grad_, const Tensor& weight_, std::vector<Tensor> blocks) {
  const Place place("superpose_grad", weight_);
  place.check("grad", grad_);
  const Tensor grad = dense(grad_), weight = dense(weight_);
  const int64_t n = weight.numel();
  const bool many = grad.dim() == weight.dim() + 1;
  const int64_t rows = many ? grad.size(0) : 1;
  STD_TORCH_CHECK(grad.numel() == rows * n, "superpose_grad: grad must have the ", n, " elements of weight, got ",
                  grad.numel() / std::max<int64_t>(rows, 1));
  const ScalarType dtype = floating(place, "weight", weight);
  const bool wide = dtype == ScalarType::Double || floating(place, "grad", grad) == ScalarType::Double;
  const Bank bank(place, blocks, n);
  const int64_t sizes[] = {rows, bank.tasks()};
  Tensor out = place.empty(many ? sizes : sizes + 1, many ? 2 : 1, dtype_code(weight));
  if (bank.tasks() == 0 || rows == 0) return out;
  const Dot dot{floats(grad),
                {nullptr, dtype},
                floats(weight),
                n,
                tiles(n),
                1,
                1,
                0,
                {nullptr, out.mutable_data_ptr(), dtype, 1, static_cast<int32_t>(bank.tasks())}};
  const Strides strides{n * static_cast<int64_t>(grad.element_size()), 0,
                        bank.tasks() * static_cast<int64_t>(out.element_size())};
  if (dots_by_tables(wide, bank.tasks()))
    dot_by_tables(place, bank, dot, rows, strides);
  else
    dot_by_products(place, bank, dot, rows, strides);
  return out;
}

// ------------------------------------------------------------------------------------------------------------------- alpha_grad

Tensor alpha_grad_cuda(const Tensor& x_, const Tensor& grad_y_, const Tensor& weight_, std::vector<Tensor> blocks) {
  const Place place("alpha_grad", x_);
  place.check("grad_y", grad_y_);
  place.check("weight", weight_);
  const Tensor x = dense(x_), grad_y = dense(grad_y_), weight = dense(weight_);
  STD_TORCH_CHECK(x.dim() == 2 && grad_y.dim() == 2 && weight.dim() == 2 && x.size(0) == grad_y.size(0) &&
                      x.size(1) == weight.size(1) && grad_y.size(1) == weight.size(0),
                  "alpha_grad: x must be (B, I), grad_y (B, O) and weight (O, I)");
  const ScalarType dtype = floating(place, "x", x);
  const bool wide = dtype == ScalarType::Double || floating(place, "grad_y", grad_y) == ScalarType::Double ||
                    floating(place, "weight", weight) == ScalarType::Double;
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = grad_y.size(1), n = weight.numel();
  const Bank bank(place, blocks, n);
  Tensor out = place.empty({rows, bank.tasks()}, dtype_code(x));
  if (bank.tasks() == 0 || rows == 0) return out;
  const Sums sums{nullptr, out.mutable_data_ptr(), dtype, 1, static_cast<int32_t>(bank.tasks())};
  if (!wide && n > 0 && alpha_grad_multiplies(rows, bank.tasks())) {
    alpha_grad_by_products(place, bank,
                           {floats(x), floats(grad_y), floats(weight), rows, inputs, outputs, tiles(n), 0, 0, 0, 0, sums});
    return out;
  }
  const Dot dot{floats(x), floats(grad_y), floats(weight), n, tiles(n), inputs, outputs, 0, sums};
  const auto bytes = [](const Tensor& t) { return t.size(1) * static_cast<int64_t>(t.element_size()); };
  alpha_grad_by_tables(place, bank, dot, rows, {bytes(x), bytes(grad_y), bytes(out)}, wide);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("superpose", TORCH_BOX(&superpose_cuda));
  m.impl("superpose_counts", TORCH_BOX(&superpose_counts_cuda));
  m.impl("superpose_grad", TORCH_BOX(&superpose_grad_cuda));
  m.impl("alpha_grad", TORCH_BOX(&alpha_grad_cuda));
}
