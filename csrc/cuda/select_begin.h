// `begin`: the window of a layer, from its hint or from a sample of its scores.
#pragma once
#include "select.h"

namespace {

constexpr int kPilots = 127;      // sampled scores that divide a layer's range for the histogram of a sample
constexpr int kParts = 16;        // bins from one pilot to the next
constexpr int kSampled = 2;       // scores that a thread samples in the first round, in one of many blocks
constexpr int kSampledAgain = 8;  // and in the second, in one block
static_assert((kPilots + 1) * kParts == 1 << kDigit && kPilots < kFew);

// Writes an attempt at the window [low, high]. One thread.
template <class C>
__device__ void set_window(Attempt& attempt, const Job& job, const C& c, uint64_t low, uint64_t high) {
  Guess guess = Guess::window;
  attempt.low = low, attempt.high = high;
  attempt.low_key = low / c.places, attempt.high_key = high / c.places;
  attempt.low_place = static_cast<int64_t>(low - attempt.low_key * c.places);
  attempt.high_place = static_cast<int64_t>(high - attempt.high_key * c.places);
  if (job.k == 0) {
    guess = Guess::ends;
    attempt.low_key = attempt.high_key = uint64_t{c.most_key()} + 1;
    attempt.low_place = attempt.high_place = 0;
  } else if (job.k == job.n) {
    guess = Guess::ends;
    attempt.low_key = attempt.high_key = 0;
    attempt.low_place = 0, attempt.high_place = -1;
  } else if (job.ties == Ties::all && c.places == 1 && low == high) {
    guess = Guess::one_key;
  }
  attempt.guess = guess;
  attempt.shift = high > low ? max(64 - __clzll(static_cast<long long>(high - low)) - kBinBits, 0) : 0;
}

__device__ uint64_t hashed(uint64_t x) {  // splitmix64, shortened; 32 bits
  x *= 0x9e3779b97f4a7c15u;
  return (x ^ x >> 29) * 0xbf58476d1ce4e5b9u >> 32;
}

// The place of a sample: hashed, within part `part` of the scores, all of which have `stride`.
__device__ int64_t sampled_at(int64_t stride, int64_t part, int stream) {
  const uint64_t hash = hashed((static_cast<uint64_t>(stream) << 32) + static_cast<uint64_t>(part) + 1);
  return part * stride + static_cast<int64_t>(hash * static_cast<uint64_t>(stride) >> 32);
}

// Bins of a sample. Pilots, a small sample of its own, divide the range where the scores are, ties included; each is a bin, and
// what lies from it to the next pilot is divided into at most kParts - 1 equal ones. `starts` holds 0, the pilots ascending, and
// what is past the range.
class SampleBins {
 public:
  __device__ explicit SampleBins(const uint64_t* starts) : starts_(starts) {}
  __device__ int of(uint64_t coordinate) const {
    int t = 0;
#pragma unroll
    for (int step = (kPilots + 1) / 2; step > 0; step /= 2)
      if (starts_[t + step] <= coordinate) t += step;
    const uint64_t past = coordinate - starts_[t];
    return t * kParts + (past == 0 ? 0 : 1 + static_cast<int>((past - 1) >> shift(t)));
  }
  __device__ uint64_t low(int bin) const {
    const int t = bin / kParts, part = bin % kParts;
    return starts_[t] + (part == 0 ? 0 : 1 + (static_cast<uint64_t>(part - 1) << shift(t)));
  }
  __device__ uint64_t high(int bin) const {
    const int t = bin / kParts, part = bin % kParts;
    return part == 0 ? starts_[t] : min(low(bin) + ((uint64_t{1} << shift(t)) - 1), starts_[t + 1] - 1);
  }

 private:
  __device__ int shift(int t) const {
    const uint64_t values = starts_[t + 1] - starts_[t] - 1;  // past the first
    if (values < kParts) return 0;
    const int shift = 64 - __clzll(static_cast<long long>(values)) - 4;
    return shift + ((values - 1) >> shift >= kParts - 1);
  }

  const uint64_t* starts_;
};

// Adds samples [first, first + Own * kBlock), one of each `stride` scores, to the block's bins, which it zeroes before. All
// threads of a block.
template <int Own, class C>
__device__ void take_sample(const Job& job, const C& c, int attempts, int64_t first, int64_t stride, Ranking& r) {
  const int thread = threadIdx.x;
  typename C::K own[Own];
#pragma unroll
  for (int j = 0; j < Own; j++) own[j] = c.key(sampled_at(stride, first + j * kBlock + thread, 2 * attempts));
  if (thread < kPilots) {
    const int64_t i = sampled_at(job.n / kPilots, thread, 2 * attempts + 1);
    r.order[thread] = c.of(c.key(i), i);
  }
  r.bins[thread] = r.bins[kBlock + thread] = 0;
  __syncthreads();
  constexpr int kEachBy = kBlock / kFew;
  const int pilot = thread / kEachBy;
  int before = 0;
  const uint64_t value = pilot < kPilots ? r.order[pilot] : 0;
#pragma unroll 4
  for (int j = thread % kEachBy; j < kPilots; j += kEachBy) before += r.order[j] < value || (r.order[j] == value && j < pilot);
#pragma unroll
  for (int step = 1; step < kEachBy; step *= 2) before += __shfl_xor_sync(kAllLanes, before, step);
  if (thread % kEachBy == 0) {
    if (pilot < kPilots)
      r.few[1 + before] = value;
    else
      r.few[0] = 0, r.few[kPilots + 1] = c.most() + 1;
  }
  __syncthreads();
  const SampleBins bins(r.few);
#pragma unroll
  for (int j = 0; j < Own; j++) {
    const int64_t i = sampled_at(stride, first + j * kBlock + thread, 2 * attempts);
    atomicAdd(&r.bins[bins.of(c.of(own[j], i))], 1u);
  }
  __syncthreads();
}

// The window from a sample's histogram: some standard deviations of the rank to either side. `counts` are the sample's, in the
// bins that take_sample has left in `r`. All threads of a block.
template <class C>
__device__ void guess_by_sample(Attempt& attempt, const Job& job, const C& c, double deviations, int64_t parts,
                                const unsigned* counts, Ranking& r) {
  const double share = static_cast<double>(job.k) / static_cast<double>(job.n), middle = share * static_cast<double>(parts);
  const double margin = deviations * sqrt(middle * (1 - share)) + 3;
  const auto upper = static_cast<int64_t>(floor(middle - margin)), lower = static_cast<int64_t>(ceil(middle + margin));
  const int bin = (1 << kDigit) - 1 - 2 * static_cast<int>(threadIdx.x);
  const long long of_bin = counts[bin], of_next = counts[bin - 1];
  const SampleBins bins(r.few);
  uint64_t low = 0, high = c.most();
  if (upper >= 1) {
    find_bin(r, of_bin, of_next, upper);
    high = bins.high(r.bin);
    __syncthreads();
  }
  if (lower <= parts) {
    find_bin(r, of_bin, of_next, lower);
    low = bins.low(r.bin);
  }
  if (threadIdx.x == 0) set_window(attempt, job, c, low, high);
}

// A block's part of the guess: all its layer's take a sample, and the last one looks at it.
template <class C>
__device__ void begin_large(const Job& job, const C& c, State& state, int block, Ranking& r) {
  Attempt& attempt = state.attempt[kFirst];
  uint64_t low = 0, high = 0;
  if (job.k == 0 || job.k == job.n || window_of_hint(job, c, low, high)) {
    let_next_start();
    wait_for_last();
    if (block == 0 && threadIdx.x == 0) set_window(attempt, job, c, low, high);
    return;
  }
  constexpr int64_t kOwn = kSampled * kBlock;
  const int64_t parts = job.blocks * kOwn;
  take_sample<kSampled>(job, c, 0, block * kOwn, job.stride, r);
  let_next_start();  // not before: the scan's reads would delay the sample's
  wait_for_last();
  for (int i = threadIdx.x; i < 1 << kDigit; i += kBlock)
    if (r.bins[i] != 0) atomicAdd(&state.sample[i], r.bins[i]);
  if (last_to_come(&state.sampled, job.blocks, r.listed)) guess_by_sample(attempt, job, c, 3.5, parts, state.sample, r);
}

// Zeros what the launches tell each other.
__global__ void __launch_bounds__(kBlock) zero_kernel(uint4* memory, int64_t pieces) {
  let_next_start();
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i < pieces) memory[i] = make_uint4(0, 0, 0, 0);
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    begin_kernel(const __grid_constant__ T table, const __grid_constant__ Firsts<T> firsts, State* states) {
  __shared__ Ranking ranking;
  const int block = static_cast<int>(blockIdx.x);
  const Job& job = job_at(table, firsts, block);
  with_coordinate(job, kFirst, [&](const auto& c) { begin_large(job, c, states[job.large], block - job.first_block, ranking); });
}

}  // namespace
