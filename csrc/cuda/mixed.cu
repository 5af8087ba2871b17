// mixed_linear and its gradients: every row of a batch through the mask of its own task.
//
// Nothing here looks at the values of task_ids on the host, so all of it can be captured in a CUDA graph. An id that is no task
// of the bank opens nothing: its row of y and of dx is NaN, and it takes no part in dW.
#include "bank.h"

namespace {

// ------------------------------------------------------------------------------------------------------------------- grouping

// A row of the batch; the kernels take them sorted by task, so that the rows of a task find its bits in the caches.
struct Slot {
  const uint8_t* bits;  // its task's, as TaskLines; null for an id that is no task
  int64_t step;
  int32_t row;

  __device__ bool is_open(int64_t weight) const {
    return bits != nullptr && bits[(weight >> 9) * step + (weight >> 3 & 63)] >> (weight & 7) & 1;
  }
};
struct Keyed {
  int32_t key, row;
};

constexpr int kFew = 256;  // rows that are ranked by comparing each with each
constexpr int kSorters = 1024;
constexpr int kDigit = 8, kDigits = 1 << kDigit;  // bits that a pass sorts by

template <class Table>
__device__ int key_of(const Table& bank, int64_t id) {
  return id >= 0 && id < bank.tasks ? static_cast<int>(id) : bank.tasks;
}
template <class Table>
__device__ Slot slot_of(const Table& bank, int key, int row) {
  if (key == bank.tasks) return {nullptr, 0, row};
  const TaskLines lines = bank.task(key);
  return {lines.first, lines.step, row};
}

template <class Table>
__global__ void __launch_bounds__(kFew)
    group_few_kernel(const __grid_constant__ Table bank, const int64_t* ids, int n, Slot* slots) {
  __shared__ int keys[kFew];
  const int row = threadIdx.x;
  const int key = row < n ? key_of(bank, ids[row]) : 0;
  keys[row] = key;
  __syncthreads();
  if (row >= n) return;
  int rank = 0;
  for (int i = 0; i < n; i++) rank += keys[i] < key || (keys[i] == key && i < row);
  slots[rank] = slot_of(bank, key, row);
}

// A stable radix sort by one block: rows of a task stay in order. `from` and `to` change places with every pass.
template <class Table>
__global__ void __launch_bounds__(kSorters) group_many_kernel(const __grid_constant__ Table bank, const int64_t* ids, int n,
                                                              int passes, Keyed* from, Keyed* to, Slot* slots) {
  constexpr int kWarps = kSorters / kWarpSize;
  __shared__ int base[kDigits], counts[kWarps][kDigits];
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  for (int pass = 0; pass < passes; pass++) {
    const auto read = [&](int i) { return pass == 0 ? Keyed{key_of(bank, ids[i]), i} : from[i]; };
    const auto digit_of = [&](const Keyed& k) { return k.key >> pass * kDigit & (kDigits - 1); };
    if (thread < kDigits) base[thread] = 0;
    __syncthreads();
    for (int i = thread; i < n; i += kSorters) atomicAdd(&base[digit_of(read(i))], 1);
    __syncthreads();
    if (warp == 0) {  // where the rows of each digit begin
      constexpr int kEach = kDigits / kWarpSize;
      int total = 0;
      for (int i = 0; i < kEach; i++) total += base[lane * kEach + i];
      int before = total;
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, before, offset);
        if (lane >= offset) before += other;
      }
      before -= total;
      for (int i = 0; i < kEach; i++) {
        const int count = base[lane * kEach + i];
        base[lane * kEach + i] = before;
        before += count;
      }
    }
    for (int begin = 0; begin < n; begin += kSorters) {
      for (int i = thread; i < kWarps * kDigits; i += kSorters) (&counts[0][0])[i] = 0;
      __syncthreads();
      const bool inside = n - begin > thread;
      const Keyed mine = inside ? read(begin + thread) : Keyed{};
      const int digit = inside ? digit_of(mine) : kDigits;
      const unsigned same = __match_any_sync(kAllLanes, digit);
      const int rank = __popc(same & ((1u << lane) - 1));
      if (inside && rank == 0) counts[warp][digit] = __popc(same);
      __syncthreads();
      if (thread < kDigits) {  // where those of each warp begin
        int next = base[thread];
        for (int w = 0; w < kWarps; w++) {
          const int count = counts[w][thread];
          counts[w][thread] = next;
          next += count;
        }
        base[thread] = next;
      }
      __syncthreads();
      if (inside) {
        const int at = counts[warp][digit] + rank;
        if (pass + 1 == passes)
          slots[at] = slot_of(bank, mine.key, mine.row);
        else
          to[at] = mine;
      }
      __syncthreads();
    }
    Keyed* const before = from;
    from = to;
    to = before;
  }
}

// The slots of a batch; they lie in scratch memory.
Tensor group_rows(const Place& place, const Bank& bank, const Tensor& task_ids, int n) {
  constexpr int64_t kAlign = 512;
  const int64_t slot_bytes = ceil_div(n * sizeof(Slot), kAlign) * kAlign, keyed_bytes = n > kFew ? n * sizeof(Keyed) : 0;
  Tensor scratch = place.scratch(slot_bytes + 2 * keyed_bytes);
  auto* at = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  auto* slots = reinterpret_cast<Slot*>(at);
  auto* keyed = reinterpret_cast<Keyed*>(at + slot_bytes);
  const auto* ids = static_cast<const int64_t*>(task_ids.const_data_ptr());
  bank.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    if (n <= kFew) {
      place.launch(group_few_kernel<Table>, 1, kFew, 0, table, ids, n, slots);
    } else {
      int passes = 1;
      while (bank.tasks() >> passes * kDigit) passes++;
      place.launch(group_many_kernel<Table>, 1, kSorters, 0, table, ids, n, passes, keyed, keyed + n, slots);
    }
  });
  return scratch;
}

// ---------------------------------------------------------------------------------------------------------------------- plain

__device__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// float64 has kernels that do no more than add up: a thread an element of dx or dW, a warp an element of y.

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) plain_forward_kernel(const T* x, const T* weight, const T* bias, const Slot* slots,
                                                                 int64_t rows, int64_t outputs, int64_t inputs, T* y) {
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (item >= rows * outputs) return;
  const Slot slot = slots[item / outputs];
  const int64_t o = item % outputs, row = slot.row;
  Wide<T> sum = 0;
  for (int64_t i = lane; i < inputs; i += kWarpSize) {
    const Wide<T> w = slot.is_open(o * inputs + i) ? static_cast<Wide<T>>(weight[o * inputs + i]) : Wide<T>(0);
    sum = multiply_add(w, static_cast<Wide<T>>(x[row * inputs + i]), sum);
  }
  sum = warp_sum(sum);
  if (bias != nullptr) sum += static_cast<Wide<T>>(bias[o]);
  if (slot.bits == nullptr) sum = NAN;
  if (lane == 0) y[row * outputs + o] = static_cast<T>(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) plain_grad_input_kernel(const T* grad, const T* weight, const Slot* slots,
                                                                    int64_t rows, int64_t outputs, int64_t inputs, T* out) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= rows * inputs) return;
  const Slot slot = slots[item / inputs];
  const int64_t i = item % inputs, row = slot.row;
  Wide<T> sum = 0;
  for (int64_t o = 0; o < outputs; o++) {
    const Wide<T> w = slot.is_open(o * inputs + i) ? static_cast<Wide<T>>(weight[o * inputs + i]) : Wide<T>(0);
    sum = multiply_add(static_cast<Wide<T>>(grad[row * outputs + o]), w, sum);
  }
  out[row * inputs + i] = static_cast<T>(slot.bits == nullptr ? Wide<T>(NAN) : sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) plain_grad_weight_kernel(const T* grad, const T* x, const Slot* slots, int64_t rows,
                                                                     int64_t outputs, int64_t inputs, T* out) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= outputs * inputs) return;
  const int64_t o = item / inputs, i = item % inputs;
  Wide<T> sum = 0;
  for (int64_t s = 0; s < rows; s++) {
    const Slot slot = slots[s];
    if (slot.is_open(item))
      sum = multiply_add(static_cast<Wide<T>>(grad[slot.row * outputs + o]), static_cast<Wide<T>>(x[slot.row * inputs + i]), sum);
  }
  out[item] = static_cast<T>(sum);
}

// ------------------------------------------------------------------------------------------------------------------------- ops

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
  with_float(op, "x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    call.place.launch(plain_forward_kernel<T>, blocks_for(y.numel() * kWarpSize), kThreads, 0,
                      static_cast<const T*>(call.rows.const_data_ptr()), static_cast<const T*>(call.other.const_data_ptr()),
                      bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr, call.slots(), call.count, call.outputs,
                      call.inputs, static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

Tensor mixed_linear_grad_input_cuda(const Tensor& grad, const Tensor& weight, std::vector<Tensor> bank, const Tensor& task_ids) {
  const char* op = "mixed_linear_grad_input";
  STD_TORCH_CHECK(grad.dim() == 2 && weight.dim() == 2 && grad.size(1) == weight.size(0), op,
                  ": grad must be (B, O) and weight (O, I)");
  const Call call(op, grad, "grad", weight, "weight", bank, task_ids, weight.size(0), weight.size(1));
  Tensor out = call.place.empty({call.count, call.inputs}, dtype_code(grad));
  if (out.numel() == 0) return out;
  with_float(op, "grad", grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    call.place.launch(plain_grad_input_kernel<T>, blocks_for(out.numel()), kThreads, 0,
                      static_cast<const T*>(call.rows.const_data_ptr()), static_cast<const T*>(call.other.const_data_ptr()),
                      call.slots(), call.count, call.outputs, call.inputs, static_cast<T*>(out.mutable_data_ptr()));
  });
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
    call.place.launch(plain_grad_weight_kernel<T>, blocks_for(out.numel()), kThreads, 0,
                      static_cast<const T*>(call.rows.const_data_ptr()), static_cast<const T*>(call.other.const_data_ptr()),
                      call.slots(), call.count, call.outputs, call.inputs, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("mixed_linear", TORCH_BOX(&mixed_linear_cuda));
  m.impl("mixed_linear_grad_input", TORCH_BOX(&mixed_linear_grad_input_cuda));
  m.impl("mixed_linear_grad_weight", TORCH_BOX(&mixed_linear_grad_weight_cuda));
}
