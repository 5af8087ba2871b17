// superpose_grad by products of matrices: out = (tasks x weights) (weights x 8 digits of G W), for floats.
//
// A product of a tile is scaled by what the largest of the tile
// allows, and rounded to an integer of eight digits; its digits are doubled as often as the bit that it meets counts less than
// the highest of its byte. A tile whose smallest product would not keep the bits of a float so goes by tables. A warp takes
// sixteen tasks of a tile at a time: for 8,192 bits 64 operations that pick bits, and 16 products. The sums of a tile are
// integers; those of digits over tiles are float64, and put together at the end.
#include "superpose_digits.h"
#include "superpose_grad.h"

namespace superposition {
namespace {

constexpr int kProductTasks = 16;
constexpr int kProductBits = 55,
              kProductSpread = 30;            // of a scaled product, its sign aside; between the largest and the smallest
constexpr int kProductBlocksAtOnce = 5;       // of a multiprocessor
constexpr int kPairs = 4;                     // of digits
constexpr int kDigitRow = kWarpSize * 2 + 2;  // words of eight quads' digits, and two that keep stores off each other's banks

// Four products of one word, a byte apart: weights 32 word + bit + 8 i, loaded well before they are wanted.
struct Quads {
  float left[4], weight[4];

  __device__ __forceinline__ void load_from(const Dot& a, int64_t row, int64_t tile) {
    const int64_t at = tile * kTile + threadIdx.x / 8 * 32 + threadIdx.x % 8;
    const int there = static_cast<int>(min(a.n - at, kTile));
    const auto load_four = [&](const Floats& from, int64_t begin, float (&to)[4]) {
      by_dtype(from.dtype, [&](auto zero) {
        const auto* p = static_cast<const decltype(zero)*>(from.data) + begin + at;
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = i * 8 < there ? widen<float>(p[i * 8]) : 0.0f;
      });
    };
    load_four(a.weight, 0, weight), load_four(a.left, row * a.n, left);
  }
};

template <class Table>
__global__ void __launch_bounds__(kDotThreads, kProductBlocksAtOnce)
    dot_product_kernel(const __grid_constant__ Table bank, const Dot a) {
  using Entry = Pack<float, 1>;
  alignas(16) __shared__ uint32_t digits[2][16 * kDigitRow];  // of this tile and the next: [words c, c + 1][bit][lane]; or tables
  __shared__ TaskLines lines[kDotTasks];
  __shared__ double sums[kDotTasks], pairs[2][kDotTasks / 2 * kPairs];
  __shared__ uint32_t extremes[2][2][kDotWarps];
  static_assert(sizeof(digits) >= kDotThreads * 16 * sizeof(Entry));
  let_next_start();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int part = static_cast<int>(blockIdx.x % a.sums.parts);
  const int64_t row = blockIdx.x / a.sums.parts;
  const int first = blockIdx.y * kDotTasks, tasks = min(kDotTasks, bank.tasks - first);
  const int64_t begin = part * a.tiles_a_part, end = min(a.tiles, begin + a.tiles_a_part);
  for (int i = threadIdx.x; i < tasks; i += kDotThreads) lines[i] = bank.task(first + i);
  for (int i = threadIdx.x; i < kDotTasks; i += kDotThreads) sums[i] = 0;
  for (int i = threadIdx.x; i < kDotTasks / 2 * kPairs; i += kDotThreads) pairs[0][i] = pairs[1][i] = 0;
  __syncthreads();

  const int groups = (tasks + kProductTasks - 1) / kProductTasks;
  uint4 next[2];  // words 4 (lane % 4) and on of tasks lane / 4 and lane / 4 + 8
  const auto fetch = [&](int64_t tile, int group) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int task = group * kProductTasks + i * 8 + lane / 4;
      next[i] = uint4{};
      if (task >= tasks) continue;
      const TaskLines line = lines[task];
      next[i] = __ldg(reinterpret_cast<const uint4*>(line.first + tile * line.step) + lane % 4);
    }
  };

  Quads quads;
  if (begin < end) quads.load_from(a, row, begin);
  for (int64_t tile = begin; tile < end; tile++) {
    if (warp < groups) fetch(tile, warp);
    double products[4];
    uint32_t most = 0, least = ~0u;  // high words, the sign aside: as numbers ordered as sizes are
#pragma unroll
    for (int i = 0; i < 4; i++) {
      products[i] = double{quads.left[i]} * double{quads.weight[i]};
      const auto size = static_cast<uint32_t>(static_cast<uint64_t>(__double_as_longlong(products[i])) >> 32) & 0x7fffffffu;
      most = max(most, size);
      if (products[i] != 0) least = min(least, size);
    }
    const int now = static_cast<int>(tile & 1);
    most = __reduce_max_sync(kAllLanes, most), least = __reduce_min_sync(kAllLanes, least);
    if (lane == 0) extremes[now][0][warp] = most, extremes[now][1][warp] = least;
    __syncthreads();  // who reads digits or tables of the tile before is done, too
#pragma unroll
    for (int w = 0; w < kDotWarps; w++) most = max(most, extremes[now][0][w]), least = min(least, extremes[now][1][w]);
    const int top = static_cast<int>(most >> 20), bottom = static_cast<int>(least >> 20);  // biased exponents
    if (most > 0 && (top == 2047 || top - bottom > kProductSpread)) {
      auto* tables = reinterpret_cast<Entry*>(digits);
      Factors<float, false> factors;
      factors.load_from(a, row, tile * kTile + threadIdx.x * 4);
      const double p[1][4] = {{factors.product(0), factors.product(1), factors.product(2), factors.product(3)}};
      tabulate<float>(p, reinterpret_cast<Quarter<Entry>*>(tables) + threadIdx.x * 4);
      __syncthreads();
      for (int task = threadIdx.x; task < tasks; task += kDotThreads) {
        const TaskLines line = lines[task];
        const auto* words = reinterpret_cast<const uint32_t*>(line.first + tile * line.step);
        double sum = 0;
#pragma unroll 1
        for (int w = 0; w < static_cast<int>(kTile) / 32; w++) {
          const Codes<Entry> code(words[w], static_cast<uint32_t>(w * (8 * 16 * sizeof(Entry))));
#pragma unroll
          for (int j = 0; j < 8; j += 2) sum += double{code.pick(tables, j, j).v[0] + code.pick(tables, j + 1, j + 1).v[0]};
        }
        sums[task] += sum;  // this thread's alone
      }
      if (tile + 1 < end) quads.load_from(a, row, tile + 1);
      continue;
    }

    // A product of p is p 2^(kProductBits - 1 - exponent of the largest), times 2^(7 - bit).
    const int shift = most > 0 ? kProductBits - 1 - (top - 1023) : 0;
    const int bit = static_cast<int>(threadIdx.x) % 8, word = static_cast<int>(threadIdx.x) / 8;
    const double up = power_of_two(shift + 7 - bit);
    uint32_t low[4], high[4], of[2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const auto scaled = static_cast<uint64_t>(llrint(products[i] * up));
      const uint64_t bytes = (scaled + kHalves) ^ kHalves;
      low[i] = static_cast<uint32_t>(bytes), high[i] = static_cast<uint32_t>(bytes >> 32);
    }
    gather_bytes(low, of[0]), gather_bytes(high, of[1]);
    uint32_t* to = digits[now] + (word % 4 / 2 * 8 + bit) * kDigitRow + word / 4 * 2 + word % 2;
#pragma unroll
    for (int digit = 0; digit < 8; digit++) to[digit * 8] = of[digit / 4][digit % 4];
    if (tile + 1 < end) quads.load_from(a, row, tile + 1);
    __syncthreads();

    const double down = power_of_two(-shift - 7 + lane % 4 * 16);
    for (int group = warp; group < groups; group += kDotWarps) {
      const uint32_t words[2][4] = {{next[0].x, next[0].y, next[0].z, next[0].w}, {next[1].x, next[1].y, next[1].z, next[1].w}};
      if (group + kDotWarps < groups) fetch(tile, group + kDotWarps);
      __syncwarp();        // for the products, lanes must have come together
      int sum[2][4] = {};  // two chains, that one product need not wait for the one before
#pragma unroll
      for (int c = 0; c < 4; c += 2)
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const uint32_t* mine = digits[now] + (c / 2 * 8 + i) * kDigitRow + lane * 2;
          const Pack<uint32_t, 2> pack = *reinterpret_cast<const Pack<uint32_t, 2>*>(mine);
          const uint32_t pick = 0x01010101u << i, b[2] = {pack.v[0], pack.v[1]};
          const uint32_t bits[4] = {words[0][c] & pick, words[1][c] & pick, words[0][c + 1] & pick, words[1][c + 1] & pick};
          multiply_bytes(sum[c / 2], bits, b);
        }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int64_t pair = int64_t{sum[0][i * 2] + sum[1][i * 2]} + int64_t{sum[0][i * 2 + 1] + sum[1][i * 2 + 1]} * 256;
        pairs[i][group * kWarpSize + lane] += static_cast<double>(pair) * down;  // this thread's alone
      }
    }
  }
  __syncthreads();
  for (int task = threadIdx.x; task < tasks; task += kDotThreads) {
    const double* pair = pairs[task / 8 % 2] + task / kProductTasks * kWarpSize + task % 8 * kPairs;
    a.sums.put(row, part, first + task, ((pair[0] + pair[1]) + (pair[2] + pair[3])) + sums[task]);
  }
}

}  // namespace

void dot_by_products(const Place& place, const Bank& bank, const Dot& dot, int64_t rows, const Strides& strides) {
  // as many blocks as there is room for at once, which are long
  dot_rows(place, bank, dot, rows, strides, int64_t{place.processors()} * kProductBlocksAtOnce, [&](const Dot& some, dim3 grid) {
    bank.with_table([&](const auto& table) {
      place.launch(dot_product_kernel<std::decay_t<decltype(table)>>, grid, kDotThreads, 0, table, some);
    });
  });
}

}  // namespace superposition
