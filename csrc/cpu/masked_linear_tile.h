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

// out[r][l] = sum_k a[k][r] panel[k][l] for R rows and V registers of lanes, of which `lanes` are stored: onto what is there
// where it is more of a sum, else onto a bias if there is one. Rows of the panel lie `pitch` apart. The tile a is [k][kRows], or
// [r][kDepth] where it is `along` its rows: then the panel stays in the first-level cache and the next tile is asked for, else
// the tile stays and what comes next of the panel is asked for, and of weights and scores the lines that the next tile of G
// needs.
template <int R, int V, bool along>
SK_TARGET static void outer(const float* a, const float* panel, int64_t pitch, int64_t depth, const Place& to, int64_t lanes,
                            const Ahead& ahead) {
  Lanes sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = zero();
  const float* next = a + kRows * kDepth;
  for (int64_t k = 0; k < depth; k++, a += along ? 1 : kRows, panel += pitch) {
    Lanes p[V];
    if (along) {
      __builtin_prefetch(next);
      next += 16;
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) __builtin_prefetch(panel + 12 * pitch + 16 * v);
      const int64_t line = std::min<int64_t>(k, 2 * R - 1), at = (line >> 1) * ahead.row + (line & 1) * 16;
      __builtin_prefetch(ahead.weight + at, 0, 2);
      __builtin_prefetch(ahead.scores + at, 0, 2);
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) p[v] = load(panel + 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const Lanes factor = same(a[along ? r * kDepth : r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] = fma(factor, p[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      float* out = to.out + r * to.row + 16 * v;
      const int64_t left = lanes - 16 * v;
      const float* onto = to.more ? out : to.bias ? to.bias + 16 * v : nullptr;
      if (left >= 16)
        store(out, onto ? add(load(onto), sum[r][v]) : sum[r][v]);
      else if (left > 0)
        store_first(out, onto ? add(load_open(onto, static_cast<uint32_t>(low_bits(left))), sum[r][v]) : sum[r][v], left);
    }
}

// rows <= kRows of a times a panel, in tiles that this instruction set has registers for.
template <bool along, int... R>
SK_TARGET static void outer_rows(const float* a, const float* panel, int64_t pitch, int64_t depth, int rows, const Place& to,
                                 int64_t lanes, const Ahead& ahead, std::integer_sequence<int, R...>) {
  using Outer = void (*)(const float*, const float*, int64_t, int64_t, const Place&, int64_t, const Ahead&);
  constexpr int kMost = sizeof...(R);
  constexpr Outer one[] = {outer<R + 1, 1, along>...};
#if SK_LEVEL == 2
  constexpr Outer two[] = {outer<R + 1, 2, along>...};
  (lanes > 16 ? two : one)[rows - 1](a, panel, pitch, depth, to, lanes, ahead);
  static_assert(kMost == kRows);
#else
  for (int64_t l = 0; l < lanes; l += 16)
    for (int r = 0; r < rows; r += kMost)
      one[std::min(rows - r, kMost) - 1](a + r * (along ? kDepth : 1), panel + l, pitch, depth,
                                         {to.out + r * to.row + l, to.row, to.bias ? to.bias + l : nullptr, to.more}, lanes - l,
                                         ahead);
#endif
}

template <bool along>
SK_TARGET static void outer_tile(const float* a, const float* panel, int64_t pitch, int64_t depth, int rows, const Place& to,
                                 int64_t lanes, const Ahead& ahead) {
  outer_rows<along>(a, panel, pitch, depth, rows, to, lanes, ahead, std::make_integer_sequence<int, SK_LEVEL == 2 ? kRows : 6>());
}

// 16 lanes, or the first n of them where fewer are left; whole lines past the caches if wanted.
SK_TARGET SK_LANES void put(float* to, const Lanes& v, int64_t n, bool past) {
  if (n < kLanes)
    store_first(to, v, n);
  else if (past)
    stream(to, v);
  else
    store(to, v);
}

// From a tile of G, [rows][kPanel], whose first weight is number `first`: dS = G * W (* the score's sign), whatever the mask is,
// and dW = G where open and not frozen. A tile at a time, while it is in the first-level cache and the next one is multiplied.
SK_TARGET static void straight_through_tile(const float* sums, const Gradients& to, int64_t first, int rows, int64_t lanes) {
  for (int r = 0; r < rows; r++, first += to.row, sums += kPanel)
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const int64_t i = first + l, left = lanes - l;
      const Lanes g = load(sums + l);
      if (to.d_scores) {
        const auto here = static_cast<uint16_t>(low_bits(left));
        Lanes d = mul(g, load_open(to.weight + i, here));
        if (to.magnitude) d = mul(d, sign(load_open(to.scores + i, here)));
        put(to.d_scores + i, d, left, to.past);
      }
      if (to.d_weight) {
        const uint64_t live = to.shut.begin ? to.open.at(i) & ~to.shut.at(i) : to.open.at(i);
        put(to.d_weight + i, where(static_cast<uint16_t>(live), g), left, to.past);
      }
    }
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

// The same of `lanes` rows, which lie `row` apart and have `depth` columns: the rows become columns of one panel.
SK_TARGET static void pack_turned(const float* from, int64_t row, const Bits bits, int64_t first, int64_t depth, int64_t lanes,
                                  float* panel) {
  for (int64_t l = 0; l < kPanel; l += 16)
    for (int64_t k = 0; k < depth; k += 32) {
      uint32_t open[16];
      for (int r = 0; r < 16; r++) {
        const uint64_t here = l + r < lanes ? low_bits(depth - k) : 0;
        open[r] = static_cast<uint32_t>(here && bits.begin ? here & bits.at(first + (l + r) * row + k) : here);
      }
      for (int half = 0; half < 2 && k + 16 * half < depth; half++) {
        const float* at = from + l * row + k + 16 * half;
        Lanes block[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
          __builtin_prefetch(at + r * row + 128, 0, 2);  // rows are further apart than the processor looks ahead by itself
          block[r] = load_open(at + r * row, static_cast<uint16_t>(open[r] >> 16 * half));
        }
        transpose(block);
        float* to = panel + (k + 16 * half) * kPanel + l;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
          if (k + 16 * half + i < depth) store(to + i * kPanel, block[i]);
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
