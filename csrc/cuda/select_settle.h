// `settle`: which candidates are open, exactly, and what comes next where the window has missed.
#pragma once
#include "select_begin.h"
#include "select_scan.h"
#include "select_small.h"

namespace {

__device__ void open_one(const Job& job, int64_t i) {
  atomicOr(job.bits + i / 32, 1u << i % 32);
  if (job.weight_size == 4)
    static_cast<uint32_t*>(job.w_eff)[i] = static_cast<const uint32_t*>(job.weight)[i];
  else if (job.weight_size == 2)
    static_cast<uint16_t*>(job.w_eff)[i] = static_cast<const uint16_t*>(job.weight)[i];
  else if (job.weight_size == 8)
    static_cast<uint64_t*>(job.w_eff)[i] = static_cast<const uint64_t*>(job.weight)[i];
}

// What a block that settles a segment knows of the whole layer, in shared memory.
struct Totals {
  long long above, within;  // of the window
  int overflow;             // a segment's list is not long enough
  int bin;                  // that holds the k-th largest: of its `count` candidates the `need` largest are open
  long long need, count;
};

// Selects among the candidates that are listed of the bin, and learns. All threads of a block.
template <class C>
__device__ void settle_bin(const Job& job, const C& c, State& state, const Totals& totals, int round, Ranking& ranking) {
  const Attempt& attempt = state.attempt[round];
  const Candidates<typename C::K> candidates(job);
  const int64_t listed = candidates.room();  // where the bin's begin
  const int64_t count = totals.count;
  uint64_t low_key = 0, high_key = c.most_key(), first = 0, last = strips(job.n) * kStrip - 1;
  if (count > kFew) {  // the bin's own range; a division is worth some hundred comparisons
    const uint64_t low = attempt.low + (static_cast<uint64_t>(totals.bin) << attempt.shift);
    const uint64_t high = min(attempt.high, low + ((uint64_t{1} << attempt.shift) - 1));
    low_key = low / c.places, high_key = high / c.places;
    if (low_key == high_key && c.places > 1) {  // places bound the orders
      first = (low - low_key * c.places) * kStrip;
      last = (high - high_key * c.places + 1) * kStrip - 1;
    }
  }
  const Cut cut = cut_in_block<1>(
      count, count, low_key, high_key, first, last, totals.need, job.ties == Ties::all, ranking,
      [&](int64_t i) -> uint64_t { return candidates.key(listed + i); },
      [&](int64_t i) { return c.order(candidates.index(listed + i)); });
  const auto within = static_cast<double>(totals.within);
  const double span = static_cast<double>(attempt.high - attempt.low) + 1;
  if (job.ties == Ties::all && c.places > 1) {
    if (threadIdx.x != 0) return;
    Attempt& third = state.attempt[kFirst];
    third.guess = Guess::ties;
    third.low_key = third.high_key = cut.value;
    third.low_place = 0, third.high_place = -1;
    const C keys(job, kFirst, c.size, c.value);  // the next call's windows are of keys
    return learn(job, keys, cut.value, within, span / static_cast<double>(c.places), round);
  }
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += kBlock) {
    const uint64_t own = candidates.key(listed + i);
    const int64_t index = candidates.index(listed + i);
    if (own > cut.value || (own == cut.value && c.order(index) >= cut.order)) open_one(job, index);
  }
  if (threadIdx.x == 0) {
    const uint64_t place = c.places == 1 ? 0 : cut.order / kStrip;
    learn(job, c, cut.value * c.places + place, within, span, round);
  }
}

// What comes next for a layer whose window has missed. Out of line: rare, it would take registers from what is not.
__device__ __noinline__ void sample_again(const Job& job, Attempt& attempt, Ranking& ranking) {
  with_coordinate(job, kAgain, [&](const auto& c) {
    constexpr int64_t kParts = kSampledAgain * kBlock;
    take_sample<kSampledAgain>(job, c, 1, 0, job.n / kParts, ranking);
    guess_by_sample(attempt, job, c, 5, kParts, ranking.bins, ranking);
  });
}

template <class C>
__device__ void settle_segment(const Job& job, const C& c, State& state, int round, int segment, unsigned* missed,
                               Ranking& ranking, Totals& totals) {
  Attempt& attempt = state.attempt[round];
  const int thread = threadIdx.x;
  // What the block will need is asked for at once: the histogram, in descending order, two bins a thread as a ranking's are, and
  // the first candidates, which may not be there.
  const int first = (1 << kDigit) - 1 - 2 * thread;
  const unsigned upper = first < kBins ? attempt.bins[first] : 0, lower = first < kBins ? attempt.bins[first - 1] : 0;
  const Candidates<typename C::K> candidates(job);
  const int64_t begin = int64_t{segment} * job.capacity;
  auto key = thread < job.capacity ? candidates.key(begin + thread) : 0;
  int64_t index = thread < job.capacity ? candidates.index(begin + thread) : 0;
  const int64_t count = min(attempt.segment[segment].within, static_cast<unsigned>(job.capacity));
  if (thread < kWarpSize) {
    long long above = 0, within = 0;
    bool over = false;
#pragma unroll
    for (int i = 0; i < kMostSegments; i += kWarpSize) {
      if (i + thread >= job.segments) break;
      const Segment& one = attempt.segment[i + thread];
      above += static_cast<long long>(one.above), within += one.within;
      over |= one.within > static_cast<unsigned>(job.capacity);
    }
    above = warp_sum(above), within = warp_sum(within);
    const int overflow = __any_sync(kAllLanes, over);
    if (thread == 0) totals.above = above, totals.within = within, totals.overflow = overflow;
  }
  __syncthreads();
  const bool one_key = attempt.guess == Guess::one_key;
  if (totals.above >= job.k || totals.above + totals.within < job.k || (!one_key && totals.overflow)) {
    if (segment != 0) return;
    if (round == kAgain) return select_from_all<kAgain>(job, ranking);
    if (thread == 0) *missed = 1;
    return sample_again(job, state.attempt[1], ranking);
  }
  const int64_t need = job.k - totals.above;
  if (one_key) {
    if (segment == 0 && thread == 0) learn(job, c, attempt.low, static_cast<double>(totals.within), 1, round);
    return;
  }
  find_bin(ranking, upper, lower, need);  // the one that holds the k-th largest
  const int bin = ranking.bin;
  if (thread == 0) totals.bin = bin, totals.need = ranking.need, totals.count = ranking.count;
#pragma unroll 1
  for (int64_t at = 0; at < count; at += kBlock) {  // whole warps at a time: they list together
    const bool there = at + thread < count;
    if (at != 0 && there) key = candidates.key(begin + at + thread), index = candidates.index(begin + at + thread);
    const int own = there ? static_cast<int>((c.of(key, index) - attempt.low) >> attempt.shift) : -1;
    if (own > bin) open_one(job, index);
    const unsigned same = __ballot_sync(kAllLanes, own == bin);
    if (same == 0) continue;
    unsigned listed = 0;
    if (lane_of_thread() == 0) listed = atomicAdd(&attempt.listed, static_cast<unsigned>(__popc(same)));
    listed = __shfl_sync(kAllLanes, listed, 0) + __popc(same & ((1u << lane_of_thread()) - 1));
    if (own == bin) candidates.set(candidates.room() + listed, key, index);
  }
  if (last_to_come(&attempt.done, job.segments, ranking.listed)) settle_bin(job, c, state, totals, round, ranking);
}

template <class T>
__global__ void __launch_bounds__(kBlock) settle_kernel(const __grid_constant__ T table, const __grid_constant__ Firsts<T> firsts,
                                                        State* states, unsigned* missed, int round) {
  __shared__ Ranking ranking;
  __shared__ Totals totals;
  let_next_start();
  const int block = static_cast<int>(blockIdx.x);
  const Job& job = job_at(table, firsts, block);
  if (job.large < 0) {
    if (round == kFirst) select_from_all<kFirst>(job, ranking);  // needs nothing of the launches ahead
    return wait_for_last();
  }
  wait_for_last();
  if (round != kFirst && *missed == 0) return;
  State& state = states[job.large];
  if (state.attempt[round].guess < Guess::window) return;
  with_coordinate(job, round, [&](const auto& c) {
    settle_segment(job, c, state, round, block - job.first_segment, missed, ranking, totals);
  });
}

}  // namespace
