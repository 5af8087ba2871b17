// mixed_linear and its gradients: every row of a batch through the mask of its own task.
#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "../bank.h"
#include "../floats.h"
#include "lanes.h"

namespace {

// Rows are sorted by task, so that a piece of a mask is shifted into place once for all rows of its task. A tile of the weight
// stays in the nearest cache while all rows pass by it: weights are read once, and so are the bits of the tasks in the batch.

constexpr int64_t kOutputs = 4;  // outputs that are taken together
constexpr int64_t kQuad = 4;     // rows of tasks of their own that are taken together
constexpr int64_t kStrip = 64;   // inputs that a word of bits covers
constexpr int64_t kPieces = kStrip / kLanes;
constexpr int64_t kSpan = 8;  // strips that gradients take together: a line of the bank, where rows of W begin at one
constexpr int64_t kSlack = kTileBytes / 2;  // pieces around those of an output (align_bits)
constexpr int64_t kOpenStride = kSpan * kPieces + kSlack;
constexpr int64_t kChunk = 8;  // outputs between two stores of their sums

// A task with this many rows has a product of its own, with its materialised weight. Measured for one task, float32, one thread,
// our time over that of materialising and multiplying: y .7 at 64 rows, .9 at 128 and 1.1 at 256 (256 x 256 weights), or .7, .9
// and .8 (1024 x 1024); dx 1 at 48 and 1.3 at 64; dW 1 from 96 on.
constexpr int64_t kDenseY = 128, kDenseGradX = 48, kDenseGradWeight = 128;

#define SK_TARGET
namespace portable {
#include "mixed_kernels.h"
}
#undef SK_TARGET
#define SK_TARGET SK_AVX2
namespace avx2 {
#include "mixed_kernels.h"
}
#undef SK_TARGET
#define SK_TARGET SK_AVX512
namespace avx512 {
#include "mixed_kernels.h"
}
#undef SK_TARGET

// The bits of n > 0 weights of one task from weight `first` on, in pieces from bit 0 on: the last four end in zeros. Lines of the
// bank are copied whole, which is faster than what of them is wanted, so that kSlack pieces before and after are written over.
static void align_bits(const Bank::Lines& lines, int64_t first, int64_t n, uint16_t* to) {
  const int64_t words = (n + 63) / 64, shift = first & 7, last = (first + n - 1) / kTile;
  auto* bytes = reinterpret_cast<uint8_t*>(to);
  uint8_t* at = bytes - first % kTile / 8;
  for (int64_t line = first / kTile; line <= last; line++, at += kTileBytes)
    std::memcpy(at, lines.first + line * lines.step, kTileBytes);
  if (shift)
    for (int64_t i = 0; i < words; i++) {
      const uint64_t high = bytes[8 * i + 8];
      store_word(bytes + 8 * i, load_word(bytes + 8 * i) >> shift | high << (64 - shift));
    }
  uint8_t* end = bytes + 8 * (words - 1);
  store_word(end, load_word(end) & low_bits(n - (words - 1) * 64));
}

// Rows sorted by task.
struct Group {
  int64_t task, begin, end;  // its rows: order[begin, end)
};
struct Batch {
  std::vector<int64_t> order;  // rows as the groups have them, those of small groups first
  std::vector<Group> small, large;
  int64_t rows = 0;  // of all small groups
};

static Batch group_rows(const char* op, const Tensor& task_ids, int64_t rows, int64_t tasks, int64_t dense_rows) {
  STD_TORCH_CHECK(task_ids.scalar_type() == ScalarType::Long && task_ids.dim() == 1 && task_ids.numel() == rows, op,
                  ": task_ids must be int64 with one id for each of ", rows, " rows, got ", task_ids.numel());
  const auto* ids = static_cast<const int64_t*>(task_ids.const_data_ptr());
  for (int64_t r = 0; r < rows; r++)
    STD_TORCH_CHECK(ids[r] >= 0 && ids[r] < tasks, op, ": task_ids must be between 0 and ", tasks - 1, ", got ", ids[r],
                    " for row ", r);
  Batch batch;
  batch.order.resize(rows);
  std::iota(batch.order.begin(), batch.order.end(), 0);
  std::stable_sort(batch.order.begin(), batch.order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  std::vector<Group> groups;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t task = ids[batch.order[r]];
    if (groups.empty() || groups.back().task != task) groups.push_back({task, r, r});
    groups.back().end = r + 1;
  }
  std::stable_partition(groups.begin(), groups.end(), [&](const Group& g) { return g.end - g.begin < dense_rows; });
  std::vector<int64_t> order;
  order.reserve(rows);
  for (Group& g : groups) {
    const int64_t begin = static_cast<int64_t>(order.size()), count = g.end - g.begin;
    order.insert(order.end(), batch.order.begin() + g.begin, batch.order.begin() + g.end);
    g.begin = begin, g.end = begin + count;
    if (count < dense_rows)
      batch.small.push_back(g), batch.rows = g.end;
    else
      batch.large.push_back(g);
  }
  batch.order = std::move(order);
  return batch;
}

// The rows of small groups as floats, `stride` apart, zeros after the row.
static Floats gather_rows(const Tensor& t, const Batch& batch, int64_t stride) {
  const int64_t width = t.size(1);
  const ScalarType dtype = t.scalar_type();
  Floats rows(batch.rows * stride);
  for (int64_t r = 0; r < batch.rows; r++)
    read_tile(dtype, t.const_data_ptr(), rows.data() + r * stride, batch.order[r] * width, width);
  return rows;
}

// The rows of a group as a tensor, and a tensor of a group's rows to where they belong.
static Tensor rows_of(const Tensor& t, const Batch& batch, const Group& g) {
  const int64_t sizes[] = {g.end - g.begin, t.size(1)}, bytes = sizes[1] * static_cast<int64_t>(t.element_size());
  Tensor out = new_dense(sizes, 2, dtype_code(t));
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto* from = static_cast<const uint8_t*>(t.const_data_ptr());
  for (int64_t r = g.begin; r < g.end; r++, to += bytes) std::memcpy(to, from + batch.order[r] * bytes, bytes);
  return out;
}
static void put_rows(const Tensor& rows_, const Batch& batch, const Group& g, Tensor& out) {
  const Tensor rows = dense(rows_);
  const int64_t bytes = out.size(1) * static_cast<int64_t>(out.element_size());
  const auto* from = static_cast<const uint8_t*>(rows.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  for (int64_t r = g.begin; r < g.end; r++, from += bytes) std::memcpy(to + batch.order[r] * bytes, from, bytes);
}

// W where the mask of a task is open.
static Tensor effective_weight(const Tensor& weight, const Bank::Lines& lines) {
  const int64_t n = weight.numel();
  const auto element = static_cast<int64_t>(weight.element_size());
  const ApplyKernel kernel = apply_kernel(weight.element_size());
  Tensor out = new_dense_like(weight, dtype_code(weight));
  const auto* from = static_cast<const uint8_t*>(weight.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  parallel(tiles(n), kGrain / kTile, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++)
      kernel(from + tile * kTile * element, lines.first + tile * lines.step, to + tile * kTile * element,
             std::min(kTile, n - tile * kTile));
  });
  return out;
}

static Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// What the three ops share: checked arguments, made contiguous.
struct Call {
  Tensor rows, other;  // x or grad (B, ...); the weight, or x for the weight's gradient
  Bank bank;
  Batch batch;
  ScalarType dtype;
  int64_t outputs, inputs;
};
static Call read_call(const char* op, const Tensor& rows, const char* rows_name, const Tensor& other, const char* other_name,
                      const std::vector<Tensor>& bank, const Tensor& task_ids, int64_t outputs, int64_t inputs,
                      int64_t dense_rows) {
  Call call{dense(rows), dense(other), read_bank(op, bank, outputs * inputs), {}, floating(op, rows_name, rows), outputs, inputs};
  STD_TORCH_CHECK(other.scalar_type() == call.dtype, op, ": ", rows_name, " and ", other_name, " must have one dtype");
  if (call.dtype == ScalarType::Double) dense_rows = 1;  // it has no kernel of its own
  call.batch = group_rows(op, dense(task_ids), rows.size(0), call.bank.tasks, dense_rows);
  return call;
}

// Blocks of work that a thread should have at least, each of so many multiplications.
static int64_t grain_of(int64_t products) { return std::max<int64_t>(1, 4 * kGrain / std::max<int64_t>(1, products)); }

// Rows that are left of groups, collected until there are kQuad of them. Their bits stay in slots, one a group, of which a
// collection in progress uses at most kQuad - 1.
constexpr int64_t kSlots = kQuad + 1;
struct Quad {
  const uint16_t* open[kQuad];
  const float* in[kQuad];
  float* out[kQuad];
  int64_t count = 0, slot = 0;

  // Whether the quad is full: it is then to be computed, and the next push starts another.
  bool push(const uint16_t* bits, const float* from, float* to) {
    open[count] = bits, in[count] = from, out[count] = to;
    count = (count + 1) % kQuad;
    return count == 0;
  }
  // On to the bits and the sums of the next kStrip inputs.
  void next_strip() {
    for (int64_t r = 0; r < kQuad; r++) open[r] += kPieces, out[r] += kStrip;
  }
  void next_slot() { slot = (slot + 1) % kSlots; }
};

// ---------------------------------------------------------------------------------------------------------------- mixed_linear

static void forward_small(const Call& call, const std::optional<Tensor>& bias, float* y) {
  const auto kernel = for_isa(portable::forward, avx2::forward, avx512::forward);
  const auto quad = for_isa(portable::forward_quad, avx2::forward_quad, avx512::forward_quad);
  const Batch& batch = call.batch;
  const int64_t inputs = call.inputs, outputs = call.outputs, words = (inputs + 63) / 64, stride = words * 64;
  const int64_t pieces = (inputs + kLanes - 1) / kLanes, open_stride = words * kPieces + kSlack, bits = kOutputs * open_stride;
  const Floats x = gather_rows(call.rows, batch, stride);
  Floats shift(outputs, 0.0f);
  if (bias) read_tile(bias->scalar_type(), bias->const_data_ptr(), shift.data(), 0, outputs);
  const bool in_place = call.dtype == ScalarType::Float;
  const void* weight = call.other.const_data_ptr();
  parallel((outputs + kOutputs - 1) / kOutputs, grain_of(kOutputs * inputs * batch.rows), [&](int64_t begin, int64_t end) {
    Floats tile(in_place ? 0 : kOutputs * inputs), sums(batch.rows * kOutputs);
    std::vector<uint16_t> open(kSlots * bits + kSlack, 0);
    for (int64_t block = begin; block < end; block++) {
      const int64_t o = block * kOutputs, here = std::min(kOutputs, outputs - o);
      const float* w = in_place ? static_cast<const float*>(weight) + o * inputs : tile.data();
      if (!in_place) read_tile(call.dtype, weight, tile.data(), o * inputs, here * inputs);
      if (here < kOutputs) std::fill(open.begin(), open.end(), 0);  // outputs that are not there are closed
      Quad rows;
      for (const Group& g : batch.small) {
        const Bank::Lines lines = call.bank.task(g.task);
        uint16_t* mine = open.data() + kSlack + rows.slot * bits;
        for (int64_t i = 0; i < here; i++) align_bits(lines, (o + i) * inputs, inputs, mine + i * open_stride);
        if (o + kOutputs < outputs)  // a task's lines lie far apart: nothing else fetches those of the next block
          for (int64_t line = (o + kOutputs) * inputs / kTile; line <= (o + 2 * kOutputs) * inputs / kTile; line++)
            __builtin_prefetch(lines.first + line * lines.step, 0, 2);
        const int64_t alone = here == kOutputs ? (g.end - g.begin) % kQuad : 0;
        kernel(w, inputs, mine, open_stride, x.data() + g.begin * stride, stride, g.end - g.begin - alone, pieces,
               sums.data() + g.begin * kOutputs);
        for (int64_t r = g.end - alone; r < g.end; r++)
          if (rows.push(mine, x.data() + r * stride, sums.data() + r * kOutputs))
            quad(w, inputs, rows.open, open_stride, rows.in, inputs, rows.out);
        if (alone) rows.next_slot();
      }
      for (int64_t r = 0; r < rows.count; r++)
        kernel(w, inputs, rows.open[r], open_stride, rows.in[r], stride, 1, pieces, rows.out[r]);
      for (int64_t r = 0; r < batch.rows; r++)
        for (int64_t i = 0; i < here; i++) y[batch.order[r] * outputs + o + i] = sums[r * kOutputs + i] + shift[o + i];
    }
  });
}

static Tensor mixed_linear_cpu(const Tensor& x, const Tensor& weight, std::vector<Tensor> bank, const Tensor& task_ids,
                               std::optional<Tensor> bias) {
  const char* op = "mixed_linear";
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), op, ": x must be (B, I) and weight (O, I)");
  const Call call = read_call(op, x, "x", weight, "weight", bank, task_ids, weight.size(0), weight.size(1), kDenseY);
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == call.dtype && bias->numel() == call.outputs, op, ": bias must be (", call.outputs,
                    ",) in the dtype of weight, got ", bias->numel());
    bias = dense(*bias);
  }
  const int64_t sizes[] = {x.size(0), call.outputs};
  Tensor y = new_dense(sizes, 2, dtype_code(x));
  if (y.numel() == 0) return y;
  if (call.inputs == 0) return linear(call.rows, call.other, bias);
  for (const Group& g : call.batch.large)
    put_rows(linear(rows_of(call.rows, call.batch, g), effective_weight(call.other, call.bank.task(g.task)), bias), call.batch, g,
             y);
  if (call.batch.small.empty()) return y;
  if (call.dtype == ScalarType::Float) {
    forward_small(call, bias, static_cast<float*>(y.mutable_data_ptr()));
  } else {
    Floats sums(y.numel());
    forward_small(call, bias, sums.data());
    for (int64_t r = 0; r < call.batch.rows; r++) {
      const int64_t at = call.batch.order[r] * call.outputs;
      write_tile(call.dtype, sums.data() + at, y.mutable_data_ptr(), at, call.outputs);
    }
  }
  return y;
}

// ---------------------------------------------------------------------------------------------------------
// mixed_linear_grad_input

static void grad_x_small(const Call& call, Tensor& out) {
  const auto kernel = for_isa(portable::grad_x, avx2::grad_x, avx512::grad_x);
  const auto quad = for_isa(portable::grad_x_quad, avx2::grad_x_quad, avx512::grad_x_quad);
  const Batch& batch = call.batch;
  const int64_t inputs = call.inputs, outputs = call.outputs, strips = (inputs + kStrip - 1) / kStrip;
  const Floats grad = gather_rows(call.rows, batch, outputs);
  const void* weight = call.other.const_data_ptr();
  void* to = out.mutable_data_ptr();
  constexpr int64_t kWide = kSpan * kStrip;
  parallel((strips + kSpan - 1) / kSpan, grain_of(outputs * kWide * batch.rows), [&](int64_t begin, int64_t end) {
    Floats sums(batch.rows * kWide), tile(kSpan * kChunk * kStrip);  // [strip][output][input of the strip]
    uint16_t open[kSlack + kSlots * kChunk * kOpenStride];
    for (int64_t span = begin; span < end; span++) {
      const int64_t first = span * kWide, wide = std::min(kWide, inputs - first), here = (wide + kStrip - 1) / kStrip;
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t o = 0; o < outputs; o += kChunk) {
        const int64_t count = std::min(kChunk, outputs - o);
        for (int64_t i = 0; i < count; i++)
          for (int64_t s = 0; s < here; s++)
            read_tile(call.dtype, weight, tile.data() + (s * kChunk + i) * kStrip, (o + i) * inputs + first + s * kStrip,
                      std::min(kStrip, wide - s * kStrip));
        Quad rows;
        for (const Group& g : batch.small) {
          const Bank::Lines lines = call.bank.task(g.task);
          uint16_t* mine = open + kSlack + rows.slot * kChunk * kOpenStride;
          for (int64_t i = 0; i < count; i++) align_bits(lines, (o + i) * inputs + first, wide, mine + i * kOpenStride);
          const int64_t alone = (g.end - g.begin) % kQuad;
          for (int64_t s = 0; s < here; s++)
            kernel(tile.data() + s * kChunk * kStrip, mine + s * kPieces, count, grad.data() + g.begin * outputs + o, outputs,
                   g.end - g.begin - alone, sums.data() + g.begin * kWide + s * kStrip, kWide);
          for (int64_t r = g.end - alone; r < g.end; r++)
            if (rows.push(mine, grad.data() + r * outputs + o, sums.data() + r * kWide))
              for (int64_t s = 0; s < here; s++, rows.next_strip())
                quad(tile.data() + s * kChunk * kStrip, rows.open, count, rows.in, rows.out);
          if (alone) rows.next_slot();
        }
        for (int64_t r = 0; r < rows.count; r++)
          for (int64_t s = 0; s < here; s++)
            kernel(tile.data() + s * kChunk * kStrip, rows.open[r] + s * kPieces, count, rows.in[r], outputs, 1,
                   rows.out[r] + s * kStrip, kWide);
      }
      for (int64_t r = 0; r < batch.rows; r++)
        write_tile(call.dtype, sums.data() + r * kWide, to, batch.order[r] * inputs + first, wide);
    }
  });
}

static Tensor mixed_linear_grad_input_cpu(const Tensor& grad, const Tensor& weight, std::vector<Tensor> bank,
                                          const Tensor& task_ids) {
  const char* op = "mixed_linear_grad_input";
  STD_TORCH_CHECK(grad.dim() == 2 && weight.dim() == 2 && grad.size(1) == weight.size(0), op,
                  ": grad must be (B, O) and weight (O, I)");
  const Call call = read_call(op, grad, "grad", weight, "weight", bank, task_ids, weight.size(0), weight.size(1), kDenseGradX);
  const int64_t sizes[] = {grad.size(0), call.inputs};
  Tensor out = new_dense(sizes, 2, dtype_code(grad));
  if (out.numel() == 0) return out;
  for (const Group& g : call.batch.large) {
    const Tensor product =
        torch::stable::matmul(rows_of(call.rows, call.batch, g), effective_weight(call.other, call.bank.task(g.task)));
    put_rows(product, call.batch, g, out);
  }
  if (!call.batch.small.empty()) grad_x_small(call, out);
  return out;
}

// ---------------------------------------------------------------------------------------------------- mixed_linear_grad_weight

// sum[i] += product[i] where open, for one tile.
template <class T>
static void add_open(const T* product, const uint8_t* bits, T* sum, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (is_open(bits, i)) sum[i] += product[i];
}

// The products of a large group, added where its mask is open.
template <class T>
static void add_large(const Call& call, const Group& g, T* sums) {
  const Tensor product = dense(torch::stable::matmul(torch::stable::transpose(rows_of(call.rows, call.batch, g), 0, 1),
                                                     rows_of(call.other, call.batch, g)));
  const Bank::Lines lines = call.bank.task(g.task);
  const int64_t n = product.numel();
  parallel(tiles(n), kGrain / kTile, [&](int64_t begin, int64_t end) {
    T buffer[kTile];
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t at = tile * kTile, count = std::min(kTile, n - at);
      read_tile(call.dtype, product.const_data_ptr(), buffer, at, count);
      add_open(buffer, lines.first + tile * lines.step, sums + at, count);
    }
  });
}

static void grad_weight_small(const Call& call, float* sums) {
  const auto kernel = for_isa(portable::grad_weight, avx2::grad_weight, avx512::grad_weight);
  const Batch& batch = call.batch;
  const int64_t inputs = call.inputs, outputs = call.outputs, strips = (inputs + kStrip - 1) / kStrip, wide = strips * kStrip;
  const int64_t blocks = (outputs + kOutputs - 1) / kOutputs, groups = static_cast<int64_t>(batch.small.size());
  const Floats grad = gather_rows(call.rows, batch, blocks * kOutputs);
  Floats x(wide * batch.rows);  // [strip][row][input of the strip]
  for (int64_t r = 0; r < batch.rows; r++)
    for (int64_t s = 0; s < strips; s++)
      read_tile(call.dtype, call.other.const_data_ptr(), x.data() + (s * batch.rows + r) * kStrip,
                batch.order[r] * inputs + s * kStrip, std::min(kStrip, inputs - s * kStrip));
  std::vector<int64_t> ends;
  for (const Group& g : batch.small) ends.push_back(g.end);
  parallel(blocks, grain_of(kOutputs * inputs * batch.rows), [&](int64_t begin, int64_t end) {
    Floats tile(kOutputs * wide);
    std::vector<uint16_t> open(kSlack + groups * kOutputs * kOpenStride, 0);  // [group][output][strip][piece]
    for (int64_t block = begin; block < end; block++) {
      const int64_t o = block * kOutputs, here = std::min(kOutputs, outputs - o);
      if (here < kOutputs) std::fill(open.begin(), open.end(), 0);
      for (int64_t i = 0; i < here; i++) std::copy_n(sums + (o + i) * inputs, inputs, tile.data() + i * wide);
      for (int64_t first = 0; first < inputs; first += kSpan * kStrip) {
        const int64_t n = std::min(kSpan * kStrip, inputs - first), span = (n + kStrip - 1) / kStrip;
        for (int64_t g = 0; g < groups; g++) {
          const Bank::Lines lines = call.bank.task(batch.small[g].task);
          for (int64_t i = 0; i < here; i++)
            align_bits(lines, (o + i) * inputs + first, n, open.data() + kSlack + (g * kOutputs + i) * kOpenStride);
        }
        for (int64_t s = 0; s < span; s++)
          kernel(x.data() + (first / kStrip + s) * batch.rows * kStrip, grad.data() + o, blocks * kOutputs,
                 open.data() + kSlack + s * kPieces, ends.data(), groups, tile.data() + first + s * kStrip, wide);
      }
      for (int64_t i = 0; i < here; i++) std::copy_n(tile.data() + i * wide, inputs, sums + (o + i) * inputs);
    }
  });
}

static Tensor mixed_linear_grad_weight_cpu(const Tensor& grad, const Tensor& x, std::vector<Tensor> bank,
                                           const Tensor& task_ids) {
  const char* op = "mixed_linear_grad_weight";
  STD_TORCH_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0), op, ": grad must be (B, O) and x (B, I)");
  const Call call = read_call(op, grad, "grad", x, "x", bank, task_ids, grad.size(1), x.size(1), kDenseGradWeight);
  const int64_t sizes[] = {call.outputs, call.inputs}, n = call.outputs * call.inputs;
  Tensor out = new_dense(sizes, 2, dtype_code(grad));
  if (n == 0) return out;
  if (call.dtype == ScalarType::Double) {
    auto* sums = static_cast<double*>(out.mutable_data_ptr());
    std::fill_n(sums, n, 0.0);
    for (const Group& g : call.batch.large) add_large(call, g, sums);
    return out;
  }
  Floats buffer(call.dtype == ScalarType::Float ? 0 : n);
  float* sums = buffer.empty() ? static_cast<float*>(out.mutable_data_ptr()) : buffer.data();
  std::fill_n(sums, n, 0.0f);
  for (const Group& g : call.batch.large) add_large(call, g, sums);
  if (!call.batch.small.empty()) grad_weight_small(call, sums);
  if (!buffer.empty()) write_tile(call.dtype, sums, out.mutable_data_ptr(), 0, n);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("mixed_linear", TORCH_BOX(&mixed_linear_cpu));
  m.impl("mixed_linear_grad_input", TORCH_BOX(&mixed_linear_grad_input_cpu));
  m.impl("mixed_linear_grad_weight", TORCH_BOX(&mixed_linear_grad_weight_cpu));
}
