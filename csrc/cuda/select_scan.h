// `scan`: one read of the scores. Bits and effective weights of all that lies above the window, and a list of what lies in it.
#pragma once
#include "select_begin.h"

namespace {

constexpr int kAhead = 64 << 10;  // bytes that a block of the scan asks for ahead: all of them together fit in the L2 cache

// The candidates of a layer: keys and places in the tensor, first of all segments, then, again with as much room, of the bin that
// holds the k-th largest.
template <class K>
class Candidates {
 public:
  __device__ explicit Candidates(const Job& job) : wide_(job.n > int64_t{1} << 32) {
    const int64_t room = int64_t{job.segments} * job.capacity;
    keys_ = reinterpret_cast<K*>(job.candidates);
    indices_ = reinterpret_cast<uint32_t*>(keys_ + 2 * room);
    room_ = room;
  }
  __device__ int64_t room() const { return room_; }
  __device__ void set(int64_t at, K key, int64_t i) const {
    keys_[at] = key;
    if (wide_)
      reinterpret_cast<int64_t*>(indices_)[at] = i;
    else
      indices_[at] = static_cast<uint32_t>(i);
  }
  __device__ K key(int64_t at) const { return keys_[at]; }
  __device__ int64_t index(int64_t at) const {
    return wide_ ? reinterpret_cast<const int64_t*>(indices_)[at] : int64_t{indices_[at]};
  }

 private:
  K* keys_;
  uint32_t* indices_;
  int64_t room_;
  bool wide_;
};

int64_t candidate_bytes(const Job& job) {
  const int64_t each = (job.size == 8 ? 8 : 4) + (job.n > int64_t{1} << 32 ? 8 : 4);
  return ceil_div(2 * int64_t{job.segments} * job.capacity * each, 512) * 512;
}

// Scans a strip; returns how many of the lane's scores are above the window.
template <class S, bool Value>
__device__ __forceinline__ unsigned scan_strip(const Job& job, Attempt& attempt, int round, int64_t strip, unsigned* bins) {
  using K = Key<S>;
  constexpr int E = kEach<S>, kUnit = key_unit(sizeof(S));
  const Coordinate<K> c(job, round, sizeof(S), Value);
  const int lane = lane_of_thread();
  // Within a strip the window is one of keys alone: an end's own key counts where the strip is past its place.
  const auto ends = [&]() -> Ends<K> {
    const auto place = static_cast<int64_t>(c.place(strip));
    return {static_cast<K>(attempt.low_key << kUnit) + (place < attempt.low_place),
            static_cast<K>(attempt.high_key << kUnit) + (place <= attempt.high_place)};
  };
  const Sides sides = read_strip<S, Value>(static_cast<const S*>(job.scores), strip, job.n, c.inf, ends);
  const Guess guess = attempt.guess;
  const unsigned within = sides.reached & ~sides.above;
  const unsigned open = guess == Guess::one_key ? sides.reached : sides.above;
  const bool any = __any_sync(kAllLanes, within != 0) && guess >= Guess::window;
  // Candidates are listed in the order of the tensor, so that those who share a word of the mask are settled side by side.
  unsigned listed = 0;
  int own = 0, scan = 0;
  unsigned base = 0;
  const int segment = static_cast<int>(strip) & (job.segments - 1);
  if (any) {
    listed = word_of_strip<E>(within);
    own = scan = __popc(listed);
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, scan, step);
      if (lane >= step) scan += other;
    }
    if (lane == kWarpSize - 1) base = atomicAdd(&attempt.segment[segment].within, static_cast<unsigned>(scan));
  }
  store_strip<E>(job.bits, strip, job.n, open);
  keep_strip<E>(job, strip, open);
  const auto above = static_cast<unsigned>(__popc(sides.above));
  if (!any || guess != Guess::window) return above;
  unsigned at = __shfl_sync(kAllLanes, base, kWarpSize - 1) + static_cast<unsigned>(scan - own);
  const Candidates<K> candidates(job);
  const uint64_t first = attempt.low;
  const int shift = attempt.shift;
  for (; listed != 0; listed &= listed - 1, at++) {
    const int64_t i = strip * kStrip + lane * 32 + (__ffs(static_cast<int>(listed)) - 1);
    const K key = c.key(i);
    if (at < static_cast<unsigned>(job.capacity)) candidates.set(int64_t{segment} * job.capacity + at, key, i);
    const uint64_t bin = (c.of(key, i) - first) >> shift;
    atomicAdd(&bins[bin < kBins ? bin : kBins - 1], 1u);
  }
  return above;
}

// Asks the cache for the first strips of a block's own, those of one layer, while the window is being guessed.
__device__ __forceinline__ void ask_ahead(const Job& job, int start, int end) {
  const int64_t strip = start - job.first_tile + threadIdx.x;
  const int bytes = kStrip * job.size;
  if (static_cast<int>(threadIdx.x) < kAhead / bytes && start + static_cast<int>(threadIdx.x) < end &&
      (strip + 1) * kStrip <= job.n)
    prefetch(static_cast<const uint8_t*>(job.scores) + strip * bytes, bytes);
}

// A block takes the next `run` strips of the table, and counts in shared memory what it finds of each layer: the histogram of its
// candidates, whose atomics would queue for the L2 cache, is added to the layer's once.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kScanBlocks = 3;  // on a multiprocessor: four would spill there
#else
constexpr int kScanBlocks = 4;
#endif
template <class T>
__global__ void __launch_bounds__(kStripThreads, kScanBlocks)
    scan_kernel(const __grid_constant__ T table, const __grid_constant__ Firsts<T> firsts, State* states, const unsigned* missed,
                int round, int run) {
  __shared__ unsigned bins[kBins];
  let_next_start();
  const int start = run * static_cast<int>(blockIdx.x), end = start + min(run, static_cast<int>(table.tiles) - start);
  if (round == kFirst) ask_ahead(job_at(table, firsts, start), start, end);
  wait_for_last();
  if (round != kFirst && *missed == 0) return;
  for (int i = threadIdx.x; i < kBins; i += kStripThreads) bins[i] = 0;
  for (int strip = start; strip < end;) {
    const Job& job = job_at(table, firsts, strip);
    Attempt& attempt = states[job.large].attempt[round == kAgain];
    int own = strip - static_cast<int>(job.first_tile) + static_cast<int>(threadIdx.x) / kWarpSize;
    const int last = static_cast<int>(min(end - job.first_tile, strips(job.n)));
    strip = static_cast<int>(job.first_tile) + last;
    if (round == kAgain && attempt.guess == Guess::none) continue;
    if (round == kTies && attempt.guess != Guess::ties) continue;
    __syncthreads();  // the bins are zero
    unsigned above = 0;
    with_scores(job.size, job.value, [&](auto raw, auto value) {
#pragma unroll 1
      for (; own < last; own += kStripWarps)
        above += scan_strip<decltype(raw), decltype(value)::value>(job, attempt, round, own, bins);
    });
    above = __reduce_add_sync(kAllLanes, above);
    if (lane_of_thread() == 0 && above != 0)
      atomicAdd(&attempt.segment[own & (job.segments - 1)].above, static_cast<unsigned long long>(above));
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kStripThreads) {
      if (bins[i] != 0) atomicAdd(&attempt.bins[i], bins[i]);
      bins[i] = 0;
    }
  }
}

}  // namespace
