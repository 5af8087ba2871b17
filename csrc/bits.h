// The layout of packed masks, shared by every kernel (the specification is subnet_kernels/reference.py).
//
// Weight i in logical (row-major) order is bit i % 8 of byte i / 8: little-endian, so a 16-bit piece is an AVX-512 mask register
// and a 32-bit piece a warp's ballot. Masks are zero-padded to whole tiles of 512 weights; the padding is always zero. A bank of
// K masks is a list of blocks of at most 64 tasks, each [tile][task][64 bytes].
#pragma once
#include <cstdint>

constexpr int64_t kTile = 512;             // weights in a tile
constexpr int64_t kTileBytes = kTile / 8;  // bytes of a tile of one mask
constexpr int64_t kBlockTasks = 64;        // tasks in a full block of a bank

constexpr int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
constexpr int64_t mask_bytes(int64_t n) { return tiles(n) * kTileBytes; }
constexpr bool is_open(const uint8_t* bits, int64_t i) { return bits[i >> 3] >> (i & 7) & 1; }
