// The value of a rank in a list that one block reads, by histograms of digits: candidates, or all scores of a layer.
#pragma once
#include "scores.h"

namespace {

constexpr int kBlock = 1024;  // threads of a block that ranks
constexpr int kDigit = 11;    // bits that a round of a ranking decides
constexpr int kFew = 128;     // up to so many values are ranked by comparing each with each

struct Ranking {
  unsigned bins[1 << kDigit];
  long long warp[kWarpSize];
  long long need, count;
  int bin;
  unsigned listed;
  uint64_t few[kFew + 1], order[kFew + 1];
  uint64_t found, found_order;
};

// Of a list's values in [low, high] the `need` largest end within those `count`, of which `need` belong to them.
struct Rank {
  uint64_t low, high;
  int64_t need, count;
};

// For descending bins, two a thread: where a running sum of counts reaches `need`. All threads of a block of kBlock.
__device__ void find_bin(Ranking& r, long long upper, long long lower, int64_t need) {
  const int thread = threadIdx.x, lane = lane_of_thread(), warp = thread / kWarpSize;
  if (thread == 0) r.bin = 0, r.need = 1, r.count = 1;  // found below, unless the scores change under our hands
  long long sum = upper + lower;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const long long other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarpSize - 1) r.warp[warp] = sum;
  __syncthreads();
  const long long before = warp_sum(lane < warp ? r.warp[lane] : 0) + sum - upper - lower;
  const int bin = (1 << kDigit) - 1 - 2 * thread;
  if (before < need && need <= before + upper)
    r.bin = bin, r.need = need - before, r.count = upper;
  else if (before + upper < need && need <= before + upper + lower)
    r.bin = bin - 1, r.need = need - before - upper, r.count = lower;
  __syncthreads();
}

// The need-th largest of the `count` values of the list in [low, high], 1 <= need <= count: narrowed down to a range that holds
// at most `enough` of them, or to one value. get(i, value) says whether item i takes part; Flight of a thread's are asked for at
// a time. All threads of a block of kBlock.
template <int Flight, class Get>
__device__ Rank rank_in_block(int64_t items, int64_t count, uint64_t low, uint64_t high, int64_t need, int64_t enough, Ranking& r,
                              const Get& get) {
  constexpr int64_t kRun = int64_t{1} << 31;  // items whose counts fit in a bin
  while (low < high && count > enough) {
    const int shift = max(64 - __clzll(static_cast<long long>(high - low)) - kDigit, 0);
    const int bin = (1 << kDigit) - 1 - 2 * static_cast<int>(threadIdx.x);
    long long upper = 0, lower = 0;
    for (int64_t begin = 0; begin < items; begin += kRun) {
      __syncthreads();  // whoever read the bins, or the last result, is done
      r.bins[bin] = r.bins[bin - 1] = 0;
      __syncthreads();
      const int64_t end = min(items, begin + kRun);
#pragma unroll Flight
      for (int64_t i = begin + threadIdx.x; i < end; i += kBlock) {
        uint64_t value = 0;
        if (get(i, value) && value >= low && value <= high) atomicAdd(&r.bins[(value - low) >> shift], 1u);
      }
      __syncthreads();
      upper += r.bins[bin], lower += r.bins[bin - 1];
    }
    find_bin(r, upper, lower, need);
    low += static_cast<uint64_t>(r.bin) << shift;
    high = min(high, low + ((uint64_t{1} << shift) - 1));
    need = r.need, count = r.count;
  }
  __syncthreads();
  return {low, high, need, count};
}

// A value, and where it stands among those equal to it. From (value, order) on, a list's scores are open.
struct Cut {
  uint64_t value, order;
  double within, span;  // of the list's values so many lie in a range of so many steps about it
};

// The need-th largest of the `among` values of a list that lie in [low, high]; orders, all different, lie in [first, last];
// value(i), order(i). With `all_ties` its value alone, of order `first`. All threads of a block of kBlock.
template <int Flight, class Value, class Order>
__device__ Cut cut_in_block(int64_t items, int64_t among, uint64_t low, uint64_t high, uint64_t first, uint64_t last,
                            int64_t need, bool all_ties, Ranking& r, const Value& value, const Order& order) {
  const int thread = threadIdx.x;
  Rank found = rank_in_block<Flight>(items, among, low, high, need, kFew, r, [&](int64_t i, uint64_t& at) {
    at = value(i);
    return true;
  });
  low = found.low, high = found.high;
  const double within = static_cast<double>(found.count), span = static_cast<double>(high - low) + 1;
  if (found.count > kFew) {  // ties
    if (all_ties || found.need >= found.count) return {low, first, within, span};
    found = rank_in_block<Flight>(items, found.count, first, last, found.need, kFew, r, [&](int64_t i, uint64_t& at) {
      at = order(i);
      return value(i) == low;
    });
    first = found.low, last = found.high;
  }
  // Few are left. Each is compared with each, by as many threads as there are for one.
  if (thread == 0) r.listed = 0, r.found = low, r.found_order = first;  // found below, unless the scores change under our hands
  __syncthreads();
#pragma unroll Flight
  for (int64_t i = thread; i < items; i += kBlock) {
    const uint64_t own = value(i), own_order = order(i);
    if (own < low || own > high || own_order < first || own_order > last) continue;
    const unsigned at = atomicAdd(&r.listed, 1u);
    if (at < kFew) r.few[at] = own, r.order[at] = own_order;
  }
  __syncthreads();
  constexpr int kEachBy = kBlock / kFew;
  const int count = static_cast<int>(min(r.listed, unsigned{kFew})), one = thread / kEachBy;
  int larger = 0;
  if (one < count) {
    const uint64_t own = r.few[one], own_order = r.order[one];
#pragma unroll 4
    for (int j = thread % kEachBy; j < count; j += kEachBy)
      larger += r.few[j] > own || (r.few[j] == own && r.order[j] > own_order);
  }
#pragma unroll
  for (int step = 1; step < kEachBy; step *= 2) larger += __shfl_xor_sync(kAllLanes, larger, step);
  if (one < count && thread % kEachBy == 0 && larger == found.need - 1) r.found = r.few[one], r.found_order = r.order[one];
  __syncthreads();
  return {r.found, all_ties ? 0 : r.found_order, within, span};
}

}  // namespace
