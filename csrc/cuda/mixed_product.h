// y and dx of mixed rows in float32.
//
// A thread has 16 weights that are multiplied and added, for each of 4 outputs. For 4096 x 4096 weights and 64 rows, 2^30 weights
// and rows meet. A row costs a thread 64 FFMA, each under a predicate, 28 instructions, of them 16 R2P, to make predicates of its
// 64 bits, and some 110 to load, to add up and to loop: 3.1 a weight. An H100 issues 33 T a second: 100 us. The bytes of 64 tasks
// (134 MB) and of W take 50 us, in parallel.
#pragma once
#include "mixed_tiles.h"

namespace {

// The sums of a thread's 16 weights for each of its 4 outputs. A closed weight that meets a finite x adds nothing and is passed
// over; with Select it adds zero times x, which an infinite x makes NaN. Output by output, so that R2P can make predicates of 7
// bits at a time; in two sums, so that an FFMA need not wait for the one before.
template <bool Select>
__device__ void multiply(const float (&w)[kOwn][kRun], const float (&x)[kRun], const unsigned (&bits)[kOwn], float (&sum)[kOwn]) {
#pragma unroll
  for (int r = 0; r < kOwn; r++) {
    float part[2] = {};
#pragma unroll
    for (int j = 0; j < kRun; j++) {
      const bool open = bits[r] & 1u << j;
      if constexpr (Select)
        part[j % 2] = multiply_add(open ? w[r][j] : 0.0f, x[j], part[j % 2]);
      else if (open)
        part[j % 2] = multiply_add(w[r][j], x[j], part[j % 2]);
    }
    sum[r] = part[0] + part[1];
  }
}

// Adds up the 4 sums of 4 lanes: lane l gets that of output l % 4.
__device__ float sum_lanes(const float (&sum)[kOwn], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  const float a = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(kAllLanes, odd ? sum[0] : sum[1], 1);
  const float b = (odd ? sum[3] : sum[2]) + __shfl_xor_sync(kAllLanes, odd ? sum[2] : sum[3], 1);
  return (upper ? b : a) + __shfl_xor_sync(kAllLanes, upper ? a : b, 2);
}

// y, or Transposed dx, before it is summed over blockIdx.y: partial (lengths, slots, all outputs of the sum). A block takes
// `each` slots.
template <bool Transposed>
struct ProductShared {
  Flow<float, Transposed> flow;
  float sums[2][kBatch][kThreads];
};

// Two blocks a multiprocessor are worth the few bytes of a thread that spill in dx in product_kernel.
template <bool Transposed>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(const float* rows, const float* weight, const Slot* slots, int count, int each, int64_t outputs,
                   int64_t inputs, float* partial) {
  using Tile = Tile<Transposed>;
  using Flow = Flow<float, Transposed>;
  SK_DYNAMIC_SHARED(ProductShared<Transposed>, shared);
  Flow& flow = shared->flow;
  const Tile tile;
  const int64_t out = int64_t{blockIdx.x} * Tile::kOutputs, along = int64_t{blockIdx.y} * Tile::kLength;
  const int64_t width = Transposed ? inputs : outputs, length = Transposed ? outputs : inputs;
  const int64_t o = Transposed ? along : out, i = Transposed ? out : along;
  const int begin = blockIdx.z * each;
  const Source<float, Transposed> source(flow, slots + begin, min(count - begin, each), rows, along, length, o, i, outputs,
                                         inputs);

  float w[kOwn][kRun];
#pragma unroll
  for (int r = 0; r < kOwn; r++) {
    const int64_t n = out + tile.output(r), k = along + tile.lane * kRun;
    if constexpr (Transposed) {
#pragma unroll
      for (int j = 0; j < kRun; j++) w[r][j] = n < width && k + j < length ? weight[(k + j) * inputs + n] : 0.0f;
    } else {
      load_run(weight + n * inputs + k, n < width ? length - k : 0, inputs % 8 == 0, w[r]);
    }
  }
  // The sums of batch b, while the next is in work.
  const int own_slot = threadIdx.x / Tile::kOutputs, own_output = threadIdx.x % Tile::kOutputs;
  float* to = partial + (int64_t{blockIdx.y} * count + begin + own_slot) * width + out + own_output;
  const bool there = out + own_output < width;
  const auto put = [&](unsigned b) {
#pragma unroll
    for (int k = 0; k < kBatch; k += kThreads / Tile::kOutputs, to += kThreads / Tile::kOutputs * width)
      if (there && static_cast<int>(b) * kBatch + k + own_slot < source.count)
        *to = Tile::sum_parts(shared->sums[b & 1][k + own_slot], own_output);
  };

  unsigned b = 0;
  for (int left = source.count; left > 0; left -= kBatch, b++) {
    const int here = min(left, kBatch);
    source.await(b);
    const bool special = __syncthreads_or(source.any_special(b));
    source.ask(b + Flow::kAhead);
    if (b > 0) put(b - 1);
    for (int s = 0; s < here; s++) {
      unsigned bits[kOwn];
      float x[kRun], sum[kOwn];
      own_bits(flow.bits[b % Flow::kStages], s, tile, bits);
#pragma unroll
      for (int j = 0; j < kRun / 4; j++) {
        const auto four = reinterpret_cast<const float4*>(flow.x[b % Flow::kStages])[Flow::place(s, tile.lane, j)];
        x[4 * j] = four.x, x[4 * j + 1] = four.y, x[4 * j + 2] = four.z, x[4 * j + 3] = four.w;
      }
      if (special)
        multiply<true>(w, x, bits, sum);
      else
        multiply<false>(w, x, bits, sum);
      shared->sums[b & 1][s][threadIdx.x] = sum_lanes(sum, tile.lane);
    }
  }
  __syncthreads();
  put(b - 1);
}

// The sums of the parts that product_kernel or tensor_kernel left, in order, to the rows where they belong.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const float* partial, int64_t lengths, const Slot* slots, const T* bias, int64_t width, T* out) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x, slot = blockIdx.y;
  if (n >= width) return;
  float sum = 0;
  for (int64_t k = 0; k < lengths; k++) sum += partial[(k * gridDim.y + slot) * width + n];
  if (bias != nullptr) sum += static_cast<float>(bias[n]);
  if (slots[slot].bits == nullptr) sum = NAN;
  out[slots[slot].row * width + n] = static_cast<T>(sum);
}

}  // namespace
