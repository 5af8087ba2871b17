// Products of matrices of 8-bit numbers: mask bits, where they lie in their bytes, by the digits of numbers of a common scale.
// Sums are integers, so that no order of them matters.
#pragma once
#include "device.h"

namespace superposition {

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

}  // namespace superposition
