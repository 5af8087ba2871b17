// superpose by products of matrices (superpose_products.h), whole tiles a block: for one row of alphas, and for banks whose
// digits do not lie in shared memory all at once.
#include "superpose_products.h"

namespace superposition {
namespace {

constexpr int kRounds = static_cast<int>(kBlockTasks) / kRound;
constexpr int kDigits = kStaged * static_cast<int>(kBlockTasks) / 4 * 8;  // words
constexpr int kMostLogWarps = 2;

// A block takes so many groups of tiles, one after the other; so many warps share half a tile of a group.
struct Groups {
  int64_t all, a_block;
  int32_t log_warps;
};

// What a warp leaves for the first of those that share its half.
struct Slice {
  int64_t part[16][kWarpSize];
};
constexpr int kMostSlices = kMixWarps - (kMixWarps >> kMostLogWarps);

// What spills lies where a block begins and ends: mix_kernel's main loop keeps its registers.
template <class Table>
__global__ void __launch_bounds__(kMixThreads, kMixBlocks)
    mix_kernel(const __grid_constant__ Table bank, const Mix a, const Groups groups) {
  SK_DYNAMIC_SHARED(Slice, slices);  // then the digits, [task / 4][digit]; or what tables need
  uint32_t* digits = reinterpret_cast<uint32_t*>(slices + kMostSlices);
  __shared__ uint32_t opened_words[kTeams][kTeam];
  __shared__ uint32_t extremes[2][kMixWarps];

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int word = lane / 4, quad = lane % 4;  // of a round: this lane's words, and the first and second four of its tasks
  const int sharing = 1 << groups.log_warps, slice = warp & (sharing - 1), tiles_here = kMixWarps / 2 >> groups.log_warps;
  const int64_t row = blockIdx.x % a.rows;  // rows are neighbours: the bits come from the L2 cache
  const int64_t begin = blockIdx.x / a.rows * groups.a_block, end = min(groups.all, begin + groups.a_block);
  int shift = 0;
  bool scaled = false, staged = false;

  for (int64_t group = begin; group < end; group++) {
    const int64_t half = group * (tiles_here * 2) + (warp >> groups.log_warps), tile = half / 2;
    int sum[16][4] = {};
    uint32_t opened = 0;
    for (int first = 0; first < bank.blocks; first += kStaged) {
      const int blocks = min(kStaged, bank.blocks - first);
      // Every so many rounds are this warp's; in one block of few tasks the first, in the next the second, so that many small
      // blocks keep all warps at work.
      const int rounds = half * kHalf < a.n ? (blocks * kRounds - slice + sharing - 1) >> groups.log_warps : 0;
      const auto second_of = [&](int at, int round) { return (at ^ (sharing > 1 ? round : 0)) & 1; };
      uint32_t next[2][8];
      const auto fetch = [&](int round, uint32_t (&to)[8]) {
        const int at = round * sharing + slice;
        fetch_round(bank.block[first + at / kRounds], tile, static_cast<int>(half % 2), second_of(at, round) * kRound, to);
      };
#pragma unroll
      for (int ahead = 0; ahead < 2; ahead++)
        if (ahead < rounds) fetch(ahead, next[ahead]);

      if (!scaled) {
        if (!find_shift(a, row, bank.tasks, extremes, shift)) {
          const int64_t end_tile = min(end * tiles_here, (a.n + kTile - 1) / kTile), end_weight = min(end_tile * kTile, a.n);
          for (int64_t other = begin * tiles_here; other < end_tile; other += kTeams >> a.log_slices)
            mix_by_tables<float>(bank, a, row, other, end_weight, reinterpret_cast<float*>(slices), opened_words);
          return;
        }
        scaled = true;
      }
      if (!staged) {
        __syncthreads();  // whoever read the digits before is done
        for (int four = threadIdx.x; four < blocks * kGroups; four += kMixThreads) {
          const BankBlock& block = bank.block[first + four / kGroups];
          const int task = four % kGroups * 4;
          put_digits(a, row * bank.tasks + block.first + task, block.tasks - task, shift, digits + four * 8);
        }
        __syncthreads();
        staged = bank.blocks <= kStaged;
      }

      __syncwarp();  // for the products, lanes must have come together
      for (int round = 0; round < rounds; round += 2) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
          if (round + s >= rounds) break;
          uint32_t bytes[2][4];
          gather_round(next[s], bytes, opened);
          const int at = (round + s) * sharing + slice;
          const uint32_t* mine = digits + ((at / kRounds * kRounds + second_of(at, round + s)) * kRound / 4 + quad) * 8 + word;
          const uint32_t b[2] = {mine[0], mine[4 * 8]};
          if (round + s + 2 < rounds) fetch(round + s + 2, next[s]);
          multiply_round(sum, bytes, b);
        }
      }
    }

    int64_t part[2][8];
    add_digits(sum, part, opened);
    if (sharing > 1) {
      const auto slice_of = [&](int any_warp) -> Slice& { return slices[any_warp - (any_warp >> groups.log_warps) - 1]; };
      __syncthreads();  // whoever read the slices before is done
      if (slice > 0) {
#pragma unroll
        for (int i = 0; i < 16; i++) slice_of(warp).part[i][lane] = part[i / 8][i % 8];
        opened_words[warp * 2 + lane / 16][lane % 16] = opened;
      }
      __syncthreads();
      if (slice > 0) continue;
      for (int other = warp + 1; other < warp + sharing; other++) {
#pragma unroll
        for (int i = 0; i < 16; i++) part[i / 8][i % 8] += slice_of(other).part[i][lane];
        opened |= opened_words[other * 2 + lane / 16][lane % 16];
      }
    }
    double total[8];
    add_halves(a, part, shift, total);
    const int64_t at = half * kHalf + lane * 8, left = a.n - at;
    if (left <= 0) continue;
    float weight[8];
    load<8>(a.weight, at, left, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      weight[i] = static_cast<float>(double{weight[i]} * total[i]);
      if (!(opened >> i & 1)) weight[i] = 0;
    }
    by_dtype(a.weight.dtype, [&](auto zero) {
      using T = decltype(zero);
      Pack<T, 8> result;
#pragma unroll
      for (int i = 0; i < 8; i++) result.v[i] = narrow<T>(weight[i]);
      store(static_cast<T*>(a.out) + row * a.n + at, left, result);
    });
  }
}

}  // namespace

void mix_by_products(const Place& place, const Bank& bank, Mix mix) {
  mix.log_slices = log_of_slices(place, tiles(mix.n), bank.tasks());
  bank.with_table([&](const auto& table) {
    // As few warps share half a tile as give every processor its two blocks, and none has less than two rounds.
    const auto groups_of = [&](int log) { return ceil_div(tiles(mix.n), kMixWarps / 2 >> log); };
    const int64_t at_once = int64_t{place.processors()} * 2;
    int log = 0;
    while (log < kMostLogWarps && groups_of(log) * 4 < at_once * 3 && table.blocks * kRounds >= 4 << log) log++;
    const Groups groups{groups_of(log), std::max<int64_t>(1, ceil_div(groups_of(log), at_once * 6)), log};
    const int64_t blocks = ceil_div(groups.all, groups.a_block) * mix.rows;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "superpose: ", mix.rows, " rows of ", mix.n, " weights are too many");
    constexpr size_t kShared = std::max(sizeof(Slice) * kMostSlices + kDigits * 4, size_t{kTeams} * kTile * sizeof(float));
    place.launch(mix_kernel<std::decay_t<decltype(table)>>, dim3(static_cast<unsigned>(blocks)), kMixThreads, kShared, table, mix,
                 groups);
  });
}

}  // namespace superposition
