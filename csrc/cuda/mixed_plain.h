// Products of mixed rows that do no more than add up, for float64: a thread an element of dx or dW, a warp an element of y.
#pragma once
#include "mixed_slots.h"

namespace {

constexpr int kThreads = 256;  // of a block, here and in the kernels for other dtypes

__device__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

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

}  // namespace
