// superpose by products of matrices (superpose_products.h), for several rows of alphas.
//
// There are as many blocks as there is room for at once, and their shares differ by half a tile at most. A warp takes whole
// halves of its block's share while there is one for every warp; the rounds of those that are left are divided evenly, so that a
// warp may begin or end within a half. Loads run ahead of the products, from one half into the next. For one row, whole
// tiles are quicker (300 x 784, K = 250, an H200: 11.5 us against 12.7), for sixteen even shares (72 against 99).
#include "superpose_products.h"

namespace superposition {
namespace {

constexpr int kRoundDigits = kRound / 4 * 8;  // words of the digits of a round: [task / 4][digit]

// What the blocks of a row do: the first `larger` one half more than the others. A round is a block of the bank, or half of one.
struct Shares {
  int32_t fewest, larger;
  int32_t rounds, log_rounds;  // of a half; of a block of the bank
};

// What a warp leaves of a half that another began: two sums of four digits for each of eight weights of a lane.
struct Left {
  int64_t part[16][kWarpSize];
  uint32_t opened[kWarpSize];
};

// What spills lies where a half begins and ends: mix_rows_kernel's main loop keeps its registers.
template <class Table>
__global__ void __launch_bounds__(kMixThreads, kMixBlocks)
    mix_rows_kernel(const __grid_constant__ Table bank, const Mix a, const Shares shares) {
  SK_DYNAMIC_SHARED(Left, memory);  // what each warp leaves, then digits; or what tables need
  uint32_t* digits = reinterpret_cast<uint32_t*>(memory + kMixWarps);
  __shared__ uint32_t opened_words[kTeams][kTeam];
  __shared__ uint32_t extremes[2][kMixWarps];

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int word = lane / 4, quad = lane % 4;  // of a round: this lane's words, and the first and second four of its tasks
  const int64_t row = blockIdx.x % a.rows;     // rows are neighbours: the bits come from the L2 cache
  const int share = static_cast<int>(blockIdx.x / a.rows), rounds = shares.rounds;
  const int first_half = share * shares.fewest + min(share, shares.larger);
  const int halves = shares.fewest + (share < shares.larger ? 1 : 0);

  // This warp's: every kMixWarps-th half, and of the rounds of the others a range.
  const int whole = halves / kMixWarps, rest_half = first_half + whole * kMixWarps;
  const auto begin_of = [&](int any_warp) { return halves % kMixWarps * rounds * any_warp / kMixWarps; };
  const int begin = begin_of(warp), units = whole * rounds + begin_of(warp + 1) - begin;
  struct {
    int half, at, whole;
  } now{first_half + warp, 0, whole};
  const auto enter = [&](auto& to) {  // the next half
    to.at = 0;
    if (to.whole == 0)
      to.half++;
    else if (--to.whole > 0)
      to.half += kMixWarps;
    else
      to.half = rest_half + begin / rounds, to.at = begin % rounds;
  };
  if (whole == 0) now.whole = 1, enter(now);
  // Two halves of a tile lie side by side in memory: warps that take parts of both read the same tasks at about the same time.
  const int turn = whole == 0 ? kMixWarps % halves * rounds / kMixWarps : 0;
  const auto round_of = [&](int half, int at) {
    const int round = at + (half & 1 ? turn : 0);
    return round < rounds ? round : round - rounds;
  };

  auto ahead = now;
  int fetched = 0;
  uint32_t next[2][8];
  const auto fetch = [&](uint32_t (&to)[8]) {
    if (fetched == units) return;
    fetched++;
    const int round = round_of(ahead.half, ahead.at);
    const BankBlock& block = bank.block[round >> shares.log_rounds];
    const int task = (round & shares.log_rounds) * kRound;
    fetch_round(block, ahead.half >> 1, ahead.half & 1, task, to);
    if (++ahead.at == rounds) enter(ahead);
  };
  fetch(next[0]), fetch(next[1]);

  int shift;
  if (!find_shift(a, row, bank.tasks, extremes, shift)) {
    const int64_t end_tile = (first_half + halves + 1) / 2, end = min(end_tile * kTile, a.n);
    for (int64_t tile = (first_half + 1) / 2; tile < end_tile; tile += kTeams >> a.log_slices)
      mix_by_tables<float>(bank, a, row, tile, end, reinterpret_cast<float*>(memory), opened_words);
    return;
  }
  for (int four = threadIdx.x; four < rounds * (kRound / 4); four += kMixThreads) {
    const int round = four / (kRound / 4);
    const BankBlock& block = bank.block[round >> shares.log_rounds];
    const int task = (round & shares.log_rounds) * kRound + four % (kRound / 4) * 4;
    put_digits(a, row * bank.tasks + block.first + task, block.tasks - task, shift, digits + four * 8);
  }
  __syncthreads();

  int64_t part[2][8];
  uint32_t opened = 0;
  bool began = false, ended = false;
  const auto write = [&] {
    double total[8];
    add_halves(a, part, shift, total);
    const int64_t at = int64_t{now.half} * kHalf + lane * 8, left = a.n - at;
    if (left <= 0) return;
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
  };
  for (int done = 0; done < units;) {
    const int count = min(rounds - now.at, units - done);
    int sum[16][4] = {};
    opened = 0;
    __syncwarp();  // for the products, lanes must have come together
    for (int unit = 0; unit < count; unit += 2) {
#pragma unroll
      for (int s = 0; s < 2; s++) {
        if (unit + s >= count) break;
        uint32_t bytes[2][4];
        gather_round(next[s], bytes, opened);
        const uint32_t* mine = digits + (round_of(now.half, now.at + unit + s) * kRoundDigits + quad * 8 + word);
        const uint32_t b[2] = {mine[0], mine[4 * 8]};
        fetch(next[s]);
        multiply_round(sum, bytes, b);
      }
    }
    if (count & 1) {
#pragma unroll
      for (int t = 0; t < 8; t++) {
        const uint32_t first = next[0][t];
        next[0][t] = next[1][t], next[1][t] = first;
      }
    }
    began = now.at == 0, ended = now.at + count == rounds;
    done += count;

    add_digits(sum, part, opened);
    if (!began) {
#pragma unroll
      for (int i = 0; i < 16; i++) memory[warp].part[i][lane] = part[i / 8][i % 8];
      memory[warp].opened[lane] = opened;
    } else if (ended) {
      write();
    }
    if (done < units) enter(now);
  }
  __syncthreads();
  if (units == 0 || !began || ended) return;
  for (int other = warp + 1; other < kMixWarps && begin_of(other) < (now.half - rest_half + 1) * rounds; other++) {
    if (begin_of(other) == begin_of(other + 1)) continue;
#pragma unroll
    for (int i = 0; i < 16; i++) part[i / 8][i % 8] += memory[other].part[i][lane];
    opened |= memory[other].opened[lane];
  }
  write();
}

// Rounds of half a tile, and the logarithm of how many a block of the bank has.
std::pair<int32_t, int32_t> rounds_of(const Bank& bank) {
  int32_t rounds = 0, log = 0;
  bank.with_table([&](const auto& table) {
    for (int b = 0; b < table.blocks; b++) log |= table.block[b].tasks > kRound ? 1 : 0;
    rounds = table.blocks << log;
    if (log && table.block[table.blocks - 1].tasks <= kRound) rounds--;
  });
  return {rounds, log};
}

size_t shared_bytes(int32_t rounds) {
  return std::max(sizeof(Left) * kMixWarps + size_t{kRoundDigits} * 4 * static_cast<size_t>(rounds),
                  size_t{kTeams} * kTile * sizeof(float));
}

}  // namespace

bool digits_fit(const Place& place, const Bank& bank) {
  return shared_bytes(rounds_of(bank).first) <= place.shared_memory() - (2 << 10);
}

void mix_rows_by_products(const Place& place, const Bank& bank, Mix mix) {
  mix.log_slices = log_of_slices(place, tiles(mix.n), bank.tasks());
  const int64_t halves = ceil_div(mix.n, kHalf), room = int64_t{place.processors()} * 2;
  // Of as few waves of blocks as leave little room empty.
  int64_t blocks = 0;
  for (int waves = 1; waves <= 8; waves++) {
    blocks = std::clamp<int64_t>(room * waves / mix.rows, 1, halves);
    if (blocks == halves || ceil_div(blocks * mix.rows, room) * room * 9 <= blocks * mix.rows * 10) break;
  }
  STD_TORCH_CHECK(halves <= INT32_MAX && blocks * mix.rows <= INT32_MAX, "superpose: ", mix.rows, " rows of ", mix.n,
                  " weights are too many");
  const auto [rounds, log_rounds] = rounds_of(bank);
  const Shares shares{static_cast<int32_t>(halves / blocks), static_cast<int32_t>(halves % blocks), rounds, log_rounds};
  bank.with_table([&](const auto& table) {
    place.launch(mix_rows_kernel<std::decay_t<decltype(table)>>, dim3(static_cast<unsigned>(blocks * mix.rows)), kMixThreads,
                 shared_bytes(shares.rounds), table, mix, shares);
  });
}

}  // namespace superposition
