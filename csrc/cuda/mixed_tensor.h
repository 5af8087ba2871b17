// y and dx of mixed rows in float16 and bfloat16.
//
// They go to the tensor cores, which take the weights of 16 outputs and 8 rows of the batch at a time. Rows of one task that are
// neighbours among the 8 slots of a batch share the masked weights; a row alone costs as much as 8 of its task.
//
// A thread then has 32 pairs of weights to mask. A LOP3, on the half-rate integer pipe, leaves the two bits of a pair where each
// is one of an exponent, so that they are powers of two or zeros, and an HFMA2, on the full-rate pipe, multiplies weights by them
// that are scaled by the inverse beforehand: exact, and nothing where closed. Weights too large to be scaled, infinities and NaN
// among them, must not be multiplied; a block that has any takes a PRMT, which makes two bytes of ones or zeros of a bit twice,
// and a LOP3, both on the integer pipe. A row alone costs 89 instructions, and some 42 around them: for 64 rows of 64 tasks and
// 4096 x 4096 weights an H100 issues them in 75 us; with PRMT the integer pipe alone takes 95.
#pragma once
#include "mixed_tiles.h"

namespace {

constexpr int kStrip = 32;  // weights of an output that a thread has; a warp has 4 strips
constexpr int kSteps = 8;   // multiplications of 16 x 16 with 16 x 8 that those of a warp make

// 32 elements in the pairs that meet in a step: word 2 b has elements b and b + 16, the next b + 8 and b + 24.
__device__ void pair_up(const unsigned (&word)[kStrip / 2], unsigned (&to)[2 * kSteps]) {
#pragma unroll
  for (int i = 0; i < 2 * kSteps; i++) {
    const int first = i / 2 + i % 2 * 8;
    to[i] = __byte_perm(word[first / 2], word[first / 2 + 8], first % 2 ? 0x7632 : 0x5410);
  }
}
__device__ void set_four(unsigned (&word)[kStrip / 2], int at, const uint4& four) {
  word[at] = four.x, word[at + 1] = four.y, word[at + 2] = four.z, word[at + 3] = four.w;
}

// 32 elements, of which n are there, in pairs.
__device__ void load_pairs(const uint16_t* from, int64_t n, bool vectors, unsigned (&to)[2 * kSteps]) {
  const int here = static_cast<int>(min(n, int64_t{kStrip}));
  unsigned word[kStrip / 2];
  if (vectors && here == kStrip) {
#pragma unroll
    for (int j = 0; j < 4; j++) set_four(word, 4 * j, reinterpret_cast<const uint4*>(from)[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kStrip / 2; j++)
      word[j] = (2 * j < here ? from[2 * j] : 0u) | (2 * j + 1 < here ? unsigned{from[2 * j + 1]} << 16 : 0u);
  }
  pair_up(word, to);
}

// The highest bits of two bytes of x, the even ones or the odd ones, 16 times each.
template <bool Odd>
__device__ unsigned spread_highest(unsigned x) {
#ifndef SUBNET_KERNELS_EMULATED
  unsigned result;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(x), "n"(Odd ? 0xbb99 : 0xaa88));
  return result;
#else
  x = Odd ? x >> 8 : x;
  return (x & 0x80u ? 0xffffu : 0u) | (x & 0x800000u ? 0xffff0000u : 0u);
#endif
}

// The products of two pairs of T.
template <class T>
__device__ unsigned multiply_pairs(unsigned a, unsigned b) {
#ifndef SUBNET_KERNELS_EMULATED
  unsigned result;
  if constexpr (std::is_same_v<T, Half>)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0));
  return result;
#else
  const auto product = [&](int shift) {
    T x, y;
    const auto raw_x = static_cast<uint16_t>(a >> shift), raw_y = static_cast<uint16_t>(b >> shift);
    std::memcpy(&x, &raw_x, sizeof x), std::memcpy(&y, &raw_y, sizeof y);
    const T z = static_cast<T>(static_cast<float>(x) * static_cast<float>(y));
    uint16_t raw_z;
    std::memcpy(&raw_z, &z, sizeof z);
    return unsigned{raw_z} << shift;
  };
  return product(0) | product(16);
#endif
}

// sum += a b for a 16 x 16 and b 16 x 8 of T, spread over the warp as mma.m16n8k16 has them.
template <class T>
__device__ void multiply_tiles(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifndef SUBNET_KERNELS_EMULATED
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  uint64_t all[3][kWarpSize];
  std::memcpy(all[0], simt::exchange(kAllLanes, a[0] | uint64_t{a[1]} << 32), sizeof all[0]);
  std::memcpy(all[1], simt::exchange(kAllLanes, a[2] | uint64_t{a[3]} << 32), sizeof all[1]);
  std::memcpy(all[2], simt::exchange(kAllLanes, b[0] | uint64_t{b[1]} << 32), sizeof all[2]);
  const auto value = [](uint64_t word, int at) {
    const auto raw = static_cast<uint16_t>(word >> 16 * at);
    T result;
    std::memcpy(&result, &raw, sizeof raw);
    return static_cast<float>(result);
  };
  const int lane = simt::lane(), row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; i++)
    for (int half = 0; half < 2; half++)
      for (int t = 0; t < 4; t++)
        for (int k = 0; k < 2; k++)
          sum[i] += value(all[half][row * 4 + t], i / 2 * 2 + k) * value(all[2][(column + i % 2) * 4 + t], half * 2 + k);
#endif
}

// Bit 10 + q of an element, alone, is a power of two, as it is one of the exponent; these are their inverses, in pairs.
template <class T>
__device__ constexpr unsigned inverse(int q) {
  constexpr bool kHalf = std::is_same_v<T, Half>;
  const int power = kHalf ? 15 - (1 << q) : 127 - (8 << q);  // 2^power, whose exponent is held with a bias
  const unsigned one = static_cast<unsigned>(kHalf ? (power + 15) << 10 : (power + 127) << 7);
  return one | one << 16;
}

// Whether an element of a pair is so large, 4 of float16 and 512 of bfloat16, that its product with an inverse would not be
// finite.
__device__ unsigned any_large(unsigned pair) { return ((pair & 0x7fff7fffu) + 0x3c003c00u) & 0x80008000u; }

// sum = w x for the weights whose bits are open. Where w is Scaled, by inverse(step % 4), its products with a bit of the
// exponent are a weight or nothing.
template <class T, bool Scaled>
__device__ void multiply_open(const unsigned (&w)[2][2 * kSteps], uint2 open, const unsigned (&x)[2 * kSteps], float (&sum)[4]) {
  const unsigned word[2] = {open.x, open.y};
  float part[2][4] = {};  // two, so that a multiplication need not wait for the one before
  unsigned nearby[2][4];  // shifted, so that bits 4 n + q are those 10 + q and 26 + q
#pragma unroll
  for (int r = 0; r < 2; r++)
    nearby[r][0] = word[r] << 10, nearby[r][1] = word[r] << 6, nearby[r][2] = word[r] << 2, nearby[r][3] = word[r] >> 2;
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    unsigned masked[4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if constexpr (Scaled) {
        const unsigned bit = 0x04000400u << step % 4;
        masked[r] = multiply_pairs<T>(w[r][2 * step], nearby[r][step / 4] & bit);
        masked[2 + r] = multiply_pairs<T>(w[r][2 * step + 1], nearby[r][2 + step / 4] & bit);
      } else {
        const unsigned highest = word[r] << (7 - step);
        masked[r] = w[r][2 * step] & spread_highest<false>(highest);
        masked[2 + r] = w[r][2 * step + 1] & spread_highest<true>(highest);
      }
    }
    multiply_tiles<T>(part[step % 2], masked, {x[2 * step], x[2 * step + 1]});
  }
#pragma unroll
  for (int c = 0; c < 4; c++) sum[c] = part[0][c] + part[1][c];
}

// As product_kernel, for T of 16 bits.
template <bool Transposed>
struct TensorShared {
  static constexpr int kSplit = Tile<Transposed>::kLength / (4 * kStrip);  // warps that share 16 outputs
  Flow<uint16_t, Transposed> flow;
  float sums[2][kBatch][kSplit * Tile<Transposed>::kOutputs + 4];  // 4 more keep the slots off each other's banks
};

template <class T, bool Transposed>
__global__ void __launch_bounds__(kThreads, 2) tensor_kernel(const T* rows_, const T* weight_, const Slot* slots, int count,
                                                             int each, int64_t outputs, int64_t inputs, float* partial) {
  using Tile = Tile<Transposed>;
  using Flow = Flow<uint16_t, Transposed>;
  constexpr int kSplit = TensorShared<Transposed>::kSplit, kStrips = Tile::kLength / kStrip;
  SK_DYNAMIC_SHARED(TensorShared<Transposed>, shared);
  Flow& flow = shared->flow;
  const auto* const rows = reinterpret_cast<const uint16_t*>(rows_);
  const auto* const weight = reinterpret_cast<const uint16_t*>(weight_);
  const int64_t out = int64_t{blockIdx.x} * Tile::kOutputs, along = int64_t{blockIdx.y} * Tile::kLength;
  const int64_t width = Transposed ? inputs : outputs, length = Transposed ? outputs : inputs;
  const int64_t o = Transposed ? along : out, i = Transposed ? out : along;
  const int begin = blockIdx.z * each;
  const int warp = threadIdx.x / kWarpSize, group = threadIdx.x % kWarpSize / 4, four = threadIdx.x % 4;
  const int split = warp % kSplit, strip = split * 4 + four, output = warp / kSplit * 16 + group;  // and output + 8
  const Source<uint16_t, Transposed> source(flow, slots + begin, min(count - begin, each), rows, along, length, o, i, outputs,
                                            inputs);

  unsigned w[2][2 * kSteps];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int64_t n = out + output + 8 * r, k = along + strip * kStrip;
    if constexpr (Transposed) {
#pragma unroll
      for (int j = 0; j < 2 * kSteps; j++) {
        const int64_t a = k + j / 2 + j % 2 * 8, b = a + 16;
        w[r][j] = (n < width && a < length ? weight[a * inputs + n] : 0u) |
                  (n < width && b < length ? unsigned{weight[b * inputs + n]} << 16 : 0u);
      }
    } else {
      load_pairs(weight + n * inputs + k, n < width ? length - k : 0, inputs % 8 == 0, w[r]);
    }
  }
  unsigned large = 0;
#pragma unroll
  for (int j = 0; j < 2 * kSteps; j++) large |= any_large(w[0][j]) | any_large(w[1][j]);
  const bool scaled = !__any_sync(kAllLanes, __syncthreads_or(large != 0));
  if (scaled) {
#pragma unroll
    for (int j = 0; j < 2 * kSteps; j++)
      w[0][j] = multiply_pairs<T>(w[0][j], inverse<T>(j / 2 % 4)), w[1][j] = multiply_pairs<T>(w[1][j], inverse<T>(j / 2 % 4));
  }
  const int word = Bits<Transposed, true>::place(output * (kStrips / 4) + split) * 4 + four;
  static_assert(Transposed || Bits<Transposed, true>::kAcross == kStrips / 4);
  // The sums of batch b, while the next is in work.
  const int own_slot = threadIdx.x / Tile::kOutputs, own_output = threadIdx.x % Tile::kOutputs;
  float* to = partial + (int64_t{blockIdx.y} * count + begin + own_slot) * width + out + own_output;
  const bool there = out + own_output < width;
  const auto put = [&](unsigned b) {
#pragma unroll
    for (int k = 0; k < kBatch; k += kThreads / Tile::kOutputs, to += kThreads / Tile::kOutputs * width) {
      float sum = 0;
#pragma unroll
      for (int p = 0; p < kSplit; p++) sum += shared->sums[b & 1][k + own_slot][p * Tile::kOutputs + own_output];
      if (there && static_cast<int>(b) * kBatch + k + own_slot < source.count) *to = sum;
    }
  };

  unsigned b = 0;
  for (int left = source.count; left > 0; left -= kBatch, b++) {
    const int here = min(left, kBatch);
    source.await(b);
    __syncthreads();
    source.ask(b + Flow::kAhead);
    if (b > 0) put(b - 1);

    unsigned x[2 * kSteps];
    {
      unsigned natural[kStrip / 2];
#pragma unroll
      for (int j = 0; j < 4; j++) set_four(natural, 4 * j, flow.x[b % Flow::kStages][Flow::place(group, strip, j)]);
      pair_up(natural, x);
    }
    const auto* const words = reinterpret_cast<const unsigned*>(flow.bits[b % Flow::kStages]) + word;
    const int slot = threadIdx.x % kBatch;  // a bit for each slot that begins a task
    unsigned runs = __ballot_sync(kAllLanes, slot < here && !again(flow.batch(b), slot)) & ((1u << kBatch) - 1);
    float total[4] = {};
    const auto first = [&] { return (__ffs(static_cast<int>(runs)) - 1) & (kBatch - 1); };  // any where there is none
    const auto load = [&](int s) {
      const auto* const from = words + s * (Tile::kOutputs * kStrips);
      return make_uint2(from[0], from[8 * kStrips]);
    };
    if (scaled && runs == (1u << here) - 1) {  // each slot is the only one of its task: of its sums one column is wanted
#pragma unroll 1
      for (int s = 0; s < here; s += 2) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float sum[4];
          multiply_open<T, true>(w, load(s + c), x, sum);
          if (four == s / 2) total[c] = sum[c], total[2 + c] = sum[2 + c];
        }
      }
    } else {
      int s = first();
      uint2 open = load(s);
      while (runs) {
        runs &= runs - 1;
        const int next = first();
        const uint2 later = load(next);
        float sum[4];
        if (scaled)
          multiply_open<T, true>(w, open, x, sum);
        else
          multiply_open<T, false>(w, open, x, sum);
        // Of slots before s it has come too late, and those of the next runs will be written over.
        if (four * 2 >= s) total[0] = sum[0], total[2] = sum[2];
        if (four * 2 + 1 >= s) total[1] = sum[1], total[3] = sum[3];
        s = next, open = later;
      }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) shared->sums[b & 1][four * 2 + c % 2][split * Tile::kOutputs + output + c / 2 * 8] = total[c];
  }
  __syncthreads();
  put(b - 1);
}

}  // namespace
