// The products of mixed.cpp, included once for each instruction set: SK_TARGET is its attribute, and the functions of lanes.h are
// those of the namespace that this is included in. Loops over sums are unrolled by hand: else the compiler keeps them in memory.

// sums[r * kOutputs + o] = open W[o] . x[r] for `rows` rows of one task and kOutputs outputs.
// open: a row of 16-bit pieces for each output; x: rows `x_stride` apart, readable to the end of the last piece.
template <int rows>
SK_TARGET static void forward_rows(const float* weight, int64_t stride, const uint16_t* open, int64_t open_stride, const float* x,
                                   int64_t x_stride, int64_t pieces, float* sums) {
  Lanes sum_of[rows][kOutputs];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int64_t o = 0; o < kOutputs; o++) sum_of[r][o] = zero();
  for (int64_t p = 0; p < pieces; p++) {
    Lanes in[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) in[r] = load(x + r * x_stride + p * kLanes);
#pragma GCC unroll 4
    for (int64_t o = 0; o < kOutputs; o++) {
      const Lanes w = load_open(weight + o * stride + p * kLanes, open[o * open_stride + p]);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) sum_of[r][o] = fma(w, in[r], sum_of[r][o]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int64_t o = 0; o < kOutputs; o++) sums[r * kOutputs + o] = sum(sum_of[r][o]);
}
SK_TARGET static void forward(const float* weight, int64_t stride, const uint16_t* open, int64_t open_stride, const float* x,
                              int64_t x_stride, int64_t rows, int64_t pieces, float* sums) {
  for (; rows >= 4; rows -= 4, x += 4 * x_stride, sums += 4 * kOutputs)
    forward_rows<4>(weight, stride, open, open_stride, x, x_stride, pieces, sums);
  for (; rows > 0; rows--, x += x_stride, sums += kOutputs)
    forward_rows<1>(weight, stride, open, open_stride, x, x_stride, pieces, sums);
}

// The same for kQuad rows of tasks of their own, which share the loads of the weight: row r is x[r], its bits open[r], and its
// sums go to sums[r]. All kOutputs outputs are there.
SK_TARGET static inline __attribute__((always_inline)) void forward_piece(const Lanes* w, const uint16_t* const* open,
                                                                          int64_t open_stride, const float* const* x, int64_t p,
                                                                          Lanes (*sum_of)[kOutputs]) {
#pragma GCC unroll 4
  for (int64_t r = 0; r < kQuad; r++) {
    const Lanes in = load(x[r] + p * kLanes);
#pragma GCC unroll 4
    for (int64_t o = 0; o < kOutputs; o++) sum_of[r][o] = fma(where(open[r][o * open_stride + p], w[o]), in, sum_of[r][o]);
  }
}
SK_TARGET static void forward_quad(const float* weight, int64_t stride, const uint16_t* const* open, int64_t open_stride,
                                   const float* const* x, int64_t inputs, float* const* sums) {
  Lanes sum_of[kQuad][kOutputs], w[kOutputs];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kQuad; r++)
#pragma GCC unroll 4
    for (int64_t o = 0; o < kOutputs; o++) sum_of[r][o] = zero();
  const int64_t whole = inputs / kLanes;
  for (int64_t p = 0; p < whole; p++) {
#pragma GCC unroll 4
    for (int64_t o = 0; o < kOutputs; o++) w[o] = load(weight + o * stride + p * kLanes);
    forward_piece(w, open, open_stride, x, p, sum_of);
  }
  if (inputs % kLanes) {
    const auto there = static_cast<uint16_t>((1u << inputs % kLanes) - 1);
#pragma GCC unroll 4
    for (int64_t o = 0; o < kOutputs; o++) w[o] = load_open(weight + o * stride + whole * kLanes, there);
    forward_piece(w, open, open_stride, x, whole, sum_of);
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kQuad; r++)
#pragma GCC unroll 4
    for (int64_t o = 0; o < kOutputs; o++) sums[r][o] = sum(sum_of[r][o]);
}

// to[r][i] += sum over n outputs of grad[r][o] * open W[o][i], for kStrip inputs.
// weight: (n, kStrip) contiguous; open: kPieces pieces for each output, kOpenStride apart; rows of grad and to at their strides.
template <int rows>
SK_TARGET static void grad_x_rows(const float* weight, const uint16_t* open, int64_t n, const float* grad, int64_t grad_stride,
                                  float* to, int64_t to_stride) {
  Lanes sum_of[rows][kPieces];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int64_t p = 0; p < kPieces; p++) sum_of[r][p] = load(to + r * to_stride + p * kLanes);
  for (int64_t o = 0; o < n; o++, weight += kStrip, open += kOpenStride) {
    Lanes w[kPieces];
#pragma GCC unroll 4
    for (int64_t p = 0; p < kPieces; p++) w[p] = load_open(weight + p * kLanes, open[p]);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      const Lanes g = same(grad[r * grad_stride + o]);
#pragma GCC unroll 4
      for (int64_t p = 0; p < kPieces; p++) sum_of[r][p] = fma(w[p], g, sum_of[r][p]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int64_t p = 0; p < kPieces; p++) store(to + r * to_stride + p * kLanes, sum_of[r][p]);
}
SK_TARGET static void grad_x(const float* weight, const uint16_t* open, int64_t n, const float* grad, int64_t grad_stride,
                             int64_t rows, float* to, int64_t to_stride) {
  for (; rows >= 4; rows -= 4, grad += 4 * grad_stride, to += 4 * to_stride)
    grad_x_rows<4>(weight, open, n, grad, grad_stride, to, to_stride);
  for (; rows > 0; rows--, grad += grad_stride, to += to_stride)
    grad_x_rows<1>(weight, open, n, grad, grad_stride, to, to_stride);
}

// The same for kQuad rows of tasks of their own: row r is grad[r], its bits open[r], and its sums are at to[r].
SK_TARGET static void grad_x_quad(const float* weight, const uint16_t* const* open, int64_t n, const float* const* grad,
                                  float* const* to) {
  Lanes sum_of[kQuad][kPieces];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kQuad; r++)
#pragma GCC unroll 4
    for (int64_t p = 0; p < kPieces; p++) sum_of[r][p] = load(to[r] + p * kLanes);
  for (int64_t o = 0; o < n; o++) {
    Lanes w[kPieces];
#pragma GCC unroll 4
    for (int64_t p = 0; p < kPieces; p++) w[p] = load(weight + o * kStrip + p * kLanes);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kQuad; r++) {
      const Lanes g = same(grad[r][o]);
#pragma GCC unroll 4
      for (int64_t p = 0; p < kPieces; p++) sum_of[r][p] = fma(where(open[r][o * kOpenStride + p], w[p]), g, sum_of[r][p]);
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kQuad; r++)
#pragma GCC unroll 4
    for (int64_t p = 0; p < kPieces; p++) store(to[r] + p * kLanes, sum_of[r][p]);
}

// to[o][i] += sum over rows of grad[r][o] * x[r][i] where the mask of the row's task is open, for kOutputs outputs and kStrip
// inputs. x: (rows, kStrip) contiguous; open: (groups of rows, kOutputs, kOpenStride), of which kPieces are read; ends[g]: the
// first row after group g.
SK_TARGET static void grad_weight(const float* x, const float* grad, int64_t grad_stride, const uint16_t* open,
                                  const int64_t* ends, int64_t groups, float* to, int64_t to_stride) {
  Lanes sum_of[kOutputs][kPieces];
#pragma GCC unroll 4
  for (int64_t o = 0; o < kOutputs; o++)
#pragma GCC unroll 4
    for (int64_t p = 0; p < kPieces; p++) sum_of[o][p] = load(to + o * to_stride + p * kLanes);
  for (int64_t g = 0, row = 0; g < groups; g++, open += kOutputs * kOpenStride)
    for (; row < ends[g]; row++) {
      Lanes in[kPieces];
#pragma GCC unroll 4
      for (int64_t p = 0; p < kPieces; p++) in[p] = load(x + row * kStrip + p * kLanes);
#pragma GCC unroll 4
      for (int64_t o = 0; o < kOutputs; o++) {
        const Lanes scale = same(grad[row * grad_stride + o]);
#pragma GCC unroll 4
        for (int64_t p = 0; p < kPieces; p++) sum_of[o][p] = fma_open(in[p], scale, sum_of[o][p], open[o * kOpenStride + p]);
      }
    }
#pragma GCC unroll 4
  for (int64_t o = 0; o < kOutputs; o++)
#pragma GCC unroll 4
    for (int64_t p = 0; p < kPieces; p++) store(to + o * to_stride + p * kLanes, sum_of[o][p]);
}
