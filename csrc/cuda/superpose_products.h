// What superpose by products of matrices is made of: out = (weights x tasks) (tasks x 8 digits of alpha).
//
// A warp takes half a tile, eight words, and 32 tasks at a time, a round: for 8,192 bits 16 operations that gather the bytes of
// four tasks, 64 that pick a bit of each byte, and 16 products. The i-th bit of a byte counts 2^i, which is taken back at the
// end. Sums are integers until all tasks are in, so that it does not matter who adds which. For so many bits the memory of an
// H100 needs about 78 clocks of a processor, whose schedulers need about 35.
#pragma once
#include "superpose_digits.h"
#include "superpose_tables.h"

namespace superposition {

constexpr int kMixWarps = kMixThreads / kWarpSize;
constexpr int kHalf = static_cast<int>(kTile) / 2;  // weights of a warp
constexpr int kRound = 32;                          // tasks of a product
constexpr int kAlphaBits = 62;                      // of a scaled alpha, its sign aside

// Blocks on a multiprocessor: two spill a little beside the main loop on sm_90, where they were measured, and too much elsewhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kMixBlocks = 1;
#else
constexpr int kMixBlocks = 2;
#endif

// The power of two that makes integers of a row's alphas, of all threads of a block; false where digits could not hold them.
__device__ __forceinline__ bool find_shift(const Mix& a, int64_t row, int tasks, uint32_t (*extremes)[kMixWarps], int& shift) {
  uint32_t most = 0, least = ~0u;
  for (int task = threadIdx.x * 4; a.alphas.data && task < tasks; task += kMixThreads * 4) {
    float alphas[4];
    a.load_alphas(row * tasks + task, tasks - task, alphas);
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const uint32_t size = __float_as_uint(alphas[t]) & 0x7fffffffu;
      most = max(most, size);
      if (size) least = min(least, size);
    }
  }
  most = __reduce_max_sync(kAllLanes, most), least = __reduce_min_sync(kAllLanes, least);
  if (threadIdx.x % kWarpSize == 0) extremes[0][threadIdx.x / kWarpSize] = most, extremes[1][threadIdx.x / kWarpSize] = least;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kMixWarps; w++) most = max(most, extremes[0][w]), least = min(least, extremes[1][w]);
  shift = 0;
  if (most == 0) return true;
  const int top = static_cast<int>(most >> 23), bottom = static_cast<int>(least >> 23);
  if (top == 255 || bottom == 0 || top - bottom > kAlphaBits - 24) return false;
  shift = 127 + kAlphaBits - 1 - top;
  return true;
}

// The digits of four alphas from `at` on: [digit], a byte an alpha.
__device__ __forceinline__ void put_digits(const Mix& a, int64_t at, int left, int shift, uint32_t* to) {
  float alphas[4];
  a.load_alphas(at, left, alphas);
  const double up = power_of_two(shift);
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
  for (int i = 0; i < 2; i++) reinterpret_cast<uint4*>(to)[i] = make_uint4(of[i][0], of[i][1], of[i][2], of[i][3]);
}

// A lane's words of a round: of tasks 4 quad and on, and sixteen further on.
__device__ __forceinline__ void fetch_round(const BankBlock& block, int64_t tile, int half, int task, uint32_t (&to)[8]) {
  const int lane = threadIdx.x % kWarpSize, word = lane / 4, quad = lane % 4;
  const auto* from = reinterpret_cast<const uint32_t*>(block.data + tile * (block.tasks * kTileBytes)) +
                     ((task + quad * 4) * kTeam + half * (kTeam / 2) + word);
  if (block.tasks - task >= kRound) {
#pragma unroll
    for (int t = 0; t < 8; t++) to[t] = __ldg(from + (t % 4 + t / 4 * 16) * kTeam);
  } else {
    const int left = block.tasks - task - quad * 4;
#pragma unroll
    for (int t = 0; t < 8; t++) to[t] = t % 4 + t / 4 * 16 < left ? __ldg(from + (t % 4 + t / 4 * 16) * kTeam) : 0;
  }
}

__device__ __forceinline__ void gather_round(const uint32_t (&all)[8], uint32_t (&bytes)[2][4], uint32_t& opened) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t words[4] = {all[i * 4], all[i * 4 + 1], all[i * 4 + 2], all[i * 4 + 3]};
    gather_bytes(words, bytes[i]);
    opened |= words[0] | words[1] | words[2] | words[3];
  }
}

// sum[p]: of weights 2 p and 2 p + 1 of every word, two digits a lane.
__device__ __forceinline__ void multiply_round(int (&sum)[16][4], const uint32_t (&bytes)[2][4], const uint32_t (&b)[2]) {
#pragma unroll
  for (int p = 0; p < 16; p++) {
    const uint32_t even = 0x01010101u << p % 4 * 2, odd = even << 1;
    const uint32_t bits[4] = {bytes[0][p / 4] & even, bytes[0][p / 4] & odd, bytes[1][p / 4] & even, bytes[1][p / 4] & odd};
    multiply_bytes(sum[p], bits, b);
  }
}

// A lane has two digits of 32 weights of its word. In an exchange the lanes of a quad make sums of four digits of them, the
// lower or upper, each of sixteen weights: of the first or second eight of either half of the word.
__device__ __forceinline__ void add_digits(const int (&sum)[16][4], int64_t (&part)[2][8], uint32_t& opened) {
  const int quad = threadIdx.x % 4;
  const bool odd = quad & 1;
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
}

// In a second exchange lanes get the whole sums of eight weights each, those of their byte of the word. Without alphas they are
// counts times 1 / tasks, both of at most 24 bits: as a float that is count / tasks to the last bit, as superpose_counts has it.
__device__ __forceinline__ void add_halves(const Mix& a, const int64_t (&part)[2][8], int shift, double (&total)[8]) {
  const bool upper = threadIdx.x & 2;
  const double down = a.alphas.data ? power_of_two(-shift) : a.one_of_all, scale = down * (upper ? 4294967296.0 : 1.0);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const double other = __shfl_xor_sync(kAllLanes, static_cast<double>(upper ? part[0][i] : part[1][i]) * scale, 2);
    total[i] = (static_cast<double>(upper ? part[1][i] : part[0][i]) * scale + other) * (1.0 / (1 << i));
    if (!a.alphas.data) total[i] = double{static_cast<float>(total[i])};
  }
}

}  // namespace superposition
