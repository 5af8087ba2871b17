// superpose by products of matrices: out = (weights x tasks) (tasks x 8 digits of alpha).
//
// A warp takes half a tile, eight words, and 32
// tasks at a time: for 8,192 bits 16 operations that gather the bytes of four tasks, 64 that pick a bit of each byte, and 16
// products. The i-th bit of a byte counts 2^i, which is taken back at the end. Sums are integers, so that no order of them
// matters. For so many bits the memory of an H100 needs about 78 clocks of a processor, whose schedulers need about 35.
#include "superpose_digits.h"
#include "superpose_tables.h"

namespace superposition {
namespace {

constexpr int kMixWarps = kMixThreads / kWarpSize;
constexpr int kHalf = static_cast<int>(kTile) / 2;  // weights of a warp
constexpr int kRound = 32;                          // tasks of a product
constexpr int kRounds = static_cast<int>(kBlockTasks) / kRound;
constexpr int kAlphaBits = 62;  // of a scaled alpha, its sign aside

// Blocks on a multiprocessor: two spill a little beside the main loop on sm_90, where they were measured, and too much elsewhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kMixBlocks = 1;
#else
constexpr int kMixBlocks = 2;
#endif

// What spills lies where a block begins and ends: mix_kernel's main loop keeps its registers.
template <class Table>
__global__ void __launch_bounds__(kMixThreads, kMixBlocks) mix_kernel(const __grid_constant__ Table bank, const Mix a) {
  SK_DYNAMIC_SHARED(float, memory);  // kTeams * kTile: digits, [task / 4][digit], then sums of warps; or what tables need
  uint32_t* digits = reinterpret_cast<uint32_t*>(memory);
  constexpr int kDigits = kStaged * static_cast<int>(kBlockTasks) / 4 * 8;
  double* sums = reinterpret_cast<double*>(digits + kDigits);  // [warp][i][lane]
  __shared__ uint32_t opened_words[kTeams][kTeam];
  __shared__ uint32_t extremes[2][kMixWarps];

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int word = lane / 4, quad = lane % 4;  // of a round: this lane's words, and the first and second four of its tasks
  const int sharing = 1 << a.log_warps, slice = warp & (sharing - 1), tiles_here = kMixWarps / 2 >> a.log_warps;
  const int64_t row = blockIdx.x % a.rows;  // rows are neighbours: the bits come from the L2 cache
  const int64_t begin = blockIdx.x / a.rows * a.groups_a_block, end = min(a.groups, begin + a.groups_a_block);
  double up = 1, down = 1;
  bool scaled = false, staged = false;

  for (int64_t group = begin; group < end; group++) {
    const int64_t half = group * (tiles_here * 2) + (warp >> a.log_warps), tile = half / 2;
    const int64_t first_weight = half * kHalf;
    int sum[16][4] = {};
    uint32_t opened = 0;
    for (int first = 0; first < bank.blocks; first += kStaged) {
      const int blocks = min(kStaged, bank.blocks - first);
      // Every so many rounds are this warp's; in one block of few tasks the first, in the next the second, so that many small
      // blocks keep all warps at work.
      const int rounds = first_weight < a.n ? (blocks * kRounds - slice + sharing - 1) >> a.log_warps : 0;
      const auto second_of = [&](int at, int round) { return (at ^ (sharing > 1 ? round : 0)) & 1; };
      uint32_t next[2][8];
      const auto fetch = [&](int round, uint32_t (&to)[8]) {
        const int at = round * sharing + slice;
        const BankBlock& block = bank.block[first + at / kRounds];
        const int task = second_of(at, round) * kRound;
        const auto* from = reinterpret_cast<const uint32_t*>(block.data + tile * (block.tasks * kTileBytes)) +
                           ((task + quad * 4) * kTeam + static_cast<int>(half % 2) * (kTeam / 2) + word);
        if (block.tasks - task >= kRound) {
#pragma unroll
          for (int t = 0; t < 8; t++) to[t] = __ldg(from + (t % 4 + t / 4 * 16) * kTeam);
        } else {
          const int left = block.tasks - task - quad * 4;
#pragma unroll
          for (int t = 0; t < 8; t++) to[t] = t % 4 + t / 4 * 16 < left ? __ldg(from + (t % 4 + t / 4 * 16) * kTeam) : 0;
        }
      };
#pragma unroll
      for (int ahead = 0; ahead < 2; ahead++)
        if (ahead < rounds) fetch(ahead, next[ahead]);

      if (!scaled) {
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
            const int64_t end_tile = min(end * tiles_here, (a.n + kTile - 1) / kTile);
            for (int64_t other = begin * tiles_here; other < end_tile; other += kTeams >> a.log_slices)
              mix_by_tables<float>(bank, a, row, other, memory, opened_words);
            return;
          }
          up = power_of_two(127 + kAlphaBits - 1 - top), down = power_of_two(top - 127 - (kAlphaBits - 1));
        }
        scaled = true;
      }
      if (!staged) {
        __syncthreads();  // whoever read the digits before is done
        for (int four = threadIdx.x; four < blocks * kGroups; four += kMixThreads) {
          const BankBlock& block = bank.block[first + four / kGroups];
          const int task = four % kGroups * 4;
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
        staged = bank.blocks <= kStaged;
      }

      __syncwarp();  // for the products, lanes must have come together
      for (int round = 0; round < rounds; round += 2) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
          if (round + s >= rounds) break;
          uint32_t bytes[2][4];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const uint32_t words[4] = {next[s][i * 4], next[s][i * 4 + 1], next[s][i * 4 + 2], next[s][i * 4 + 3]};
            gather_bytes(words, bytes[i]);
            opened |= words[0] | words[1] | words[2] | words[3];
          }
          const int at = (round + s) * sharing + slice;
          const uint32_t* mine = digits + ((at / kRounds * kRounds + second_of(at, round + s)) * kRound / 4 + quad) * 8 + word;
          const uint32_t b[2] = {mine[0], mine[4 * 8]};
          if (round + s + 2 < rounds) fetch(round + s + 2, next[s]);
#pragma unroll
          for (int p = 0; p < 16; p++) {  // weights 2 p and 2 p + 1 of every word
            const uint32_t even = 0x01010101u << p % 4 * 2, odd = even << 1;
            const uint32_t bits[4] = {bytes[0][p / 4] & even, bytes[0][p / 4] & odd, bytes[1][p / 4] & even,
                                      bytes[1][p / 4] & odd};
            multiply_bytes(sum[p], bits, b);
          }
        }
      }
    }

    // A lane has two digits of 32 weights of its word; in two exchanges the four lanes of a word make of them whole sums, each of
    // eight weights: those of its byte.
    opened |= __shfl_xor_sync(kAllLanes, opened, 1);
    opened |= __shfl_xor_sync(kAllLanes, opened, 2);
    opened = opened >> quad * 8 & 0xff;
    const bool odd = quad & 1, upper = quad & 2;
    const int digit = odd ? 1 << 16 : 1, next_digit = digit << 8;
    const double scale = down * (upper ? 4294967296.0 : 1.0);
    double part[2][8], total[8];
#pragma unroll
    for (int b = 0; b < 2; b++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const auto pair = [&](int weight) {
          const int* two = &sum[weight / 2][weight % 2 * 2];
          return int64_t{two[0]} * digit + int64_t{two[1]} * next_digit;
        };
        const int64_t first = pair(b * 16 + i), second = pair(b * 16 + 8 + i);
        const int64_t other = __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
        part[b][i] = static_cast<double>((odd ? second : first) + other) * scale;
      }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      total[i] = (upper ? part[1][i] : part[0][i]) + __shfl_xor_sync(kAllLanes, upper ? part[0][i] : part[1][i], 2);
      total[i] *= 1.0 / (1 << i);
    }
    if (sharing > 1) {
      __syncthreads();  // whoever read the sums before is done
#pragma unroll
      for (int i = 0; i < 8; i++) sums[(warp * 8 + i) * kWarpSize + lane] = total[i];
      opened_words[warp * 2 + lane / 16][lane % 16] = opened;
      __syncthreads();
      if (slice > 0) continue;
      for (int other = warp + 1; other < warp + sharing; other++) {
#pragma unroll
        for (int i = 0; i < 8; i++) total[i] += sums[(other * 8 + i) * kWarpSize + lane];
        opened |= opened_words[other * 2 + lane / 16][lane % 16];
      }
    }
    const int64_t at = first_weight + lane * 8, left = a.n - at;
    if (left <= 0) continue;
    float weight[8];
    load<8>(a.weight, at, left, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      // of counts, what superpose_counts makes of them
      weight[i] = a.alphas.data ? static_cast<float>(double{weight[i]} * total[i])
                                : weight[i] * (static_cast<float>(total[i]) / static_cast<float>(bank.tasks));
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
  const int64_t n = mix.n;
  bank.with_table([&](const auto& table) {
    // As few warps share half a tile as give every processor its two blocks, and none has less than two rounds.
    const auto groups = [&](int log) { return ceil_div(tiles(n), kMixWarps / 2 >> log); };
    const int64_t at_once = int64_t{place.processors()} * 2;
    while (mix.log_warps < 2 && groups(mix.log_warps) * 4 < at_once * 3 && table.blocks * kRounds >= 4 << mix.log_warps)
      mix.log_warps++;
    mix.groups = groups(mix.log_warps);
    mix.groups_a_block = std::max<int64_t>(1, ceil_div(mix.groups, at_once * 6));
    mix.log_slices = mix.log_warps == 0 && bank.tasks() <= 1024 ? 2 : 4;
    const int64_t blocks = ceil_div(mix.groups, mix.groups_a_block) * mix.rows;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "superpose: ", mix.rows, " rows of ", n, " weights are too many");
    place.launch(mix_kernel<std::decay_t<decltype(table)>>, dim3(static_cast<unsigned>(blocks)), kMixThreads,
                 kTeams * kTile * sizeof(float), table, mix);
  });
}

}  // namespace superposition
