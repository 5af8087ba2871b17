// superpose by products of matrices: out = (weights x tasks) (tasks x 8 digits of alpha).
//
// A warp takes half a tile, eight words, and 32 tasks at a time, a round: for 8,192 bits 16 operations that gather the bytes of
// four tasks, 64 that pick a bit of each byte, and 16 products. The i-th bit of a byte counts 2^i, which is taken back at the
// end. Sums are integers, so that it does not matter who adds which. For so many bits the memory of an H100 needs about 78 clocks
// of a processor, whose schedulers need about 35.
//
// There are as many blocks as there is room for at once, and their shares differ by half a tile at most. A warp takes whole
// halves of its block's share while there is one for every warp; the rounds of those that are left are divided evenly, so that a
// warp may begin or end within a half. Loads run ahead of the products, from one half into the next.
#include "superpose_digits.h"
#include "superpose_tables.h"

namespace superposition {
namespace {

constexpr int kMixWarps = kMixThreads / kWarpSize;
constexpr int kHalf = static_cast<int>(kTile) / 2;  // weights of a warp
constexpr int kRound = 32;                          // tasks of a product
constexpr int kAlphaBits = 62;                      // of a scaled alpha, its sign aside
constexpr int kRoundDigits = kRound / 4 * 8;        // words of the digits of a round: [task / 4][digit]

// Blocks on a multiprocessor: two spill a little beside the main loop on sm_90, where they were measured, and too much elsewhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kMixBlocks = 1;
#else
constexpr int kMixBlocks = 2;
#endif

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

// What spills lies where a half begins and ends: mix_kernel's main loop keeps its registers.
template <class Table>
__global__ void __launch_bounds__(kMixThreads, kMixBlocks)
    mix_kernel(const __grid_constant__ Table bank, const Mix a, const Shares shares) {
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
    const auto* from = reinterpret_cast<const uint32_t*>(block.data + int64_t{ahead.half >> 1} * (block.tasks * kTileBytes)) +
                       ((task + quad * 4) * kTeam + (ahead.half & 1) * (kTeam / 2) + word);
    if (block.tasks - task >= kRound) {
#pragma unroll
      for (int t = 0; t < 8; t++) to[t] = __ldg(from + (t % 4 + t / 4 * 16) * kTeam);
    } else {
      const int left = block.tasks - task - quad * 4;
#pragma unroll
      for (int t = 0; t < 8; t++) to[t] = t % 4 + t / 4 * 16 < left ? __ldg(from + (t % 4 + t / 4 * 16) * kTeam) : 0;
    }
    if (++ahead.at == rounds) enter(ahead);
  };
  fetch(next[0]), fetch(next[1]);

  // A common scale of the alphas, and their digits.
  double up = 1, down = 1;
  uint32_t most = 0, least = ~0u;
  for (int task = threadIdx.x * 4; a.alphas.data && task < bank.tasks; task += kMixThreads * 4) {
    float alphas[4];
    a.load_alphas(row * bank.tasks + task, bank.tasks - task, alphas);
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const uint32_t size = __float_as_uint(alphas[t]) & 0x7fffffffu;
      most = max(most, size);
      if (size) least = min(least, size);
    }
  }
  most = __reduce_max_sync(kAllLanes, most), least = __reduce_min_sync(kAllLanes, least);
  if (lane == 0) extremes[0][warp] = most, extremes[1][warp] = least;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kMixWarps; w++) most = max(most, extremes[0][w]), least = min(least, extremes[1][w]);
  if (most > 0) {
    const int top = static_cast<int>(most >> 23), bottom = static_cast<int>(least >> 23);
    if (top == 255 || bottom == 0 || top - bottom > kAlphaBits - 24) {  // the digits could not hold them
      const int64_t end_tile = (first_half + halves + 1) / 2, end = min(end_tile * kTile, a.n);
      for (int64_t tile = (first_half + 1) / 2; tile < end_tile; tile += kTeams >> a.log_slices)
        mix_by_tables<float>(bank, a, row, tile, end, reinterpret_cast<float*>(memory), opened_words);
      return;
    }
    up = power_of_two(127 + kAlphaBits - 1 - top), down = power_of_two(top - 127 - (kAlphaBits - 1));
  }
  for (int four = threadIdx.x; four < rounds * (kRound / 4); four += kMixThreads) {
    const int round = four / (kRound / 4);
    const BankBlock& block = bank.block[round >> shares.log_rounds];
    const int task = (round & shares.log_rounds) * kRound + four % (kRound / 4) * 4;
    float alphas[4];
    a.load_alphas(row * bank.tasks + block.first + task, block.tasks - task, alphas);
    uint32_t low[4], high[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const auto scaled_up = static_cast<uint64_t>(static_cast<int64_t>(double{alphas[t]} * up));
      const uint64_t bytes = (scaled_up + kHalves) ^ kHalves;
      low[t] = static_cast<uint32_t>(bytes), high[t] = static_cast<uint32_t>(bytes >> 32);
    }
    uint32_t of[2][4];
    gather_bytes(low, of[0]), gather_bytes(high, of[1]);
#pragma unroll
    for (int i = 0; i < 2; i++)
      reinterpret_cast<uint4*>(digits)[four * 2 + i] = make_uint4(of[i][0], of[i][1], of[i][2], of[i][3]);
  }
  __syncthreads();

  // A lane's two digits of 32 weights of its word; four digits of sixteen, of the first or second eight of either half of the
  // word: the lanes of a quad have the lower or upper digits.
  const bool odd = quad & 1, upper = quad & 2;
  int64_t part[2][8];
  uint32_t opened = 0;
  bool began = false, ended = false;
  const auto write = [&] {
    const int64_t at = int64_t{now.half} * kHalf + lane * 8, left = a.n - at;
    float weight[8];
    load<8>(a.weight, at, max(left, int64_t{0}), weight);
    const double scale = down * (upper ? 4294967296.0 : 1.0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const double other = __shfl_xor_sync(kAllLanes, static_cast<double>(upper ? part[0][i] : part[1][i]) * scale, 2);
      const double total = (static_cast<double>(upper ? part[1][i] : part[0][i]) * scale + other) * (1.0 / (1 << i));
      // of counts, what superpose_counts makes of them
      weight[i] = a.alphas.data ? static_cast<float>(double{weight[i]} * total)
                                : weight[i] * (static_cast<float>(total) / static_cast<float>(bank.tasks));
      if (!(opened >> i & 1)) weight[i] = 0;
    }
    if (left <= 0) return;
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
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const uint32_t words[4] = {next[s][i * 4], next[s][i * 4 + 1], next[s][i * 4 + 2], next[s][i * 4 + 3]};
          gather_bytes(words, bytes[i]);
          opened |= words[0] | words[1] | words[2] | words[3];
        }
        const uint32_t* mine = digits + (round_of(now.half, now.at + unit + s) * kRoundDigits + quad * 8 + word);
        const uint32_t b[2] = {mine[0], mine[4 * 8]};
        fetch(next[s]);
#pragma unroll
        for (int p = 0; p < 16; p++) {  // weights 2 p and 2 p + 1 of every word
          const uint32_t even = 0x01010101u << p % 4 * 2, odd_one = even << 1;
          const uint32_t bits[4] = {bytes[0][p / 4] & even, bytes[0][p / 4] & odd_one, bytes[1][p / 4] & even,
                                    bytes[1][p / 4] & odd_one};
          multiply_bytes(sum[p], bits, b);
        }
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

    // In an exchange the lanes of a quad make sums of four digits of those of two, each of sixteen weights.
    opened |= __shfl_xor_sync(kAllLanes, opened, 1);
    opened |= __shfl_xor_sync(kAllLanes, opened, 2);
    opened = opened >> quad * 8 & 0xff;
    const int digit = odd ? 1 << 16 : 1, next_digit = digit << 8;
#pragma unroll
    for (int b = 0; b < 2; b++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const auto pair = [&](int weight) {
          const int* two = &sum[weight / 2][weight % 2 * 2];
          return int64_t{two[0]} * digit + int64_t{two[1]} * next_digit;
        };
        const int64_t first = pair(b * 16 + i), second = pair(b * 16 + 8 + i);
        part[b][i] = (odd ? second : first) + __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
      }
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

void mix_by_products(const Place& place, const Bank& bank, Mix mix) {
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
    place.launch(mix_kernel<std::decay_t<decltype(table)>>, dim3(static_cast<unsigned>(blocks * mix.rows)), kMixThreads,
                 shared_bytes(shares.rounds), table, mix, shares);
  });
}

}  // namespace superposition
