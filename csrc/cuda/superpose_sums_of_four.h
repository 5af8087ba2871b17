// Tables of the sixteen sums that four bits can choose of four numbers, and looking sums up by the bits. The threads of a
// half-warp look into one table, whose sixteen entries lie in sixteen banks: whatever the bits, no two of them wait for each
// other.
#pragma once
#include "device.h"

namespace superposition {

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

}  // namespace superposition
