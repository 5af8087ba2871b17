// `scan`: one read of the scores of some words. The bits of all that lies above the window, and a list of the keys within it.
#pragma once
#include <cmath>
#include <cstdlib>

#include "../scores.h"

namespace {

// A word of 64 scores some of which lie within the window, in the order of the tensor.
struct Piece {
  int64_t word;
  uint64_t within;
};

// A run of words of one layer: what the scan reads, where it writes, and what it finds.
template <class K>
struct Scan {
  const K* scores;
  int64_t n;
  K lo, hi, inf;
  Word* bits;
  Piece* pieces;  // room for every word
  K* keys;        // keys within the window, in order, while there is room
  int64_t capacity;
  int64_t above = 0, within = 0, pieces_found = 0, keys_found = 0;
};

constexpr int kSlack = 64;  // a scan writes whole registers: keys that do not count may follow the last one

template <class K, bool Value>
static inline void note_keys(Scan<K>& s, const K* scores, uint64_t within) {
  for (uint64_t rest = within; rest; rest &= rest - 1)
    s.keys[s.keys_found++] = key_of<K, Value>(scores[__builtin_ctzll(rest)], s.inf);
}

template <class K>
static inline bool note_piece(Scan<K>& s, int64_t word, uint64_t within) {
  s.pieces[s.pieces_found++] = {word, within};
  return s.lo != s.hi && s.keys_found + kSlack <= s.capacity;  // a window of one key needs no list
}

// The 64 scores of a word; those past the end of the tensor are zeros of a copy.
template <class K>
static inline const K* word_scores(const Scan<K>& s, int64_t word, K* copy) {
  if (word * 64 + 64 <= s.n) return s.scores + word * 64;
  std::memset(copy, 0, 64 * sizeof(K));
  std::memcpy(copy, s.scores + word * 64, (s.n - word * 64) * sizeof(K));
  return copy;
}

template <class K, bool Value>
static void scan_portable(Scan<K>& s, int64_t first, int64_t last) {
  K copy[64];
  for (int64_t w = first; w < last; w++) {
    const K* scores = word_scores(s, w, copy);
    const uint64_t valid = valid_bits(w, s.n);
    Side side = side_portable<K, Value>(scores, s.lo, s.hi, s.inf);
    s.bits[w] = side.above &= valid;
    s.above += __builtin_popcountll(side.above);
    if (side.within &= valid) {
      if (note_piece(s, w, side.within)) note_keys<K, Value>(s, scores, side.within);
      s.within += __builtin_popcountll(side.within);
    }
  }
}

template <class K, bool Value>
SK_AVX2 static void scan_avx2(Scan<K>& s, int64_t first, int64_t last) {
  K copy[64];
  for (int64_t w = first; w < last; w++) {
    const K* scores = word_scores(s, w, copy);
    const uint64_t valid = valid_bits(w, s.n);
    ask_ahead(scores, 64 * sizeof(K));
    Side side = side_avx2<Value>(scores, s.lo, s.hi, s.inf);
    s.bits[w] = side.above &= valid;
    s.above += __builtin_popcountll(side.above);
    if (side.within &= valid) {
      if (note_piece(s, w, side.within)) note_keys<K, Value>(s, scores, side.within);
      s.within += __builtin_popcountll(side.within);
    }
  }
}

// Compression goes through a register and a whole store: into memory it is microcode on Zen 4.
SK_AVX512 static inline void compress(int32_t* to, uint64_t mask, __m512i keys) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, keys));
}
SK_AVX512 static inline void compress(int16_t* to, uint64_t mask, __m512i keys) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(mask, keys));
}

template <class K, bool Value>
SK_AVX512 static void scan_avx512(Scan<K>& scan, int64_t first, int64_t last) {
  constexpr int kLanes = 64 / sizeof(K);
  constexpr uint64_t kOnes = (uint64_t{1} << kLanes) - 1;
  Scan<K> s = scan;  // a copy, because the bits might alias it
  K copy[64];
  for (int64_t w = first; w < last; w++) {
    const K* scores = word_scores(s, w, copy);
    const uint64_t valid = valid_bits(w, s.n);
    __m512i keys[sizeof(K)];
    ask_ahead(scores, 64 * sizeof(K));
    Side side = side_avx512<Value>(scores, s.lo, s.hi, s.inf, keys);
    s.bits[w] = side.above &= valid;
    s.above += __builtin_popcountll(side.above);
    if (side.within &= valid) {
      if (note_piece(s, w, side.within)) {
#pragma GCC unroll 4
        for (int j = 0; j < int(sizeof(K)); j++) {
          const uint64_t mask = side.within >> j * kLanes & kOnes;
          compress(s.keys + s.keys_found, mask, keys[j]);
          s.keys_found += __builtin_popcountll(mask);
        }
      }
      s.within += __builtin_popcountll(side.within);
    }
  }
  scan = s;
}

}  // namespace
