// mixed_linear and its gradients: every row of a batch through the mask of its own task.
//
// Nothing here looks at the values of task_ids on the host, so all of it can be captured in a CUDA graph. An id that is no task
// of the bank opens nothing: its row of y and of dx is NaN, and it takes no part in dW.
#include "mixed_grad_weight.h"
#include "mixed_plain.h"
#include "mixed_product.h"
#include "mixed_tensor.h"

namespace {

// What the three ops share: checked arguments, made contiguous, and rows in groups.
struct Call {
  Place place;
  Tensor rows, other;  // x or grad (B, ...); the weight, or x for the weight's gradient
  Bank bank;           // may hold copies of blocks, to which the slots point
  int64_t count, outputs, inputs;
  Tensor scratch;

  Call(const char* op, const Tensor& rows_, const char* rows_name, const Tensor& other_, const char* other_name,
       const std::vector<Tensor>& bank_, const Tensor& task_ids, int64_t outputs_, int64_t inputs_)
      : place(op, rows_), bank(place, bank_, outputs_ * inputs_), count(rows_.size(0)), outputs(outputs_), inputs(inputs_) {
    with_float(op, rows_name, rows_.scalar_type(), [](auto) {});
    STD_TORCH_CHECK(other_.scalar_type() == rows_.scalar_type(), op, ": ", rows_name, " and ", other_name,
                    " must have one dtype");
    STD_TORCH_CHECK(task_ids.scalar_type() == ScalarType::Long && task_ids.dim() == 1 && task_ids.numel() == count, op,
                    ": task_ids must be int64 with one id for each of ", count, " rows, got ", task_ids.numel());
    constexpr int64_t kMostRows = 0x7fffffff;
    STD_TORCH_CHECK(count <= kMostRows, op, ": a batch may have at most ", kMostRows, " rows, got ", count);
    place.check(other_name, other_);
    place.check("task_ids", task_ids);
    rows = aligned(rows_), other = aligned(other_);
    if (count > 0) scratch = group_rows(place, bank, aligned(task_ids), static_cast<int>(count));
  }

  const Slot* slots() const { return count > 0 ? static_cast<const Slot*>(scratch.const_data_ptr()) : nullptr; }
};

dim3 blocks_for(int64_t threads) { return dim3(static_cast<unsigned>(ceil_div(threads, kThreads))); }

// y, or Transposed dx. Partial sums take at most 64 MB: a longer batch is taken in parts.
template <class T, bool Transposed>
void product(const Call& call, const Tensor* bias_, const Tensor& out_) {
  using Tile = Tile<Transposed>;
  const auto* rows = static_cast<const T*>(call.rows.const_data_ptr());
  const auto* weight = static_cast<const T*>(call.other.const_data_ptr());
  const auto* bias = bias_ ? static_cast<const T*>(bias_->const_data_ptr()) : nullptr;
  auto* out = static_cast<T*>(out_.mutable_data_ptr());
  const Place& place = call.place;
  const int64_t width = Transposed ? call.inputs : call.outputs, length = Transposed ? call.outputs : call.inputs;
  if constexpr (std::is_same_v<T, double>) {
    if constexpr (Transposed)
      place.launch(plain_grad_input_kernel<T>, blocks_for(call.count * width), kThreads, 0, rows, weight, call.slots(),
                   call.count, call.outputs, call.inputs, out);
    else
      place.launch(plain_forward_kernel<T>, blocks_for(call.count * width * kWarpSize), kThreads, 0, rows, weight, bias,
                   call.slots(), call.count, call.outputs, call.inputs, out);
  } else {
    constexpr int64_t kMostBytes = 64 << 20, kMostSlots = 8192;
    const int64_t across = ceil_div(width, Tile::kOutputs), lengths = ceil_div(length, Tile::kLength);
    const int64_t most = std::clamp<int64_t>(kMostBytes / std::max<int64_t>(1, lengths * width * 4), kBatch, kMostSlots);
    const int64_t part = std::min(call.count, most / kBatch * kBatch);
    const Tensor scratch = place.scratch(lengths * part * width * 4);
    auto* partial = static_cast<float*>(scratch.mutable_data_ptr());
    for (int64_t first = 0; first < call.count; first += part) {
      const int64_t count = std::min(part, call.count - first), batches = ceil_div(count, kBatch);
      // A few tiles are taken by several blocks each, which share the slots.
      const int64_t wanted = ceil_div(place.processors() * 4, std::max<int64_t>(1, across * lengths));
      const int64_t each = ceil_div(batches, std::min(wanted, batches)) * kBatch;
      void (*kernel)(const T*, const T*, const Slot*, int, int, int64_t, int64_t, float*);
      size_t shared;
      if constexpr (sizeof(T) == 2)
        kernel = tensor_kernel<T, Transposed>, shared = sizeof(TensorShared<Transposed>);
      else
        kernel = product_kernel<Transposed>, shared = sizeof(ProductShared<Transposed>);
      place.launch(
          kernel,
          dim3(static_cast<unsigned>(across), static_cast<unsigned>(lengths), static_cast<unsigned>(ceil_div(count, each))),
          kThreads, shared, rows, weight, call.slots() + first, static_cast<int>(count), static_cast<int>(each), call.outputs,
          call.inputs, partial);
      place.launch(finish_kernel<T>, dim3(blocks_for(width).x, static_cast<unsigned>(count)), kThreads, 0,
                   static_cast<const float*>(partial), lengths, call.slots() + first, bias, width, out);
    }
  }
}

Tensor mixed_linear_cuda(const Tensor& x, const Tensor& weight, std::vector<Tensor> bank, const Tensor& task_ids,
                         std::optional<Tensor> bias) {
  const char* op = "mixed_linear";
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), op, ": x must be (B, I) and weight (O, I)");
  const Call call(op, x, "x", weight, "weight", bank, task_ids, weight.size(0), weight.size(1));
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->numel() == call.outputs, op, ": bias must be (", call.outputs,
                    ",) in the dtype of weight, got ", bias->numel());
    call.place.check("bias", *bias);
    bias = aligned(*bias);
  }
  Tensor y = call.place.empty({call.count, call.outputs}, dtype_code(x));
  if (y.numel() == 0) return y;
  with_float(op, "x", x.scalar_type(), [&](auto zero) { product<decltype(zero), false>(call, bias ? &*bias : nullptr, y); });
  return y;
}

Tensor mixed_linear_grad_input_cuda(const Tensor& grad, const Tensor& weight, std::vector<Tensor> bank, const Tensor& task_ids) {
  const char* op = "mixed_linear_grad_input";
  STD_TORCH_CHECK(grad.dim() == 2 && weight.dim() == 2 && grad.size(1) == weight.size(0), op,
                  ": grad must be (B, O) and weight (O, I)");
  const Call call(op, grad, "grad", weight, "weight", bank, task_ids, weight.size(0), weight.size(1));
  Tensor out = call.place.empty({call.count, call.inputs}, dtype_code(grad));
  if (out.numel() == 0) return out;
  with_float(op, "grad", grad.scalar_type(), [&](auto zero) { product<decltype(zero), true>(call, nullptr, out); });
  return out;
}

Tensor mixed_linear_grad_weight_cuda(const Tensor& grad, const Tensor& x, std::vector<Tensor> bank, const Tensor& task_ids) {
  const char* op = "mixed_linear_grad_weight";
  STD_TORCH_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0), op, ": grad must be (B, O) and x (B, I)");
  const Call call(op, grad, "grad", x, "x", bank, task_ids, grad.size(1), x.size(1));
  Tensor out = call.place.empty({call.outputs, call.inputs}, dtype_code(grad));
  if (out.numel() == 0) return out;
  with_float(op, "grad", grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* g = static_cast<const T*>(call.rows.const_data_ptr());
    const auto* rows = static_cast<const T*>(call.other.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    if constexpr (std::is_same_v<T, double>) {
      call.place.launch(plain_grad_weight_kernel<T>, blocks_for(out.numel()), kThreads, 0, g, rows, call.slots(), call.count,
                        call.outputs, call.inputs, to);
    } else {
      const dim3 grid(static_cast<unsigned>(ceil_div(call.outputs, Tile<false>::kOutputs)),
                      static_cast<unsigned>(ceil_div(call.inputs, Tile<false>::kLength)));
      call.place.launch(grad_weight_kernel<T>, grid, kThreads, 0, g, rows, call.slots(), call.count, call.outputs, call.inputs,
                        to);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("mixed_linear", TORCH_BOX(&mixed_linear_cuda));
  m.impl("mixed_linear_grad_input", TORCH_BOX(&mixed_linear_grad_input_cuda));
  m.impl("mixed_linear_grad_weight", TORCH_BOX(&mixed_linear_grad_weight_cuda));
}
