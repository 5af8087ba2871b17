// superpose_grad by tables, and alpha_grad of few rows.
//
// A block makes the tables of one tile after another, a thread one for its four weights, and its warps take 32 tasks at a time, a
// task a thread: all threads look into the same table. The sums of a table are taken in float64 and rounded to float once; two
// looked-up ones are added as floats, all further in float64. That is two roundings of a number, where the reference has one, of
// the products. For 32 tasks of a tile the look-ups keep the shared memory busy for 128 clocks, their conversions to float64 the
// converters for as many, and the schedulers for about 170.
#include "superpose_grad.h"

namespace superposition {
namespace {

template <class W, bool Outer, class Table>
__global__ void __launch_bounds__(kDotThreads) dot_kernel(const __grid_constant__ Table bank, const Dot a) {
  using Entry = Pack<W, 1>;
  alignas(16) __shared__ Entry tables[kDotThreads * 16];
  __shared__ TaskLines lines[kDotTasks];
  __shared__ double sums[kDotTasks];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int part = static_cast<int>(blockIdx.x % a.sums.parts);
  const int64_t row = blockIdx.x / a.sums.parts;
  const int first = blockIdx.y * kDotTasks, tasks = min(kDotTasks, bank.tasks - first);
  const int64_t begin = part * a.tiles_a_part, end = min(a.tiles, begin + a.tiles_a_part);
  for (int i = threadIdx.x; i < tasks; i += kDotThreads) lines[i] = bank.task(first + i);
  for (int i = threadIdx.x; i < kDotTasks; i += kDotThreads) sums[i] = 0;

  // A round is half a tile of 32 tasks, eight words a task: a whole sector of memory. Where there are few groups of tasks, two
  // warps
  // share one.
  const int groups = (tasks + kWarpSize - 1) / kWarpSize, log_shares = groups > 2 ? 0 : 1;
  const int share = warp & log_shares, log_halves = 1 - log_shares, halves = 1 << log_halves;
  const int group_step = kDotWarps >> log_shares, first_group = warp >> log_shares;
  const int rounds = first_group < groups ? ((groups - 1 - first_group) / group_step + 1) << log_halves : 0;
  uint4 next[2];
  const auto fetch = [&](int64_t tile, int round) {
    const int task = (first_group + (round >> log_halves) * group_step) * kWarpSize + lane;
    if (task >= tasks) {
      next[0] = next[1] = uint4{};
      return;
    }
    const TaskLines line = lines[task];
    const auto* from = reinterpret_cast<const uint4*>(line.first + tile * line.step) + (share + (round & (halves - 1))) * 2;
    next[0] = __ldg(from), next[1] = __ldg(from + 1);
  };

  Factors<W, Outer> factors;
  if (begin < end) factors.load_from(a, row, begin * kTile + threadIdx.x * 4);
  for (int64_t tile = begin; tile < end; tile++) {
    __syncthreads();
    if (rounds > 0) fetch(tile, 0);
    const typename Factors<W, Outer>::P p[1][4] = {
        {factors.product(0), factors.product(1), factors.product(2), factors.product(3)}};
    tabulate<W>(p, reinterpret_cast<Quarter<Entry>*>(tables) + threadIdx.x * 4);
    if (tile + 1 < end) factors.load_from(a, row, (tile + 1) * kTile + threadIdx.x * 4);
    __syncthreads();
    double sum = 0, sum_odd = 0;
    for (int round = 0; round < rounds; round++) {
      const uint32_t words[8] = {next[0].x, next[0].y, next[0].z, next[0].w, next[1].x, next[1].y, next[1].z, next[1].w};
      if (round + 1 < rounds) fetch(tile, round + 1);
      const int half = round & (halves - 1);
      const auto table = static_cast<uint32_t>((share + half) * (kDotThreads / 2 * 16 * sizeof(Entry)));
#pragma unroll
      for (int w = 0; w < 8; w++) {
        const Codes<Entry> code(words[w], table);
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
          const int further = w * 8 + j;
          sum += double{code.pick(tables, j, further).v[0] + code.pick(tables, j + 1, further + 1).v[0]};
          sum_odd += double{code.pick(tables, j + 2, further + 2).v[0] + code.pick(tables, j + 3, further + 3).v[0]};
        }
      }
      if (half == halves - 1) {
        const int group = first_group + (round >> log_halves) * group_step;
        sums[(share * groups + group) * kWarpSize + lane] += sum + sum_odd;  // this thread's alone
        sum = sum_odd = 0;
      }
    }
  }
  __syncthreads();
  for (int task = threadIdx.x; task < tasks; task += kDotThreads) {
    double sum = sums[task];
    for (int s = 1; s < 1 << log_shares; s++) sum += sums[s * groups * kWarpSize + task];
    a.sums.put(row, part, first + task, sum);
  }
}

template <class W, bool Outer>
void rows_by_tables(const Place& place, const Bank& bank, const Dot& dot, int64_t rows, const Strides& strides) {
  // more blocks than there is room for at once, of which fewer wait for their memory
  dot_rows(place, bank, dot, rows, strides, int64_t{place.processors()} * 8, [&](const Dot& some, dim3 grid) {
    bank.with_table([&](const auto& table) {
      place.launch(dot_kernel<W, Outer, std::decay_t<decltype(table)>>, grid, kDotThreads, 0, table, some);
    });
  });
}

}  // namespace

void dot_by_tables(const Place& place, const Bank& bank, const Dot& dot, int64_t rows, const Strides& strides) {
  rows_by_tables<double, false>(place, bank, dot, rows, strides);
}

void alpha_grad_by_tables(const Place& place, const Bank& bank, const Dot& dot, int64_t rows, const Strides& strides, bool wide) {
  if (wide)
    rows_by_tables<double, true>(place, bank, dot, rows, strides);
  else
    rows_by_tables<float, true>(place, bank, dot, rows, strides);
}

}  // namespace superposition
