// The arithmetic of the optimizer steps on one weight: operation by operation that of the CPU op (csrc/cpu/update_tile.h), each
// rounded by itself, so that both give the same bits; only NaNs may differ in theirs, and a power of beta in its last place.
#pragma once
#include <cmath>

#include "device.h"

constexpr int kStates = 3;  // most state tensors that a rule keeps for a parameter

// SGD's state: the momentum buffer. RMSprop's: average square, average (centered), momentum buffer. Adam's: average, average
// square, largest average square (amsgrad).
enum class Rule { sgd, sgd_momentum, rmsprop, adam, adam_amsgrad };

// What the caller of a step says, in the type that the step computes in.
template <class A>
struct Settings {
  A mean, square;          // what is left of the running averages
  A new_mean, new_square;  // shares of what comes in
  A weight_decay;          // of the gradient
  bool scaled, maximize, decays;
  bool first, nesterov;     // of SGD with momentum
  bool centered, momentum;  // of RMSprop
};

// What a step needs from tensors of the device.
template <class A>
struct Scalars {
  A rate;   // what the change is multiplied with
  A eps;    // added to the root
  A decay;  // what the weight is multiplied with first (decoupled weight decay)
  A scale;  // of the gradient, before all else
};

template <Rule rule, class A>
__device__ __forceinline__ bool keeps(const Settings<A>& s, int state) {
  if constexpr (rule == Rule::rmsprop) return state == 0 || (state == 1 ? s.centered : s.momentum);
  return state < (rule == Rule::sgd ? 0 : rule == Rule::sgd_momentum ? 1 : rule == Rule::adam ? 2 : 3);
}

// A product that is never contracted with the sum that it enters.
__device__ __forceinline__ float product(float x, float y) {
#ifndef SUBNET_KERNELS_EMULATED
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}
__device__ __forceinline__ double product(double x, double y) {
#ifndef SUBNET_KERNELS_EMULATED
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ float fused(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double fused(double x, double y, double z) { return fma(x, y, z); }

// torch.lerp: from the nearer end, and rounded once.
template <class A>
__device__ __forceinline__ A lerp_to(A from, A to, A share) {
  return share < A(0.5) ? fused(share, to - from, from) : fused(share - 1, to - from, to);
}

// What a step reads of a running average: 0 where it is below the smallest normal number (csrc/cpu/update_tile.h says why).
template <class A>
__device__ __forceinline__ A normal(A x) {
  constexpr A kLeast = sizeof(A) == 8 ? A(2.2250738585072014e-308) : A(1.17549435e-38f);
  return fabs(x) < kLeast ? A(0) : x;
}

// The gradient that a rule sees: unscaled, negated to maximize, with weight decay added.
template <class A>
__device__ __forceinline__ A prepared(A grad, A weight, const Settings<A>& s, const Scalars<A>& x) {
  if (s.scaled) grad = grad / x.scale;
  if (s.maximize) grad = -grad;
  if (s.decays) grad = grad + product(s.weight_decay, weight);
  return grad;
}

// One step of one weight and its state.
template <Rule rule, class A>
__device__ __forceinline__ void step(A& weight, A grad, A (&state)[kStates], const Settings<A>& s, const Scalars<A>& x) {
  if constexpr (rule == Rule::adam || rule == Rule::adam_amsgrad) {
    state[0] = lerp_to(normal(state[0]), grad, s.new_mean);
    state[1] = product(s.square, normal(state[1])) + product(s.new_square, product(grad, grad));
    A variance = state[1];
    if constexpr (rule == Rule::adam_amsgrad) {
      const A most = state[2];
      variance = most > variance || most != most ? most : variance;  // torch.maximum keeps a NaN of either
      state[2] = variance;
    }
    weight = product(weight, x.decay) - product(x.rate, state[0]) / (root(variance) + x.eps);
  } else if constexpr (rule == Rule::rmsprop) {
    state[0] = product(s.square, normal(state[0])) + product(s.new_square, product(grad, grad));
    A variance = state[0];
    if (s.centered) {
      state[1] = lerp_to(normal(state[1]), grad, s.new_square);
      variance = variance - product(state[1], state[1]);
    }
    A change = grad / (root(variance) + x.eps);
    if (s.momentum) {
      change = product(s.mean, normal(state[2])) + change;
      state[2] = change;
    }
    weight = weight - product(x.rate, change);
  } else {
    A change = grad;
    if constexpr (rule == Rule::sgd_momentum) {
      if (!s.first) change = product(s.mean, normal(state[0])) + product(s.new_mean, grad);
      state[0] = change;
      if (s.nesterov) change = grad + product(s.mean, change);
    }
    weight = weight - product(x.rate, change);
  }
}
