// The products of compressed.cpp with one row of a compressed weight, included once for each instruction set, as mixed_kernels.h
// is. Sixteen values, and sixteen columns, can be read from anywhere in a row. What is closed takes no part: neither its weight,
// which is not there, nor the x that it would be multiplied by.

// out[r] = the row of a bitmap . x[r], for `rows` rows of x.
template <class T, int rows>
SK_TARGET static void bitmap_rows(const T* values, const uint8_t* open, int64_t words, const float* x, int64_t stride,
                                  float* out) {
  Lanes sum_of[rows][4];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) sum_of[r][p] = zero();
  for (int64_t w = 0; w < words; w++) {
    uint64_t word = load_word(open + w * 8);
    if (word == 0) continue;
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++, word >>= 16) {
      const auto piece = static_cast<uint16_t>(word);
      const Lanes v = expand(values, piece);
      values += __builtin_popcount(piece);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) sum_of[r][p] = fma_open(v, load(x + r * stride + w * 64 + p * kLanes), sum_of[r][p], piece);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++) out[r] = sum(add(add(sum_of[r][0], sum_of[r][1]), add(sum_of[r][2], sum_of[r][3])));
}
template <class T>
SK_TARGET static void bitmap(const T* values, const uint8_t* open, int64_t words, const float* x, int64_t stride, int64_t rows,
                             float* out) {
  for (; rows >= 4; rows -= 4, x += 4 * stride, out += 4) bitmap_rows<T, 4>(values, open, words, x, stride, out);
  for (; rows > 0; rows--, x += stride, out++) bitmap_rows<T, 1>(values, open, words, x, stride, out);
}

// out[r] = the n values at their columns . x[r], for few rows of x.
template <class T, class Column>
SK_TARGET static void index_few(const T* values, const Column* columns, int64_t n, const float* x, int64_t stride, int64_t rows,
                                float* out) {
  for (int64_t r = 0; r < rows; r++, x += stride) {
    Lanes sum_of = zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum_of = fma(load(values + i), gather(x, columns + i), sum_of);
    if (i < n) sum_of = fma_open(load(values + i), gather(x, columns + i), sum_of, static_cast<uint16_t>((1u << (n - i)) - 1));
    out[r] = sum(sum_of);
  }
}

// The same for sixteen rows, a lane each: x is (inputs, 16). Every 128 values the sums join the total, so that none gets long and
// the error stays that of a dense product.
template <class T, class Column>
SK_TARGET static void index_many(const T* values, const Column* columns, int64_t n, const float* x, int64_t, int64_t,
                                 float* out) {
  Lanes total = zero(), sum_of[4];
#pragma GCC unroll 4
  for (int p = 0; p < 4; p++) sum_of[p] = zero();
  alignas(64) float value[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    if (i % 128 == 0) {
      total = add(total, add(add(sum_of[0], sum_of[1]), add(sum_of[2], sum_of[3])));
#pragma GCC unroll 4
      for (int p = 0; p < 4; p++) sum_of[p] = zero();
    }
    store(value, load(values + i));
    if (i + kLanes <= n) {
      for (int64_t j = 0; j < kLanes; j += 4)
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++)
          sum_of[p] = fma(same(value[j + p]), load(x + static_cast<int64_t>(columns[i + j + p]) * kLanes), sum_of[p]);
    } else {
      for (int64_t j = 0; i + j < n; j++)
        sum_of[0] = fma(same(value[j]), load(x + static_cast<int64_t>(columns[i + j]) * kLanes), sum_of[0]);
    }
  }
  store(out, add(total, add(add(sum_of[0], sum_of[1]), add(sum_of[2], sum_of[3]))));
}
