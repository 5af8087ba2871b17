// The inner loops of the masked products for one instruction set; masked_linear.cpp includes this file once for each, with
// SK_LEVEL (0 portable, 1 AVX2, 2 AVX-512) and SK_TARGET, its attribute, defined.
//
// All arithmetic is on groups of 16 lanes and by fused multiply-adds in a fixed order, so every instruction set gives the same
// bits.

// y[b][r] = sum_i x[b][i] w[r][i] (+ bias[r]) for B rows of x and R <= 4 rows of w, closed weights counting as 0: rows against
// rows. `first` is the number of w's first bit; without bits all weights count.
template <int R, int B, bool masked>
SK_TARGET static void rows_by_rows(const float* x, const float* w, const Bits bits, int64_t first, int64_t n, const float* bias,
                                   float* y, int64_t y_row) {
  Lanes sum[B][4];
  for (int b = 0; b < B; b++)
    for (int r = 0; r < 4; r++) sum[b][r] = zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    Lanes xs[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) xs[b] = load(x + b * n + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Lanes ws = masked ? load_open(w + r * n + i, bits.at(first + r * n + i)) : load(w + r * n + i);
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) sum[b][r] = fma(ws, xs[b], sum[b][r]);
    }
  }
  if (i < n) {
    const auto here = static_cast<uint16_t>(low_bits(n - i));
    Lanes xs[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) xs[b] = load_open(x + b * n + i, here);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Lanes ws = load_open(w + r * n + i, masked ? here & bits.at(first + r * n + i) : here);
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) sum[b][r] = fma(ws, xs[b], sum[b][r]);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; b++) {
    float total[4];
    sums(sum[b], total);
    for (int r = 0; r < R; r++) y[b * y_row + r] = bias ? total[r] + bias[r] : total[r];
  }
}

// out[r][l] (+)= sum_k a[k][r] panel[k][l] for R rows and V registers of lanes, of which `lanes` are stored; rows of the panel
// lie `pitch` apart.
template <int R, int V>
SK_TARGET static void outer(const float* a, const float* panel, int64_t pitch, int64_t depth, float* out, int64_t out_row,
                            int64_t lanes, bool more) {
  Lanes sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = zero();
  for (int64_t k = 0; k < depth; k++, a += kRows, panel += pitch) {
    Lanes p[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) p[v] = load(panel + 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const Lanes factor = same(a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] = fma(factor, p[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      float* to = out + r * out_row + 16 * v;
      const int64_t left = lanes - 16 * v;
      if (left >= 16)
        store(to, more ? add(load(to), sum[r][v]) : sum[r][v]);
      else if (left > 0)
        store_first(to, more ? add(load_open(to, static_cast<uint32_t>(low_bits(left))), sum[r][v]) : sum[r][v], left);
    }
}

// rows <= kRows of a times a panel, in tiles that this instruction set has registers for.
template <int... R>
SK_TARGET static void outer_rows(const float* a, const float* panel, int64_t pitch, int64_t depth, int rows, float* out,
                                 int64_t out_row, int64_t lanes, bool more, std::integer_sequence<int, R...>) {
  using Outer = void (*)(const float*, const float*, int64_t, int64_t, float*, int64_t, int64_t, bool);
  constexpr int kMost = sizeof...(R);
  constexpr Outer one[] = {outer<R + 1, 1>...};
#if SK_LEVEL == 2
  constexpr Outer two[] = {outer<R + 1, 2>...};
  (lanes > 16 ? two : one)[rows - 1](a, panel, pitch, depth, out, out_row, lanes, more);
  static_assert(kMost == kRows);
#else
  for (int64_t l = 0; l < lanes; l += 16)
    for (int r = 0; r < rows; r += kMost)
      one[std::min(rows - r, kMost) - 1](a + r, panel + l, pitch, depth, out + r * out_row + l, out_row, lanes - l, more);
#endif
}

SK_TARGET static void outer_tile(const float* a, const float* panel, int64_t pitch, int64_t depth, int rows, float* out,
                                 int64_t out_row, int64_t lanes, bool more) {
  outer_rows(a, panel, pitch, depth, rows, out, out_row, lanes, more,
             std::make_integer_sequence<int, SK_LEVEL == 2 ? kRows : 6>());
}

// `lanes` columns of `depth` rows that lie `row` apart, as panels [panel][depth][kPanel]: closed elements and the lanes beyond
// are 0. Whole rows are read, one after the other: a panel at a time would touch as many pages as there are rows.
SK_TARGET static void pack_panels(const float* from, int64_t row, const Bits bits, int64_t first, int64_t depth, int64_t lanes,
                                  float* panels) {
  for (int64_t k = 0; k < depth; k++, from += row, first += row) {
    float* to = panels + k * kPanel;
    if (k + kAhead < depth)  // rows are further apart than the processor looks ahead by itself
      for (int64_t l = 0; l < lanes; l += 16) __builtin_prefetch(from + kAhead * row + l);
    for (int64_t l = 0; l < lanes; l += kPanel, to += depth * kPanel) {
      const uint64_t here = low_bits(lanes - l);
      const auto open = static_cast<uint32_t>(bits.begin ? here & bits.at(first + l) : here);
      store(to, load_open(from + l, open));
      store(to + 16, lanes - l > 16 ? load_open(from + l + 16, open >> 16) : zero());
    }
  }
}

// n weights from bit `first` on, closed ones as 0.
SK_TARGET static void keep(const float* w, const Bits bits, int64_t first, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const uint64_t open = bits.word(first + i);
#pragma GCC unroll 4
    for (int j = 0; j < 64; j += 16) store(out + i + j, load_open(w + i + j, static_cast<uint32_t>(open >> j)));
  }
  for (; i < n; i += 16) {
    const auto open = static_cast<uint32_t>(bits.at(first + i) & low_bits(n - i));
    store_first(out + i, load_open(w + i, open), n - i);
  }
}

// Rows [begin, end) of w, against all rows of x; w is masked in the registers where few rows of x share it, else in `buffer`.
template <bool masked>
SK_TARGET static void forward(const Product& p, int64_t begin, int64_t end, float* buffer) {
  constexpr int kW = SK_LEVEL == 2 ? 4 : 2, kX = SK_LEVEL == 2 ? 6 : 3;
  using Rows = void (*)(const float*, const float*, const Bits, int64_t, int64_t, const float*, float*, int64_t);
#define SK_ROWS(r) {rows_by_rows<r, 1, masked>, rows_by_rows<r, 2, masked>, rows_by_rows<r, 3, masked> SK_MORE(r)}
#if SK_LEVEL == 2
#define SK_MORE(r) , rows_by_rows<r, 4, masked>, rows_by_rows<r, 5, masked>, rows_by_rows<r, 6, masked>
  static constexpr Rows table[kW][kX] = {SK_ROWS(1), SK_ROWS(2), SK_ROWS(3), SK_ROWS(4)};
#else
#define SK_MORE(r)
  static constexpr Rows table[kW][kX] = {SK_ROWS(1), SK_ROWS(2)};
#endif
#undef SK_MORE
#undef SK_ROWS
  const int64_t runs = (p.rows + kX - 1) / kX;
  for (int64_t o = begin; o < end; o += kW) {
    const auto r = static_cast<int>(std::min<int64_t>(kW, end - o));
    const float* w = p.w + o * p.in;
    if (buffer) {
      keep(w, p.bits, o * p.in, r * p.in, buffer);
      w = buffer;
    }
    for (int64_t t = 0; t < runs; t++) {  // runs of nearly one length: 10 rows are 5 and 5, not 6 and 4
      const int64_t b = p.rows * t / runs, count = p.rows * (t + 1) / runs - b;
      table[r - 1][count - 1](p.x + b * p.in, w, p.bits, o * p.in, p.in, p.bias ? p.bias + o : nullptr, p.y + b * p.out + o,
                              p.out);
    }
  }
}

// From G of n weights dS = G * W (* the score's sign), and where wanted dW = G where open; in one pass, because both are larger
// than the caches, which is also why whole lines may go past them.
SK_TARGET static void straight_through_rows(const float* sums, const Gradients& to, const uint8_t* open, int64_t first, int64_t n,
                                            bool past) {
  const float *weight = to.weight + first, *scores = to.scores + first;
  float *d_scores = to.d_scores + first, *d_weight = to.d_weight ? to.d_weight + first : nullptr;
  for (int64_t i = 0; i < n; i += kLanes) {
    const auto here = static_cast<uint16_t>(low_bits(std::min<int64_t>(kLanes, n - i)));
    const Lanes g = load(sums + i);  // whose buffer has whole lines
    Lanes d = mul(g, load_open(weight + i, here));
    if (to.magnitude) d = mul(d, sign(load_open(scores + i, here)));
    uint16_t live;
    std::memcpy(&live, open + i / 8, 2);
    const Lanes kept = where(live, g);
    if (here != 0xffff) {
      store_first(d_scores + i, d, n - i);
      if (d_weight) store_first(d_weight + i, kept, n - i);
    } else if (past) {
      stream(d_scores + i, d);
      if (d_weight) stream(d_weight + i, kept);
    } else {
      store(d_scores + i, d);
      if (d_weight) store(d_weight + i, kept);
    }
  }
}
