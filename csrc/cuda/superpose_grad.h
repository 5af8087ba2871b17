// superpose_grad, what both ways share: the products of G and W by tables, and how rows are divided.
#pragma once
#include "superpose.h"
#include "superpose_sums_of_four.h"

namespace superposition {

constexpr int kDotThreads = static_cast<int>(kTile) / 4;
constexpr int kDotWarps = kDotThreads / kWarpSize;
constexpr int kDotTasks = 512;  // most of a block

// Four weights, and what they are multiplied by: loaded well before the products are wanted. With Outer, G is the outer product
// of grad_y and x, and products are rounded as those of a matrix product are; without, they are exact for floats.
template <class W, bool Outer>
struct Factors {
  using P = std::conditional_t<Outer, W, double>;
  W weight[4] = {}, left[4] = {}, grad_y[4] = {};

  // From `at` on; those from n on are zero.
  __device__ __forceinline__ void load_from(const Dot& a, int64_t row, int64_t at) {
    const int64_t there = a.n - at;
    if (there <= 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) weight[i] = left[i] = grad_y[i] = 0;
      return;
    }
    load<4>(a.weight, at, there, weight);
    if constexpr (Outer) {
      int64_t output = 0;
      if (a.n <= INT32_MAX)
        output = static_cast<uint32_t>(at) / static_cast<uint32_t>(a.inputs);
      else
        output = at / a.inputs;
      int64_t input = at - output * a.inputs;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        left[i] = i < there ? load_one<W>(a.left, row * a.inputs + input) : W{};
        grad_y[i] = i < there ? load_one<W>(a.grad_y, row * a.outputs + output) : W{};
        if (++input == a.inputs) input = 0, output++;
      }
    } else {
      load<4>(a.left, row * a.n + at, there, left);
    }
  }
  __device__ __forceinline__ P product(int i) const {
    if constexpr (Outer)
      return weight[i] * left[i] * grad_y[i];
    else
      return P{left[i]} * P{weight[i]};
  }
};

constexpr int64_t kMostScratch = 64 << 20;  // bytes

// out[row][task] = sum of the products of the row that the mask of the task opens. How tiles are divided depends on sizes of
// weight and bank only, so that a row gives what it gives alone. launch(dot, grid): for some of the rows.
template <class F>
void dot_rows(const Place& place, const Bank& bank, Dot dot, int64_t rows, const Strides& strides, int64_t blocks,
              const F& launch) {
  const int64_t task_chunks = ceil_div(bank.tasks(), kDotTasks);
  dot.tiles_a_part = std::max<int64_t>(1, ceil_div(dot.tiles * task_chunks, blocks));
  dot.sums.parts = static_cast<int32_t>(std::max<int64_t>(1, ceil_div(dot.tiles, dot.tiles_a_part)));
  const int64_t row_bytes = dot.sums.parts == 1 ? 0 : dot.sums.parts * bank.tasks() * 8;
  const int64_t at_once = std::clamp<int64_t>(kMostScratch / std::max<int64_t>(row_bytes, 1), 1, INT32_MAX / dot.sums.parts);
  const Tensor scratch = place.scratch(row_bytes * std::min(rows, at_once));
  dot.sums.partial = static_cast<double*>(scratch.mutable_data_ptr());
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t some = std::min(at_once, rows - row);
    launch(dot, dim3(static_cast<unsigned>(some * dot.sums.parts), static_cast<unsigned>(task_chunks)));
    add_parts(place, dot.sums, some);
    dot.left.data = static_cast<const char*>(dot.left.data) + some * strides.left;
    dot.grad_y.data = static_cast<const char*>(dot.grad_y.data) + some * strides.grad_y;
    dot.sums.out = static_cast<char*>(dot.sums.out) + some * strides.out;
  }
}

}  // namespace superposition
