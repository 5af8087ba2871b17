// superpose by tables, for the kernel of its own and for alphas that digits cannot hold.
//
// A team of sixteen threads takes a tile, a word of 32 weights a thread, whose sums it holds in registers. Four words,
// one a task, are turned into four words of eight codes each, one a weight: for 128 bits 16 operations, then 48 that make offsets
// of them, 32 loads from shared memory and 32 additions.
//
// Where there are few tiles, several teams share one, each with its slice of the tasks: slices are added in order at the end.
#pragma once
#include "superpose.h"
#include "superpose_sums_of_four.h"

namespace superposition {

constexpr int kMixThreads = 256;
constexpr int kTeam = static_cast<int>(kTileBytes) / 4;  // threads
constexpr int kTeams = kMixThreads / kTeam;
constexpr int kGroups = static_cast<int>(kBlockTasks) / 4;  // tables of a block of the bank
constexpr int kStaged = 32;                                 // blocks of the bank whose tables are there at a time

// The sums of a row for the tiles from the first on, as many as the teams hold, of weights below `end`. memory: kTeams * kTile W;
// opened_words: [kTeams].
template <class W, class Table>
__device__ __forceinline__ void mix_by_tables(const Table& bank, const Mix& a, int64_t row, int64_t first_tile, int64_t end,
                                              W* memory, uint32_t (*opened_words)[kTeam]) {
  using Entry = Pack<W, 1>;
  Entry* tables = reinterpret_cast<Entry*>(memory);  // first the tables, then the sums of every team
  const int team = threadIdx.x / kTeam, word = threadIdx.x % kTeam;
  const int slices = 1 << a.log_slices, slice = team & (slices - 1), tiles_here = kTeams >> a.log_slices;
  const int64_t tile = first_tile + (team >> a.log_slices);

  W sum[32] = {};
  uint32_t opened = 0;
  for (int first = 0; first < bank.blocks; first += kStaged) {
    const int blocks = min(kStaged, bank.blocks - first);
    __syncthreads();
    for (int group = threadIdx.x; group < blocks * kGroups; group += kMixThreads) {
      const BankBlock& block = bank.block[first + group / kGroups];
      const int task = group % kGroups * 4;
      W alphas[1][4];
      a.load_alphas(row * bank.tasks + block.first + task, block.tasks - task, alphas[0]);
      tabulate<W>(alphas, reinterpret_cast<Quarter<Entry>*>(tables) + group * 4);
    }
    __syncthreads();
    if (tile * kTile >= end) continue;

    // A slice takes every so many groups of a block, of the next block those one further on: also many small blocks keep all
    // slices at work. Two slices of a warp have groups of different parity, whose tables lie in different banks.
    int block = -1, group = kGroups, tasks = 0;
    const uint32_t* line = nullptr;
    uint32_t next[4], table_next = 0;
    int left_next = 0;
    const auto fetch = [&] {
      group += slices, line += slices * 4 * kTeam;
      if (group >= kGroups) {
        block++, group = (slice - block) & (slices - 1);
        const BankBlock& entered = bank.block[first + block];
        tasks = entered.tasks;
        const uint64_t before = static_cast<uint64_t>(static_cast<uint32_t>(tile)) * (tasks * uint32_t{kTileBytes});
        line = reinterpret_cast<const uint32_t*>(entered.data + before) + (group * 4 * kTeam + word);
      }
      left_next = tasks - group * 4;
      table_next = static_cast<uint32_t>((block * kGroups + group) * (16 * sizeof(Entry)));
      if (left_next >= 4) {
#pragma unroll
        for (int t = 0; t < 4; t++) next[t] = __ldg(line + t * kTeam);
      } else {
#pragma unroll
        for (int t = 0; t < 4; t++) next[t] = t < left_next ? __ldg(line + t * kTeam) : 0;
      }
    };
    fetch();
    for (int round = (blocks * kGroups) >> a.log_slices; round > 0; round--) {
      const uint32_t w[4] = {next[0], next[1], next[2], next[3]}, table = table_next;
      const int left = left_next;
      if (round > 1) fetch();
      if (left <= 0) continue;
      opened |= w[0] | w[1] | w[2] | w[3];
      // Pairs of bits of two tasks, for even and odd weights; then codes: nibble j of codes[i] is that of weight 4 j + i.
      constexpr uint32_t kOne = 0x55555555u, kTwo = 0x33333333u;
      const auto mix = [](uint32_t x, uint32_t y, uint32_t of_x) { return ((x ^ y) & of_x) ^ y; };
      const uint32_t low_even = mix(w[0], w[1] << 1, kOne), low_odd = mix(w[0] >> 1, w[1], kOne);
      const uint32_t high_even = mix(w[2], w[3] << 1, kOne), high_odd = mix(w[2] >> 1, w[3], kOne);
      const uint32_t codes[4] = {mix(low_even, high_even << 2, kTwo), mix(low_odd, high_odd << 2, kTwo),
                                 mix(low_even >> 2, high_even, kTwo), mix(low_odd >> 2, high_odd, kTwo)};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const Codes<Entry> code(codes[i], table);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          sum[4 * j + i] += code.pick(tables, j).v[0];
        }
      }
    }
  }

  // Through shared memory, where a thread finds the weights that lie side by side. The order within a word keeps a warp's threads
  // off each other's banks when they write, and changes nothing when they read.
  const auto place_of = [](int any_team, int at) {
    return any_team * static_cast<int>(kTile) + (at & ~31) + ((at & 31) ^ (at >> 5 | (any_team & 1) << 4));
  };
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 32; i++) memory[place_of(team, word * 32 + i)] = sum[i];
  opened_words[team][word] = opened;
  __syncthreads();
  by_dtype(a.weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kAtOnce = 8;  // loads of weights under way
    const int64_t begin = first_tile * kTile, here = min(tiles_here * kTile, end - begin);
    const T* from = static_cast<const T*>(a.weight.data) + begin;
    T* to = static_cast<T*>(a.out) + row * a.n + begin;
    for (int base = threadIdx.x; base < here; base += kMixThreads * kAtOnce) {
      T weights[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (base + i * kMixThreads < here) weights[i] = from[base + i * kMixThreads];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int item = base + i * kMixThreads, at = item % static_cast<int>(kTile);
        if (item >= here) break;
        const int first_team = item / static_cast<int>(kTile) << a.log_slices;
        const W weight = widen<W>(weights[i]), tasks = static_cast<W>(bank.tasks);
        if (slices == 1) {
          const bool open = opened_words[first_team][at >> 5] >> (at & 31) & 1;
          const W mix = memory[place_of(first_team, at)];
          to[item] = narrow<T>(open ? weight * (a.alphas.data ? mix : mix / tasks) : W{});
          continue;
        }
        uint32_t bits = 0;
        W part[4] = {};
#pragma unroll 1
        for (int s = 0; s < slices; s += 4) {
#pragma unroll
          for (int j = 0; j < 4; j++) {
            bits |= opened_words[first_team + s + j][at >> 5];
            part[j] += memory[place_of(first_team + s + j, at)];
          }
        }
        const bool open = bits >> (at & 31) & 1;
        if (a.alphas.data) {  // in float64 where the numbers are largest: one rounding is left of the last sums and the product
          const double mix = (double{part[0]} + double{part[1]}) + (double{part[2]} + double{part[3]});
          to[item] = narrow<T>(open ? double{weight} * mix : 0.0);
        } else {  // counts, which are exact, and what superpose_counts makes of them
          const W count = (part[0] + part[1]) + (part[2] + part[3]);
          to[item] = narrow<T>(open ? weight * (count / tasks) : W{});
        }
      }
    }
  });
}

}  // namespace superposition
