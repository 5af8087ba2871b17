// superpose, superpose_counts, superpose_grad, alpha_grad: one weight through a whole bank of masks, and what each mask would
// have changed.
//
// superpose multiplies matrices: a bit where it lies in its byte is an 8-bit number, and an alpha eight 8-bit digits of a common
// scale, so that all sums are exact. Where alphas are too far apart for that, and for float64 and gradients, sums take four
// masks, or four weights, at a time: the sixteen sums that their bits can choose are tabulated in shared memory and looked up by
// the bits. The threads of a half-warp look into one table, whose sixteen entries lie in sixteen banks: whatever the bits, no two
// of them wait for each other. Every sum is taken in an order that depends on sizes alone.
#include "bank.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------- numbers

// Numbers of one of the four floating dtypes. All threads of a kernel have the same dtypes, so that a choice by them is cheap.
struct Floats {
  const void* data;
  ScalarType dtype;
};

// f(T{}) with T the C++ type of the dtype.
template <class F>
__device__ __forceinline__ auto by_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      return f(double{});
  }
}

template <class W, class T>
__device__ __forceinline__ W widen(T x) {
  if constexpr (sizeof(T) == 2)
    return static_cast<W>(static_cast<float>(x));
  else
    return static_cast<W>(x);
}
template <class T, class W>
__device__ __forceinline__ T narrow(W x) {
  if constexpr (sizeof(T) == 2)
    return T(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

// N numbers from `at` on; zero for those from `left` on. In few loads where they lie well.
template <int N, class W>
__device__ __forceinline__ void load(const Floats& from, int64_t at, int64_t left, W* to) {
  by_dtype(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kPack = N * sizeof(T) < 16 ? N : static_cast<int>(16 / sizeof(T));
    using Packed = Pack<T, kPack>;
    const T* p = static_cast<const T*>(from.data) + at;
    if (left >= N && reinterpret_cast<uintptr_t>(p) % sizeof(Packed) == 0) {
#pragma unroll
      for (int i = 0; i < N; i += kPack) {
        const Packed packed = *reinterpret_cast<const Packed*>(p + i);
#pragma unroll
        for (int j = 0; j < kPack; j++) to[i + j] = widen<W>(packed.v[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) to[i] = i < left ? widen<W>(p[i]) : W{};
    }
  });
}
// Of N numbers the first `left`, in few stores where they lie well.
template <class T, int N>
__device__ __forceinline__ void store(T* to, int64_t left, const Pack<T, N>& from) {
  constexpr int kPack = N * sizeof(T) < 16 ? N : static_cast<int>(16 / sizeof(T));
  using Packed = Pack<T, kPack>;
  if (left >= N && reinterpret_cast<uintptr_t>(to) % sizeof(Packed) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += kPack) {
      Packed packed;
#pragma unroll
      for (int j = 0; j < kPack; j++) packed.v[j] = from.v[i + j];
      *reinterpret_cast<Packed*>(to + i) = packed;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < left) to[i] = from.v[i];
  }
}
template <class W>
__device__ __forceinline__ W load_one(const Floats& from, int64_t at) {
  return by_dtype(from.dtype, [&](auto zero) { return widen<W>(static_cast<const decltype(zero)*>(from.data)[at]); });
}
template <class W>
__device__ __forceinline__ void store_one(void* to, ScalarType dtype, int64_t at, W value) {
  by_dtype(dtype, [&](auto zero) { static_cast<decltype(zero)*>(to)[at] = narrow<decltype(zero)>(value); });
}

// ----------------------------------------------------------------------------------------------------------------------- tables

// Four entries of a table of sixteen.
template <class Entry>
struct alignas(16) Quarter {
  Entry entry[4];
};

// The table of the sums of four numbers, of each row by itself: bit i of an entry's number says whether the i-th is in the sum.
// The order in which a warp's threads write quarters keeps them off each other's banks.
template <class W, int Rows, class P>
__device__ __forceinline__ void tabulate(const P (&p)[Rows][4], Quarter<Pack<W, Rows>>* table) {
  const P none = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int high = (i + threadIdx.x / 2) % 4;
    Quarter<Pack<W, Rows>> quarter;
#pragma unroll
    for (int r = 0; r < Rows; r++) {
      const P upper = (high & 1 ? p[r][2] : none) + (high & 2 ? p[r][3] : none);
      quarter.entry[0].v[r] = static_cast<W>(upper);
      quarter.entry[1].v[r] = static_cast<W>(p[r][0] + upper);
      quarter.entry[2].v[r] = static_cast<W>(p[r][1] + upper);
      quarter.entry[3].v[r] = static_cast<W>((p[r][0] + p[r][1]) + upper);
    }
    table[high] = quarter;
  }
}

// Where the nibbles of a word point to in a table. Their entries' offsets lie in bytes, those of even nibbles in one word and of
// odd ones in another, each with the lowest byte of the table's own offset: one operation makes a whole offset of such a byte.
template <class Entry>
struct Codes {
  static constexpr int kShift = sizeof(Entry) == 4 ? 2 : 3;
  static constexpr uint32_t kMask = 0x0f0f0f0fu << kShift;
  uint32_t even, odd, offset;
  // offset: of the table in bytes, a multiple of its size
  __device__ __forceinline__ Codes(uint32_t word, uint32_t offset_) : offset(offset_) {
    const uint32_t low = (offset & 0xff) * 0x01010101u;
    even = (word << kShift & kMask) | low;
    odd = (word >> (4 - kShift) & kMask) | low;
  }
  // The entry that a nibble chooses in the table, or in that so many tables further on.
  __device__ __forceinline__ Entry pick(const Entry* tables, int nibble, int further = 0) const {
    const uint32_t at = __byte_perm(nibble % 2 ? odd : even, offset, 0x7650 | nibble / 2);
    return *reinterpret_cast<const Entry*>(reinterpret_cast<const char*>(tables + further * 16) + at);
  }
};

// ------------------------------------------------------------------------------------------------------------------------- host

ScalarType floating(const Place& place, const char* name, const Tensor& t) {
  with_float(place.op(), name, t.scalar_type(), [](auto) {});
  return t.scalar_type();
}

Floats floats(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type()}; }

// -------------------------------------------------------------------------------------------------------------------- superpose
// By tables: a team of sixteen threads takes a tile, a word of 32 weights a thread, whose sums it holds in registers. Four words,
// one a task, are turned into four words of eight codes each, one a weight: for 128 bits 16 operations, then 48 that make offsets
// of them, 32 loads from shared memory and 32 additions.
//
// Where there are few tiles, several teams share one, each with its slice of the tasks: slices are added in order at the end.

constexpr int kMixThreads = 256;
constexpr int kTeam = static_cast<int>(kTileBytes) / 4;  // threads
constexpr int kTeams = kMixThreads / kTeam;
constexpr int kGroups = static_cast<int>(kBlockTasks) / 4;  // tables of a block of the bank
constexpr int kStaged = 32;                                 // blocks of the bank whose tables, or digits, are there at a time

struct Mix {
  Floats weight, alphas;  // no alphas: all one, and their sum divided by the number of tasks
  void* out;
  int64_t n, rows;
  int64_t groups, groups_a_block;  // of tiles
  int32_t log_slices, log_warps;   // slices of the tasks by tables; warps that share half a tile in a product

  // Four alphas from a task on, in the dtype of weight, as the reference has them; zero for those from `left` on.
  template <class W>
  __device__ __forceinline__ void load_alphas(int64_t at, int64_t left, W (&to)[4]) const {
    if (!alphas.data) {
#pragma unroll
      for (int t = 0; t < 4; t++) to[t] = t < left ? 1 : 0;
      return;
    }
    load<4>(alphas, at, left, to);
    if (alphas.dtype != weight.dtype) {
#pragma unroll
      for (int t = 0; t < 4; t++)
        to[t] = by_dtype(weight.dtype, [&](auto zero) { return widen<W>(narrow<decltype(zero)>(to[t])); });
    }
  }
};

// The sums of a row for the tiles from the first on, as many as the teams hold. memory: kTeams * kTile W; opened_words: [kTeams].
template <class W, class Table>
__device__ __forceinline__ void mix_by_tables(const Table& bank, const Mix& a, int64_t row, int64_t first_tile, W* memory,
                                              uint32_t (*opened_words)[kTeam]) {
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
    if (tile * kTile >= a.n) continue;

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
    const int64_t begin = first_tile * kTile, here = min(tiles_here * kTile, a.n - begin);
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

template <class Table>
__global__ void __launch_bounds__(kMixThreads, 2) mix_by_tables_kernel(const __grid_constant__ Table bank, const Mix a) {
  SK_DYNAMIC_SHARED(double, memory);
  __shared__ uint32_t opened_words[kTeams][kTeam];
  // rows are neighbours: the bits come from the L2 cache
  mix_by_tables<double>(bank, a, blockIdx.x % a.rows, blockIdx.x / a.rows * int64_t{kTeams >> a.log_slices}, memory,
                        opened_words);
}

// By products of matrices: out = (weights x tasks) (tasks x 8 digits of alpha). A warp takes half a tile, eight words, and 32
// tasks at a time: for 8,192 bits 16 operations that gather the bytes of four tasks, 64 that pick a bit of each byte, and 16
// products. The i-th bit of a byte counts 2^i, which is taken back at the end. Sums are integers, so that no order of them
// matters. For so many bits the memory of an H100 needs about 78 clocks of a processor, whose schedulers need about 35.

constexpr int kMixWarps = kMixThreads / kWarpSize;
constexpr int kHalf = static_cast<int>(kTile) / 2;  // weights of a warp
constexpr int kRound = 32;                          // tasks of a product
constexpr int kRounds = static_cast<int>(kBlockTasks) / kRound;
constexpr int kAlphaBits = 62;                     // of a scaled alpha, its sign aside
constexpr uint64_t kHalves = 0x8080808080808080u;  // digits are from -128 to 127

// sum += a b, a: 16 x 32 bytes from 0 to 255, b: 32 x 8 from -128 to 127, spread over the warp as mma.m16n8k32 has them.
__device__ __forceinline__ void multiply_bytes(int (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifndef SUBNET_KERNELS_EMULATED
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const int lane = threadIdx.x % kWarpSize, row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 2; i++) {  // of the 32 the first sixteen, then the others
    uint64_t as[4], bs[2][4];
    const uint64_t* all = simt::exchange(kAllLanes, uint64_t{a[i * 2 + 1]} << 32 | a[i * 2]);
    for (int t = 0; t < 4; t++) as[t] = all[row * 4 + t];
    all = simt::exchange(kAllLanes, b[i]);
    for (int t = 0; t < 4; t++) bs[0][t] = all[column * 4 + t], bs[1][t] = all[column * 4 + 4 + t];
    for (int t = 0; t < 4; t++)
      for (int byte = 0; byte < 4; byte++)
        for (int c = 0; c < 4; c++)
          sum[c] += static_cast<uint8_t>(as[t] >> (c / 2 * 32 + byte * 8)) * static_cast<int8_t>(bs[c % 2][t] >> byte * 8);
  }
#endif
}

// out[i]: the i-th bytes of the four words.
__device__ __forceinline__ void gather_bytes(const uint32_t (&in)[4], uint32_t (&out)[4]) {
  const uint32_t low01 = __byte_perm(in[0], in[1], 0x5140), high01 = __byte_perm(in[0], in[1], 0x7362);
  const uint32_t low23 = __byte_perm(in[2], in[3], 0x5140), high23 = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(low01, low23, 0x5410), out[1] = __byte_perm(low01, low23, 0x7632);
  out[2] = __byte_perm(high01, high23, 0x5410), out[3] = __byte_perm(high01, high23, 0x7632);
}

__device__ __forceinline__ double power_of_two(int exponent) {
  return __longlong_as_double(static_cast<long long>(1023 + exponent) << 52);
}

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

// How many teams share a tile by tables, 1, 4 or 16: enough that every processor has work and that no team adds long sums of
// floats, and no more than there are groups of tasks.
int log_of_slices(const Place& place, int64_t all_tiles, int64_t tasks) {
  int log = tasks > 1024 ? 4 : tasks > 128 ? 2 : 0;
  while (log < 4 && (all_tiles << log) < place.processors() * 64 && (int64_t{8} << log) <= tasks) log += 2;
  return log;
}

Tensor superpose_cuda(const Tensor& weight_, std::vector<Tensor> blocks, std::optional<Tensor> alphas_) {
  const Place place("superpose", weight_);
  const Tensor weight = dense(weight_);
  const int64_t n = weight.numel();
  const ScalarType dtype = floating(place, "weight", weight);
  const Bank bank(place, blocks, n);
  STD_TORCH_CHECK(!alphas_ || ((alphas_->dim() == 1 || alphas_->dim() == 2) && alphas_->size(alphas_->dim() - 1) == bank.tasks()),
                  "superpose: alphas must be (K,) or (R, K), one for each of ", bank.tasks(), " tasks, got ",
                  alphas_ ? alphas_->numel() : 0);
  const bool many = alphas_ && alphas_->dim() == 2;
  Mix mix{floats(weight), {nullptr, dtype}, nullptr, n, many ? alphas_->size(0) : 1, 0, 0, 0, 0};
  std::optional<Tensor> alphas;
  if (alphas_) {
    place.check("alphas", *alphas_);
    floating(place, "alphas", *alphas_);
    alphas = dense(*alphas_);
    mix.alphas = floats(*alphas);
  }
  std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
  if (many) sizes.insert(sizes.begin(), mix.rows);
  Tensor out = place.empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype_code(weight));
  if (n == 0 || mix.rows == 0) return out;
  mix.out = out.mutable_data_ptr();
  const auto launch = [&](auto kernel, const auto& table, int64_t blocks, size_t shared) {
    STD_TORCH_CHECK(blocks * mix.rows <= INT32_MAX, "superpose: ", mix.rows, " rows of ", n, " weights are too many");
    place.launch(kernel, dim3(static_cast<unsigned>(blocks * mix.rows)), kMixThreads, shared, table, mix);
  };
  bank.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    if (dtype == ScalarType::Double) {
      mix.log_slices = log_of_slices(place, tiles(n), bank.tasks());
      launch(mix_by_tables_kernel<Table>, table, ceil_div(tiles(n), kTeams >> mix.log_slices), kTeams * kTile * sizeof(double));
      return;
    }
    // As few warps share half a tile as give every processor its two blocks, and none has less than two rounds.
    const auto groups = [&](int log) { return ceil_div(tiles(n), kMixWarps / 2 >> log); };
    const int64_t at_once = int64_t{place.processors()} * 2;
    while (mix.log_warps < 2 && groups(mix.log_warps) * 4 < at_once * 3 && table.blocks * kRounds >= 4 << mix.log_warps)
      mix.log_warps++;
    mix.groups = groups(mix.log_warps);
    mix.groups_a_block = std::max<int64_t>(1, ceil_div(mix.groups, at_once * 6));
    mix.log_slices = mix.log_warps == 0 && bank.tasks() <= 1024 ? 2 : 4;
    launch(mix_kernel<Table>, table, ceil_div(mix.groups, mix.groups_a_block), kTeams * kTile * sizeof(float));
  });
  return out;
}

// ------------------------------------------------------------------------------------------------------------- superpose_counts

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    superpose_counts_kernel(const T* weight, const int32_t* counts, Wide<T> tasks, T* out, int64_t n) {
  using W = Wide<T>;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  const auto weigh = [&](T w, int32_t count) {
    return narrow<T>(count > 0 ? widen<W>(w) * (static_cast<W>(count) / tasks) : W{});
  };
  if (first + 4 <= n) {
    using Packed = Pack<T, sizeof(T) == 8 ? 2 : 4>;
    constexpr int kPack = sizeof(Packed) / sizeof(T);
    const Pack<int32_t, 4> count = *reinterpret_cast<const Pack<int32_t, 4>*>(counts + first);
#pragma unroll
    for (int i = 0; i < 4; i += kPack) {
      Packed w = *reinterpret_cast<const Packed*>(weight + first + i);
#pragma unroll
      for (int j = 0; j < kPack; j++) w.v[j] = weigh(w.v[j], count.v[i + j]);
      *reinterpret_cast<Packed*>(out + first + i) = w;
    }
  } else {
    for (int64_t i = first; i < n; i++) out[i] = weigh(weight[i], counts[i]);
  }
}

Tensor superpose_counts_cuda(const Tensor& weight_, const Tensor& counts_, int64_t tasks) {
  const Place place("superpose_counts", weight_);
  place.check("counts", counts_);
  const Tensor weight = aligned(weight_), counts = aligned(counts_);
  const int64_t n = weight.numel();
  floating(place, "weight", weight);
  STD_TORCH_CHECK(counts.numel() == n && counts.scalar_type() == ScalarType::Int,
                  "superpose_counts: counts must be int32, one for each of ", n, " weights, got ", counts.numel());
  Tensor out = place.empty_like(weight, dtype_code(weight));
  with_float(place.op(), "weight", weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    place.launch(superpose_counts_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kThreads * 4))), kThreads, 0,
                 static_cast<const T*>(weight.const_data_ptr()), static_cast<const int32_t*>(counts.const_data_ptr()),
                 static_cast<Wide<T>>(tasks), static_cast<T*>(out.mutable_data_ptr()), n);
  });
  return out;
}

// ------------------------------------------------------------------------------------------------------------- sums for alphas

// Where a block leaves its part of the sums of a row: in the result if it has all, else with the other parts.
struct Sums {
  double* partial;  // [row][part][task]
  void* out;        // [row][task]
  ScalarType dtype;
  int32_t parts, tasks;

  __device__ void put(int64_t row, int part, int task, double value) const {
    if (parts == 1)
      store_one(out, dtype, row * tasks + task, value);
    else
      partial[(row * parts + part) * tasks + task] = value;
  }
};

constexpr int kAddRows = 32, kAddAtOnce = 8;

// Adds the parts: 32 tasks a block, and for each of them 32 threads that take every 32nd part.
__global__ void __launch_bounds__(kWarpSize* kAddRows) add_parts_kernel(const Sums sums) {
  __shared__ double lines[kAddRows][kWarpSize + 1];
  const int chunks = (sums.tasks + kWarpSize - 1) / kWarpSize;
  const int64_t row = blockIdx.x / chunks;
  const int lane = threadIdx.x % kWarpSize, line = threadIdx.x / kWarpSize;
  const int task = static_cast<int>(blockIdx.x % chunks) * kWarpSize + lane;
  double sum = 0;
  if (task < sums.tasks) {
    const double* from = sums.partial + row * sums.parts * sums.tasks + task;
    for (int part = line; part < sums.parts; part += kAddRows * kAddAtOnce) {
      double some[kAddAtOnce];
#pragma unroll
      for (int i = 0; i < kAddAtOnce; i++) {
        const int at = part + i * kAddRows;
        some[i] = at < sums.parts ? from[int64_t{at} * sums.tasks] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAddAtOnce; i++) sum += some[i];
    }
  }
  lines[line][lane] = sum;
  __syncthreads();
  if (line > 0 || task >= sums.tasks) return;
  for (int i = 1; i < kAddRows; i++) sum += lines[i][lane];
  store_one(sums.out, sums.dtype, row * sums.tasks + task, sum);
}

void add_parts(const Place& place, const Sums& sums, int64_t rows) {
  if (sums.parts == 1) return;
  place.launch(add_parts_kernel, dim3(static_cast<unsigned>(rows * ceil_div(sums.tasks, kWarpSize))), kWarpSize * kAddRows, 0,
               sums);
}

// ------------------------------------------------------------------------------------------------- superpose_grad, by look-up
// A block makes the tables of one tile after another, a thread one for its four weights, and its warps take 32 tasks at a time, a
// task a thread: all threads look into the same table. The sums of a table are taken in float64 and rounded to float once; two
// looked-up ones are added as floats, all further in float64. That is two roundings of a number, where the reference has one, of
// the products. For 32 tasks of a tile the look-ups keep the shared memory busy for 128 clocks, their conversions to float64 the
// converters for as many, and the schedulers for about 170.

constexpr int kDotThreads = static_cast<int>(kTile) / 4;
constexpr int kDotWarps = kDotThreads / kWarpSize;
constexpr int kDotTasks = 512;  // most of a block

struct Dot {
  Floats left, grad_y, weight;  // left: G, rows of n; or x, rows of `inputs`
  int64_t n, tiles, inputs, outputs, tiles_a_part;
  Sums sums;
};

// Four weights, and what they are multiplied by: loaded well before the products are wanted. With Outer, G is the outer product
// of grad_y and x, and products are rounded as those of a matrix product are; without, they are exact for floats.
template <class W, bool Outer>
struct Factors {
  using P = std::conditional_t<Outer, W, double>;
  W weight[4] = {}, left[4] = {}, grad_y[4] = {};

  // From `at` on; those from n on are zero.
  __device__ __forceinline__ void load_from(const Dot& a, int64_t row, int64_t at) {
    const int64_t there = a.n - at;
    if (there <= 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) weight[i] = left[i] = grad_y[i] = 0;
      return;
    }
    load<4>(a.weight, at, there, weight);
    if constexpr (Outer) {
      int64_t output = 0;
      if (a.n <= INT32_MAX)
        output = static_cast<uint32_t>(at) / static_cast<uint32_t>(a.inputs);
      else
        output = at / a.inputs;
      int64_t input = at - output * a.inputs;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        left[i] = i < there ? load_one<W>(a.left, row * a.inputs + input) : W{};
        grad_y[i] = i < there ? load_one<W>(a.grad_y, row * a.outputs + output) : W{};
        if (++input == a.inputs) input = 0, output++;
      }
    } else {
      load<4>(a.left, row * a.n + at, there, left);
    }
  }
  __device__ __forceinline__ P product(int i) const {
    if constexpr (Outer)
      return weight[i] * left[i] * grad_y[i];
    else
      return P{left[i]} * P{weight[i]};
  }
};

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

// ------------------------------------------------------------------------------------------------ superpose_grad, by products
// out = (tasks x weights) (weights x 8 digits of G W), for floats. A product of a tile is scaled by what the largest of the tile
// allows, and rounded to an integer of eight digits; its digits are doubled as often as the bit that it meets counts less than
// the highest of its byte. A tile whose smallest product would not keep the bits of a float so goes by tables. A warp takes
// sixteen tasks of a tile at a time: for 8,192 bits 64 operations that pick bits, and 16 products. The sums of a tile are
// integers; those of digits over tiles are float64, and put together at the end.

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

constexpr int64_t kMostScratch = 64 << 20;  // bytes

// out[row][task] = sum of the products of the row that the mask of the task opens. How tiles are divided depends on sizes of
// weight and bank only, so that a row gives what it gives alone.
template <class W, bool Outer>
void dot_rows(const Place& place, const Bank& bank, Dot dot, int64_t rows, int64_t left_bytes, int64_t grad_y_bytes,
              int64_t out_bytes) {
  const int64_t task_chunks = ceil_div(bank.tasks(), kDotTasks);
  // As many blocks as there is room for at once, where they are long; by tables more, of which fewer wait for their memory.
  constexpr bool kByProducts = std::is_same_v<W, float> && !Outer;
  const int64_t blocks = int64_t{place.processors()} * (kByProducts ? kProductBlocksAtOnce : 8);
  dot.tiles_a_part = std::max<int64_t>(1, ceil_div(dot.tiles * task_chunks, blocks));
  dot.sums.parts = static_cast<int32_t>(std::max<int64_t>(1, ceil_div(dot.tiles, dot.tiles_a_part)));
  const int64_t row_bytes = dot.sums.parts == 1 ? 0 : dot.sums.parts * bank.tasks() * 8;
  const int64_t at_once = std::clamp<int64_t>(kMostScratch / std::max<int64_t>(row_bytes, 1), 1, INT32_MAX / dot.sums.parts);
  const Tensor scratch = place.scratch(row_bytes * std::min(rows, at_once));
  dot.sums.partial = static_cast<double*>(scratch.mutable_data_ptr());
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t some = std::min(at_once, rows - row);
    bank.with_table([&](const auto& table) {
      using Table = std::decay_t<decltype(table)>;
      const auto launch = [&](auto kernel) {
        place.launch(kernel, dim3(static_cast<unsigned>(some * dot.sums.parts), static_cast<unsigned>(task_chunks)), kDotThreads,
                     0, table, dot);
      };
      if constexpr (kByProducts)
        launch(dot_product_kernel<Table>);
      else
        launch(dot_kernel<W, Outer, Table>);
    });
    add_parts(place, dot.sums, some);
    dot.left.data = static_cast<const char*>(dot.left.data) + some * left_bytes;
    dot.grad_y.data = static_cast<const char*>(dot.grad_y.data) + some * grad_y_bytes;
    dot.sums.out = static_cast<char*>(dot.sums.out) + some * out_bytes;
  }
}

Tensor superpose_grad_cuda(const Tensor& grad_, const Tensor& weight_, std::vector<Tensor> blocks) {
  const Place place("superpose_grad", weight_);
  place.check("grad", grad_);
  const Tensor grad = dense(grad_), weight = dense(weight_);
  const int64_t n = weight.numel();
  const bool many = grad.dim() == weight.dim() + 1;
  const int64_t rows = many ? grad.size(0) : 1;
  STD_TORCH_CHECK(grad.numel() == rows * n, "superpose_grad: grad must have the ", n, " elements of weight, got ",
                  grad.numel() / std::max<int64_t>(rows, 1));
  const ScalarType dtype = floating(place, "weight", weight);
  const bool wide = dtype == ScalarType::Double || floating(place, "grad", grad) == ScalarType::Double;
  const Bank bank(place, blocks, n);
  const int64_t sizes[] = {rows, bank.tasks()};
  Tensor out = place.empty(many ? sizes : sizes + 1, many ? 2 : 1, dtype_code(weight));
  if (bank.tasks() == 0 || rows == 0) return out;
  const Dot dot{floats(grad),
                {nullptr, dtype},
                floats(weight),
                n,
                tiles(n),
                1,
                1,
                0,
                {nullptr, out.mutable_data_ptr(), dtype, 1, static_cast<int32_t>(bank.tasks())}};
  const int64_t grad_row = n * static_cast<int64_t>(grad.element_size());
  const int64_t out_row = bank.tasks() * static_cast<int64_t>(out.element_size());
  if (wide || bank.tasks() <= kWarpSize)  // few tasks hide tables of float64 behind the memory
    dot_rows<double, false>(place, bank, dot, rows, grad_row, 0, out_row);
  else
    dot_rows<float, false>(place, bank, dot, rows, grad_row, 0, out_row);
  return out;
}

// ----------------------------------------------------------------------------------------------------- alpha_grad, by products
// out[b, k] = sum_o grad_y[b, o] sum_i (W * M_k)[o, i] x[b, i]: for many rows a matrix product a task, of a weight whose closed
// elements are replaced by zeros on the way to shared memory. A block takes 64 outputs and the rows, sixteen inputs at a time;
// every 32 inputs their sums are multiplied by grad_y and added in float64, so that no long sum of floats is taken.
//
// A block's share is a range of units, a unit 64 outputs and a range of inputs.

constexpr int kOutputs = 64, kInputs = 16;  // of a step
constexpr int kStepsAFold = 2;
constexpr int kRowThreads = 16;  // threads side by side along the rows; 8 along the outputs

struct Products {
  Floats x, grad_y, weight;
  int64_t rows, inputs, outputs, tiles;
  int64_t units, units_a_part, input_ranges, inputs_a_range;  // a range: whole folds
  Sums sums;
};

// Eight bits of a task from any weight on, in the two bytes that hold them. Those of weights that are not there may be any.
struct EightBits {
  uint8_t low, high;
  int shift;
  __device__ __forceinline__ void load_from(const TaskLines& line, int64_t all_tiles, int64_t at) {
    const auto byte_at = [&](int64_t byte) { return __ldg(line.first + byte / kTileBytes * line.step + byte % kTileBytes); };
    low = byte_at(at / 8);
    high = byte_at(min(at / 8 + 1, all_tiles * kTileBytes - 1));
    shift = static_cast<int>(at % 8);
  }
  __device__ __forceinline__ unsigned get() const { return (low | unsigned{high} << 8) >> shift; }
};

// Blocks of 128 rows on a processor. From sm_100 on two products are one instruction, which wants registers in pairs: three
// blocks would spill there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kProductBlocks = 2;
#else
constexpr int kProductBlocks = 3;
#endif

template <int RowsEach, class Table>
__global__ void __launch_bounds__(kDotThreads, RowsEach > 4 ? kProductBlocks : 4)
    alpha_grad_kernel(const __grid_constant__ Table bank, const Products a) {
  constexpr int kRows = kRowThreads * RowsEach, kEach = kInputs * kRows / kDotThreads;  // numbers of x that a thread fetches
  constexpr int kPack = RowsEach < 4 ? RowsEach : 4;
  using Four = Pack<float, 4>;
  using Some = Pack<float, kPack>;
  alignas(16) __shared__ float weights[2][kInputs][kOutputs + 4];
  alignas(16) __shared__ float xs[2][kInputs][kRows + 4];
  __shared__ double redone[kWarpSize];
  __shared__ bool strange[kRows];

  const int task = static_cast<int>(blockIdx.x % bank.tasks), part = static_cast<int>(blockIdx.y);
  const int64_t first_row = int64_t{blockIdx.x / bank.tasks} * kRows;
  const TaskLines line = bank.task(task);
  const int64_t begin = part * a.units_a_part, end = min(a.units, begin + a.units_a_part);

  // What this thread fetches: eight inputs of one output, and kEach inputs of one row.
  const int fetch_output = threadIdx.x % kOutputs, fetch_input = threadIdx.x / kOutputs * 8;
  const int fetch_row = threadIdx.x % kRows, fetch_x = threadIdx.x / kRows * kEach;
  // What it sums: outputs 4 lane and 32 + 4 lane and on, and rows kPack of every 16 kPack.
  const int lane = threadIdx.x % 8, place = threadIdx.x / 8;
  const auto row_of = [&](int r) { return r / kPack * (kRowThreads * kPack) + place * kPack + r % kPack; };

  double total[RowsEach] = {};
  float sum[RowsEach][8];
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t first_output = unit / a.input_ranges * kOutputs, first_input = unit % a.input_ranges * a.inputs_a_range;
    const int64_t last_input = min(a.inputs, first_input + a.inputs_a_range);
    const int steps = static_cast<int>(last_input - first_input + kInputs - 1) / kInputs;
    float next_weights[8], next_xs[kEach];
    EightBits next_open;
    const auto fetch = [&](int step) {
      const int64_t output = first_output + fetch_output, input = first_input + step * kInputs + fetch_input;
      const int64_t left = output < a.outputs ? last_input - input : 0;
      load<8>(a.weight, output * a.inputs + input, left, next_weights);
      next_open.load_from(line, a.tiles, left > 0 ? output * a.inputs + input : 0);
      const int64_t row = first_row + fetch_row, from = first_input + step * kInputs + fetch_x;
      load<kEach>(a.x, row * a.inputs + from, row < a.rows ? last_input - from : 0, next_xs);
    };
    fetch(0);
#pragma unroll
    for (int r = 0; r < RowsEach; r++)
#pragma unroll
      for (int o = 0; o < 8; o++) sum[r][o] = 0;
    for (int step = 0; step < steps; step++) {
      // Two buffers: who still reads the one of the step before last has not passed the last step's barrier.
      float (*w)[kOutputs + 4] = weights[step % 2];
      float (*x)[kRows + 4] = xs[step % 2];
      const unsigned open = next_open.get();
#pragma unroll
      for (int i = 0; i < 8; i++) w[fetch_input + i][fetch_output] = open >> i & 1 ? next_weights[i] : 0;
#pragma unroll
      for (int i = 0; i < kEach; i++) x[fetch_x + i][fetch_row] = next_xs[i];
      __syncthreads();
      if (step + 1 < steps) fetch(step + 1);
#pragma unroll
      for (int i = 0; i < kInputs; i++) {
        float mine[8], rows[RowsEach];
#pragma unroll
        for (int o = 0; o < 8; o += 4) {
          const Four four = *reinterpret_cast<const Four*>(&w[i][o * 8 + lane * 4]);
#pragma unroll
          for (int j = 0; j < 4; j++) mine[o + j] = four.v[j];
        }
#pragma unroll
        for (int r = 0; r < RowsEach; r += kPack) {
          const Some some = *reinterpret_cast<const Some*>(&x[i][row_of(r)]);
#pragma unroll
          for (int j = 0; j < kPack; j++) rows[r + j] = some.v[j];
        }
#pragma unroll
        for (int r = 0; r < RowsEach; r++)
#pragma unroll
          for (int o = 0; o < 8; o++) sum[r][o] += mine[o] * rows[r];
      }
      if (step % kStepsAFold == kStepsAFold - 1 || step + 1 == steps) {
#pragma unroll
        for (int r = 0; r < RowsEach; r++) {
          const int64_t row = first_row + row_of(r);
          float folded = 0;
#pragma unroll
          for (int o = 0; o < 8; o += 4) {
            const int64_t output = first_output + o * 8 + lane * 4;
            float grad[4];
            load<4>(a.grad_y, row * a.outputs + output, row < a.rows ? a.outputs - output : 0, grad);
#pragma unroll
            for (int j = 0; j < 4; j++) folded += grad[j] * sum[r][o + j], sum[r][o + j] = 0;
          }
          total[r] += static_cast<double>(folded);
        }
      }
    }
    __syncthreads();  // the next unit begins with either buffer
  }

#pragma unroll
  for (int r = 0; r < RowsEach; r++) {
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) total[r] += __shfl_xor_sync(kAllLanes, total[r], offset);
    const int64_t row = first_row + row_of(r);
    if (lane == 0) {
      strange[row_of(r)] = row < a.rows && !(total[r] - total[r] == 0);
      if (row < a.rows) a.sums.put(row, part, task, total[r]);
    }
  }
  // Zero times an infinite x or grad_y is NaN, though the weight is closed: such sums are taken again, of open weights alone.
  __syncthreads();
  for (int i = 0; i < kRows; i++) {
    if (!strange[i]) continue;
    const int64_t row = first_row + i;
    double sum_again = 0;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t first_output = unit / a.input_ranges * kOutputs, first_input = unit % a.input_ranges * a.inputs_a_range;
      const int64_t last_output = min(a.outputs, first_output + kOutputs),
                    last_input = min(a.inputs, first_input + a.inputs_a_range);
      for (int64_t output = first_output; output < last_output; output++)
        for (int64_t input = first_input + threadIdx.x; input < last_input; input += kDotThreads) {
          const int64_t at = output * a.inputs + input;
          EightBits open;
          open.load_from(line, a.tiles, at);
          if (!(open.get() & 1)) continue;
          sum_again += load_one<double>(a.weight, at) * load_one<double>(a.x, row * a.inputs + input) *
                       load_one<double>(a.grad_y, row * a.outputs + output);
        }
    }
    sum_again = block_sum(sum_again, redone);
    if (threadIdx.x == 0) a.sums.put(row, part, task, sum_again);
  }
}

template <int RowsEach>
void alpha_grad_products(const Place& place, const Bank& bank, Products a) {
  constexpr int64_t kFold = kInputs * kStepsAFold;
  const int64_t row_blocks = ceil_div(a.rows, kRowThreads * RowsEach);
  // A product whose inputs are many is divided along them too, in ranges of about 256.
  a.inputs_a_range = ceil_div(ceil_div(a.inputs, ceil_div(a.inputs, 256)), kFold) * kFold;
  a.input_ranges = ceil_div(a.inputs, a.inputs_a_range);
  a.units = ceil_div(a.outputs, kOutputs) * a.input_ranges;
  const int64_t wanted = std::clamp<int64_t>(ceil_div(place.processors() * 8, bank.tasks() * row_blocks), 1, a.units);
  a.units_a_part = ceil_div(a.units, wanted);
  a.sums.parts = static_cast<int32_t>(ceil_div(a.units, a.units_a_part));
  const Tensor scratch = place.scratch(a.sums.parts == 1 ? 0 : a.rows * a.sums.parts * bank.tasks() * 8);
  a.sums.partial = static_cast<double*>(scratch.mutable_data_ptr());
  bank.with_table([&](const auto& table) {
    place.launch(alpha_grad_kernel<RowsEach, std::decay_t<decltype(table)>>,
                 dim3(static_cast<unsigned>(bank.tasks() * row_blocks), static_cast<unsigned>(a.sums.parts)), kDotThreads, 0,
                 table, a);
  });
  add_parts(place, a.sums, a.rows);
}

// Whether products take less time than tables, in clocks of a processor for a tile: a table of sums costs about 130 of them, and
// looking up 200 for 32 tasks, used or not; a product 5.3 a row and task, of rows that are rounded up. Tables are for
// few rows, and for many tasks where rounding adds many.
bool by_products(int64_t rows, int64_t tasks) {
  const int64_t rounded = rows > 32 ? ceil_div(rows, 128) * 128 : 32;
  return static_cast<double>(rounded) * static_cast<double>(tasks) * 5.3 <
         static_cast<double>(rows) * static_cast<double>(130 + 200 * ceil_div(tasks, kWarpSize));
}

Tensor alpha_grad_cuda(const Tensor& x_, const Tensor& grad_y_, const Tensor& weight_, std::vector<Tensor> blocks) {
  const Place place("alpha_grad", x_);
  place.check("grad_y", grad_y_);
  place.check("weight", weight_);
  const Tensor x = dense(x_), grad_y = dense(grad_y_), weight = dense(weight_);
  STD_TORCH_CHECK(x.dim() == 2 && grad_y.dim() == 2 && weight.dim() == 2 && x.size(0) == grad_y.size(0) &&
                      x.size(1) == weight.size(1) && grad_y.size(1) == weight.size(0),
                  "alpha_grad: x must be (B, I), grad_y (B, O) and weight (O, I)");
  const ScalarType dtype = floating(place, "x", x);
  const bool wide = dtype == ScalarType::Double || floating(place, "grad_y", grad_y) == ScalarType::Double ||
                    floating(place, "weight", weight) == ScalarType::Double;
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = grad_y.size(1), n = weight.numel();
  const Bank bank(place, blocks, n);
  Tensor out = place.empty({rows, bank.tasks()}, dtype_code(x));
  if (bank.tasks() == 0 || rows == 0) return out;
  const Sums sums{nullptr, out.mutable_data_ptr(), dtype, 1, static_cast<int32_t>(bank.tasks())};
  if (!wide && n > 0 && by_products(rows, bank.tasks())) {
    const Products products{floats(x), floats(grad_y), floats(weight), rows, inputs, outputs, tiles(n), 0, 0, 0, 0, sums};
    if (rows > 32)
      alpha_grad_products<8>(place, bank, products);
    else
      alpha_grad_products<2>(place, bank, products);
    return out;
  }
  const Dot dot{floats(x), floats(grad_y), floats(weight), n, tiles(n), inputs, outputs, 0, sums};
  const auto bytes = [](const Tensor& t) { return t.size(1) * static_cast<int64_t>(t.element_size()); };
  if (wide)
    dot_rows<double, true>(place, bank, dot, rows, bytes(x), bytes(grad_y), bytes(out));
  else
    dot_rows<float, true>(place, bank, dot, rows, bytes(x), bytes(grad_y), bytes(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("superpose", TORCH_BOX(&superpose_cuda));
  m.impl("superpose_counts", TORCH_BOX(&superpose_counts_cuda));
  m.impl("superpose_grad", TORCH_BOX(&superpose_grad_cuda));
  m.impl("alpha_grad", TORCH_BOX(&alpha_grad_cuda));
}
