// `rank`: the k-th largest of a list of keys.
#pragma once
#include <algorithm>

#include "select_scan.h"

namespace {

template <class K>
struct Rank {
  K key;         // the k-th largest key
  int64_t need;  // how many equal to it are among the k largest
  int64_t ties;  // how many equal to it there are
};

static inline bool is_avx512() { return isa() == Isa::avx512; }

template <class K>
static int64_t count_greater(const K* keys, int64_t m, K than) {
  int64_t count = 0;
  for (int64_t i = 0; i < m; i++) count += keys[i] > than;
  return count;
}

// Moves the keys greater than `than`, or the others, to the front; returns their number.
template <class K>
static int64_t keep_side(K* keys, int64_t m, K than, bool upper) {
  int64_t kept = 0;
  for (int64_t i = 0; i < m; i++) {
    const K key = keys[i];
    keys[kept] = key;
    kept += (key > than) == upper;
  }
  return kept;
}

template <class K>
SK_AVX512 static int64_t count_greater_avx512(const K* keys, int64_t m, K than) {
  constexpr int kLanes = 64 / sizeof(K);
  int64_t count = 0, i = 0;
  for (; i + kLanes <= m; i += kLanes) count += __builtin_popcountll(greater(_mm512_loadu_si512(keys + i), than));
  const uint64_t rest = (uint64_t{1} << (m - i)) - 1;
  return count + __builtin_popcountll(greater(_mm512_loadu_si512(keys + i), than) & rest);
}

template <class K>
SK_AVX512 static int64_t keep_side_avx512(K* keys, int64_t m, K than, bool upper) {
  constexpr int kLanes = 64 / sizeof(K);
  const uint64_t flip = upper ? 0 : ~uint64_t{0};
  int64_t kept = 0;
  for (int64_t i = 0; i < m; i += kLanes) {
    const uint64_t valid = m - i >= kLanes ? (uint64_t{1} << kLanes) - 1 : (uint64_t{1} << (m - i)) - 1;
    const __m512i block = _mm512_loadu_si512(keys + i);
    const uint64_t mask = (greater(block, than) ^ flip) & valid;
    compress(keys + kept, mask, block);
    kept += __builtin_popcountll(mask);
  }
  return kept;
}

static int64_t count_greater_avx512(const int64_t* keys, int64_t m, int64_t than) { return count_greater(keys, m, than); }
static int64_t keep_side_avx512(int64_t* keys, int64_t m, int64_t than, bool upper) { return keep_side(keys, m, than, upper); }

// The need-th largest of m keys, 1 <= need <= m, all in [lo, hi]; reorders the list, behind which kSlack keys may be overwritten.
template <class K>
static Rank<K> rank(K* keys, int64_t m, K lo, K hi, int64_t need) {
  const bool wide = is_avx512();
  while (lo < hi && m > 1) {
    const K middle = static_cast<K>((lo & hi) + ((lo ^ hi) >> 1));  // their mean, which cannot overflow
    const int64_t greater = wide ? count_greater_avx512(keys, m, middle) : count_greater(keys, m, middle);
    const bool upper = greater >= need;
    if (upper)
      lo = static_cast<K>(middle + 1);
    else
      hi = middle, need -= greater;
    if (greater != (upper ? m : 0)) m = wide ? keep_side_avx512(keys, m, middle, upper) : keep_side(keys, m, middle, upper);
  }
  return {m == 1 ? keys[0] : lo, need, m};
}

}  // namespace
