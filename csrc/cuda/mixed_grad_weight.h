// dW of mixed rows: the sums stay where product_kernel has the weights, and rows come in the order of the slots.
#pragma once
#include "mixed_tiles.h"

namespace {

// The slots in work of grad_weight_kernel; x and the gradients as floats.
struct Stage {
  uint4 bits[kPieces * kThreads];
  float4 x[kBatch][4][Tile<false>::kLanes];  // 16 for each lane
  float4 grads[kBatch][Tile<false>::kOutputs / kOwn];
  Slot slot[2][kBatch];  // these and the next

  // The slots [first, end) of the next batch, some of which may not be there.
  __device__ void next(const Slot* slots, int64_t first, int64_t end, int half) {
    const int i = threadIdx.x;
    if (i < kBatch) slot[half][i] = first + i < end ? slots[first + i] : Slot{nullptr, 0, 0};
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_weight_kernel(const T* grad, const T* x, const Slot* slots, int64_t count, int64_t outputs, int64_t inputs, T* to) {
  using Tile = Tile<false>;
  __shared__ Stage stage;
  const Tile tile;
  const int64_t out = int64_t{blockIdx.x} * Tile::kOutputs, along = int64_t{blockIdx.y} * Tile::kLength;
  const Bits<false, false> source(out, along, outputs, inputs);
  float sum[kOwn][kRun] = {};
  stage.next(slots, 0, count, 0);
  __syncthreads();

  int half = 0;
  for (int64_t first = 0; first < count; first += kBatch, half ^= 1) {
    source.load(stage.slot[half], stage.bits, nullptr);
    end_group();
    {
      const int s = threadIdx.x / Tile::kLanes, lane = threadIdx.x % Tile::kLanes;
      static_assert(kBatch * Tile::kLanes == kThreads);
      const int64_t at = along + lane * kRun;
      float values[kRun];
      load_run(x + stage.slot[half][s].row * inputs + at, inputs - at, inputs % 8 == 0, values);
#pragma unroll
      for (int j = 0; j < kRun / 4; j++)
        stage.x[s][j][lane] = make_float4(values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3]);
    }
    {
      const int s = threadIdx.x / Tile::kOutputs, n = threadIdx.x % Tile::kOutputs;
      static_assert(kBatch * Tile::kOutputs == kThreads);
      reinterpret_cast<float*>(stage.grads[s])[n] =
          out + n < outputs ? static_cast<float>(grad[stage.slot[half][s].row * outputs + out + n]) : 0.0f;
    }
    stage.next(slots, first + kBatch, count, half ^ 1);
    await_copies<0>();
    __syncthreads();
    source.prefetch(stage.slot[half ^ 1]);
    const int here = static_cast<int>(min(count - first, int64_t{kBatch}));
    for (int s = 0; s < here; s++) {
      const float4 four = stage.grads[s][tile.warp];
      const float g[kOwn] = {four.x, four.y, four.z, four.w};
      unsigned bits[kOwn];
      float values[kRun];
      own_bits(stage.bits, s, tile, bits);
#pragma unroll
      for (int j = 0; j < kRun / 4; j++) {
        const float4 piece = stage.x[s][j][tile.lane];
        values[4 * j] = piece.x, values[4 * j + 1] = piece.y, values[4 * j + 2] = piece.z, values[4 * j + 3] = piece.w;
      }
#pragma unroll
      for (int r = 0; r < kOwn; r++) {
#pragma unroll
        for (int j = 0; j < kRun; j++)
          if (bits[r] & 1u << j) sum[r][j] = multiply_add(g[r], values[j], sum[r][j]);
      }
    }
    __syncthreads();
  }

  constexpr int kEach = 16 / sizeof(T);
#pragma unroll
  for (int r = 0; r < kOwn; r++) {
    const int64_t o = out + tile.output(r), i = along + tile.lane * kRun;
    if (o >= outputs) continue;
    T* const row = to + o * inputs + i;
    if (inputs % 8 == 0 && i + kRun <= inputs) {
#pragma unroll
      for (int j = 0; j < kRun; j += kEach) {
        Pack<T, kEach> pack;
#pragma unroll
        for (int k = 0; k < kEach; k++) pack.v[k] = static_cast<T>(sum[r][j + k]);
        *reinterpret_cast<Pack<T, kEach>*>(row + j) = pack;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kRun; j++)
        if (i + j < inputs) row[j] = static_cast<T>(sum[r][j]);
    }
  }
}

}  // namespace
