// alpha_grad by products of matrices:
// out[b, k] = sum_o grad_y[b, o] sum_i (W * M_k)[o, i] x[b, i]: for many rows a matrix product a task, of a weight whose closed
// elements are replaced by zeros on the way to shared memory. A block takes 64 outputs and the rows, sixteen inputs at a time;
// every 32 inputs their sums are multiplied by grad_y and added in float64, so that no long sum of floats is taken.
//
// A block's share is a range of units, a unit 64 outputs and a range of inputs.
#include "superpose.h"

namespace superposition {
namespace {

constexpr int kDotThreads = 128;
constexpr int kOutputs = 64, kInputs = 16;  // of a step
constexpr int kStepsAFold = 2;
constexpr int kRowThreads = 16;  // threads side by side along the rows; 8 along the outputs

// Eight bits of a task from any weight on, in the two bytes that hold them. Those of weights that are not there may be any.
struct EightBits {
  uint8_t low, high;
  int shift;
  __device__ __forceinline__ void load_from(const TaskLines& line, int64_t all_tiles, int64_t at) {
    const auto byte_at = [&](int64_t byte) { return __ldg(line.first + byte / kTileBytes * line.step + byte % kTileBytes); };
    low = byte_at(at / 8);
    high = byte_at(min(at / 8 + 1, all_tiles * kTileBytes - 1));
    shift = static_cast<int>(at % 8);
  }
  __device__ __forceinline__ unsigned get() const { return (low | unsigned{high} << 8) >> shift; }
};

// Blocks of 128 rows on a processor. From sm_100 on two products are one instruction, which wants registers in pairs: three
// blocks would spill there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kProductBlocks = 2;
#else
constexpr int kProductBlocks = 3;
#endif

template <int RowsEach, class Table>
__global__ void __launch_bounds__(kDotThreads, RowsEach > 4 ? kProductBlocks : 4)
    alpha_grad_kernel(const __grid_constant__ Table bank, const Products a) {
  constexpr int kRows = kRowThreads * RowsEach, kEach = kInputs * kRows / kDotThreads;  // numbers of x that a thread fetches
  constexpr int kPack = RowsEach < 4 ? RowsEach : 4;
  using Four = Pack<float, 4>;
  using Some = Pack<float, kPack>;
  alignas(16) __shared__ float weights[2][kInputs][kOutputs + 4];
  alignas(16) __shared__ float xs[2][kInputs][kRows + 4];
  __shared__ double redone[kWarpSize];
  __shared__ bool strange[kRows];

  const int task = static_cast<int>(blockIdx.x % bank.tasks), part = static_cast<int>(blockIdx.y);
  const int64_t first_row = int64_t{blockIdx.x / bank.tasks} * kRows;
  const TaskLines line = bank.task(task);
  const int64_t begin = part * a.units_a_part, end = min(a.units, begin + a.units_a_part);

  // What this thread fetches: eight inputs of one output, and kEach inputs of one row.
  const int fetch_output = threadIdx.x % kOutputs, fetch_input = threadIdx.x / kOutputs * 8;
  const int fetch_row = threadIdx.x % kRows, fetch_x = threadIdx.x / kRows * kEach;
  // What it sums: outputs 4 lane and 32 + 4 lane and on, and rows kPack of every 16 kPack.
  const int lane = threadIdx.x % 8, place = threadIdx.x / 8;
  const auto row_of = [&](int r) { return r / kPack * (kRowThreads * kPack) + place * kPack + r % kPack; };

  double total[RowsEach] = {};
  float sum[RowsEach][8];
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t first_output = unit / a.input_ranges * kOutputs, first_input = unit % a.input_ranges * a.inputs_a_range;
    const int64_t last_input = min(a.inputs, first_input + a.inputs_a_range);
    const int steps = static_cast<int>(last_input - first_input + kInputs - 1) / kInputs;
    float next_weights[8], next_xs[kEach];
    EightBits next_open;
    const auto fetch = [&](int step) {
      const int64_t output = first_output + fetch_output, input = first_input + step * kInputs + fetch_input;
      const int64_t left = output < a.outputs ? last_input - input : 0;
      load<8>(a.weight, output * a.inputs + input, left, next_weights);
      next_open.load_from(line, a.tiles, left > 0 ? output * a.inputs + input : 0);
      const int64_t row = first_row + fetch_row, from = first_input + step * kInputs + fetch_x;
      load<kEach>(a.x, row * a.inputs + from, row < a.rows ? last_input - from : 0, next_xs);
    };
    fetch(0);
#pragma unroll
    for (int r = 0; r < RowsEach; r++)
#pragma unroll
      for (int o = 0; o < 8; o++) sum[r][o] = 0;
    for (int step = 0; step < steps; step++) {
      // Two buffers: who still reads the one of the step before last has not passed the last step's barrier.
      float (*w)[kOutputs + 4] = weights[step % 2];
      float (*x)[kRows + 4] = xs[step % 2];
      const unsigned open = next_open.get();
#pragma unroll
      for (int i = 0; i < 8; i++) w[fetch_input + i][fetch_output] = open >> i & 1 ? next_weights[i] : 0;
#pragma unroll
      for (int i = 0; i < kEach; i++) x[fetch_x + i][fetch_row] = next_xs[i];
      __syncthreads();
      if (step + 1 < steps) fetch(step + 1);
#pragma unroll
      for (int i = 0; i < kInputs; i++) {
        float mine[8], rows[RowsEach];
#pragma unroll
        for (int o = 0; o < 8; o += 4) {
          const Four four = *reinterpret_cast<const Four*>(&w[i][o * 8 + lane * 4]);
#pragma unroll
          for (int j = 0; j < 4; j++) mine[o + j] = four.v[j];
        }
#pragma unroll
        for (int r = 0; r < RowsEach; r += kPack) {
          const Some some = *reinterpret_cast<const Some*>(&x[i][row_of(r)]);
#pragma unroll
          for (int j = 0; j < kPack; j++) rows[r + j] = some.v[j];
        }
#pragma unroll
        for (int r = 0; r < RowsEach; r++)
#pragma unroll
          for (int o = 0; o < 8; o++) sum[r][o] += mine[o] * rows[r];
      }
      if (step % kStepsAFold == kStepsAFold - 1 || step + 1 == steps) {
#pragma unroll
        for (int r = 0; r < RowsEach; r++) {
          const int64_t row = first_row + row_of(r);
          float folded = 0;
#pragma unroll
          for (int o = 0; o < 8; o += 4) {
            const int64_t output = first_output + o * 8 + lane * 4;
            float grad[4];
            load<4>(a.grad_y, row * a.outputs + output, row < a.rows ? a.outputs - output : 0, grad);
#pragma unroll
            for (int j = 0; j < 4; j++) folded += grad[j] * sum[r][o + j], sum[r][o + j] = 0;
          }
          total[r] += static_cast<double>(folded);
        }
      }
    }
    __syncthreads();  // the next unit begins with either buffer
  }

#pragma unroll
  for (int r = 0; r < RowsEach; r++) {
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) total[r] += __shfl_xor_sync(kAllLanes, total[r], offset);
    const int64_t row = first_row + row_of(r);
    if (lane == 0) {
      strange[row_of(r)] = row < a.rows && !(total[r] - total[r] == 0);
      if (row < a.rows) a.sums.put(row, part, task, total[r]);
    }
  }
  // Zero times an infinite x or grad_y is NaN, though the weight is closed: such sums are taken again, of open weights alone.
  __syncthreads();
  for (int i = 0; i < kRows; i++) {
    if (!strange[i]) continue;
    const int64_t row = first_row + i;
    double sum_again = 0;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t first_output = unit / a.input_ranges * kOutputs, first_input = unit % a.input_ranges * a.inputs_a_range;
      const int64_t last_output = min(a.outputs, first_output + kOutputs),
                    last_input = min(a.inputs, first_input + a.inputs_a_range);
      for (int64_t output = first_output; output < last_output; output++)
        for (int64_t input = first_input + threadIdx.x; input < last_input; input += kDotThreads) {
          const int64_t at = output * a.inputs + input;
          EightBits open;
          open.load_from(line, a.tiles, at);
          if (!(open.get() & 1)) continue;
          sum_again += load_one<double>(a.weight, at) * load_one<double>(a.x, row * a.inputs + input) *
                       load_one<double>(a.grad_y, row * a.outputs + output);
        }
    }
    sum_again = block_sum(sum_again, redone);
    if (threadIdx.x == 0) a.sums.put(row, part, task, sum_again);
  }
}

template <int RowsEach>
void alpha_grad_products(const Place& place, const Bank& bank, Products a) {
  constexpr int64_t kFold = kInputs * kStepsAFold;
  const int64_t row_blocks = ceil_div(a.rows, kRowThreads * RowsEach);
  // A product whose inputs are many is divided along them too, in ranges of about 256.
  a.inputs_a_range = ceil_div(ceil_div(a.inputs, ceil_div(a.inputs, 256)), kFold) * kFold;
  a.input_ranges = ceil_div(a.inputs, a.inputs_a_range);
  a.units = ceil_div(a.outputs, kOutputs) * a.input_ranges;
  const int64_t wanted = std::clamp<int64_t>(ceil_div(place.processors() * 8, bank.tasks() * row_blocks), 1, a.units);
  a.units_a_part = ceil_div(a.units, wanted);
  a.sums.parts = static_cast<int32_t>(ceil_div(a.units, a.units_a_part));
  const Tensor scratch = place.scratch(a.sums.parts == 1 ? 0 : a.rows * a.sums.parts * bank.tasks() * 8);
  a.sums.partial = static_cast<double*>(scratch.mutable_data_ptr());
  bank.with_table([&](const auto& table) {
    place.launch(alpha_grad_kernel<RowsEach, std::decay_t<decltype(table)>>,
                 dim3(static_cast<unsigned>(bank.tasks() * row_blocks), static_cast<unsigned>(a.sums.parts)), kDotThreads, 0,
                 table, a);
  });
  add_parts(place, a.sums, a.rows);
}

}  // namespace

void alpha_grad_by_products(const Place& place, const Bank& bank, const Products& products) {
  if (products.rows > 32)
    alpha_grad_products<8>(place, bank, products);
  else
    alpha_grad_products<2>(place, bank, products);
}

}  // namespace superposition
