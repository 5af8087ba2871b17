// What the kernels of `select` share: what a call asks of a layer, where a score stands among its layer's, what the launches tell
// each other of a layer, and what a layer's hint says.
#pragma once
#include <cmath>

#include "scores.h"
#include "select_rank.h"

namespace {

constexpr int64_t kSmall = 16 * kStrip;  // up to so many scores one block selects from all of them
constexpr int kBinBits = 9;              // of the histogram of a window
constexpr int kBins = 1 << kBinBits;
constexpr int kMostSegments = 128;

enum class Ties : int { last, first, all };

// A layer is scanned in the first round, again where the window of that one missed, and, for ties="all" only, once more where the
// second round has found the key whose ties are to be opened wherever they are.
constexpr int kFirst = 0, kAgain = 1, kTies = 2;

struct Job : Layer {
  double* hint;  // null for `select`
  int64_t k;
  uint8_t* candidates;
  int64_t stride;               // n by the number of scores that `begin` samples
  int first_block, blocks;      // of `begin`: those that sample it
  int first_segment, segments;  // the candidates' list is in 2^x parts: a counter each, and a block each that settles it; a small
                                // layer has the one block that selects from it
  int capacity;                 // of a segment
  int large;                    // its number among the layers that are scanned, or -1
  bool value;
  Ties ties;
};

// ------------------------------------------------------------------------------------------------------------ coordinates

// Where a score stands among its layer's: by key first, then, among equal keys, by place: the strip, turned about for
// ties="first". Places are all 0 where `places` is 1. The coordinate is one integer: key * places + place, the key counted in its
// own steps.
template <class K_>
struct Coordinate {
  using K = K_;

  const void* scores;
  int64_t n;
  K inf;
  int size;
  bool value;
  bool first;       // ties="first"
  uint64_t places;  // of a key

  // size_ and value_ are the job's: constants where the caller knows them.
  __device__ Coordinate(const Job& job, int round, int size_, bool value_)
      : scores(job.scores),
        n(job.n),
        inf(static_cast<K>(job.inf)),
        size(size_),
        value(value_),
        first(job.ties == Ties::first),
        places(sizeof(K) < 8 && (job.ties != Ties::all || round != kFirst) ? strips(job.n) : 1) {}

  __device__ K key(int64_t i) const {
    K raw;
    if constexpr (sizeof(K) == 8)
      raw = static_cast<const uint64_t*>(scores)[i];
    else
      raw = size == 2 ? uint32_t{static_cast<const uint16_t*>(scores)[i]} << 16 : static_cast<const uint32_t*>(scores)[i];
    return key_of(raw, inf, nan_key(inf, size, value), value) >> key_unit(size);
  }
  __device__ K most_key() const { return nan_key(inf, size, value) >> key_unit(size); }
  // Rises in the direction in which ties are preferred; a strip's lie side by side.
  __device__ uint64_t order(int64_t i) const { return first ? strips(n) * kStrip - 1 - i : i; }
  __device__ uint64_t place(int64_t strip) const { return places == 1 ? 0 : first ? strips(n) - 1 - strip : strip; }
  __device__ uint64_t of(K key, int64_t i) const { return key * places + place(i / kStrip); }
  __device__ uint64_t most() const { return uint64_t{most_key()} * places + (places - 1); }

  // As a hint counts: signed, in keys, the place a fraction.
  __device__ uint64_t zero() const { return value ? inf >> key_unit(size) : 0; }
  __device__ double to_hint(uint64_t coordinate) const {
    if (places == 1) return static_cast<double>(static_cast<int64_t>(coordinate - zero()));
    return static_cast<double>(coordinate) / static_cast<double>(places) - static_cast<double>(zero());
  }
  __device__ double from_hint(double hint) const { return (hint + static_cast<double>(zero())) * static_cast<double>(places); }
};

// Calls f with the coordinate of the job's scores; what it does not know when it is compiled it asks for at every score.
template <class F>
__device__ void with_coordinate(const Job& job, int round, const F& f) {
  if (job.size == 8)
    f(Coordinate<uint64_t>(job, round, 8, job.value));
  else
    f(Coordinate<uint32_t>(job, round, job.size, job.value));
}

// What the launches tell each other of a layer, one for the first round and one for the second.
struct Segment {
  unsigned within;               // of scores in the window; 32 bits suffice below 2^39 scores
  unsigned long long above;      // of scores above it, where the sum over the segments is meant
  unsigned long long unused[2];  // a sector each, or atomics would queue
};

// What the window of an attempt is: none to scan; k is 0 or n, which needs no proof; the key found in the second round, for the
// third; a window; a window of one key with ties="all", which needs no list.
enum class Guess : int { none, ends, ties, window, one_key };

struct Attempt {
  Guess guess;
  int shift;           // from a coordinate in the window to its bin
  uint64_t low, high;  // the window, both ends in it
  uint64_t low_key, high_key;
  int64_t low_place, high_place;  // of the ends; high_place may be -1, before the first
  unsigned done, listed;          // blocks that have settled their segment; candidates in the bin of the k-th largest
  Segment segment[kMostSegments];
  unsigned bins[kBins];
};

// Of a large layer, in scratch memory; all zeros before the first launch.
struct State {
  Attempt attempt[2];
  unsigned sampled;  // blocks that have added to the histogram of the sample
  unsigned sample[1 << kDigit];
};

// Whether this block is the last of `blocks` that come here; it then sees what the others have written before. `came` is the
// block's own. All threads of a block.
__device__ bool last_to_come(unsigned* counter, int blocks, unsigned& came) {
  __syncthreads();
  if (blocks == 1) return true;
  if (threadIdx.x == 0) {  // a fence is for all that the barrier has put before it
    __threadfence();
    came = atomicAdd(counter, 1u);
    __threadfence();
  }
  __syncthreads();
  return came == static_cast<unsigned>(blocks - 1);
}

// ------------------------------------------------------------------------------------------------------------------ hints

__device__ bool makes_sense(const double* hint) { return hint[1] > 0 && hint[1] < 1e19 && fabs(hint[0]) < 1e19; }

// The window that the hint names; false if there is none.
template <class C>
__device__ bool window_of_hint(const Job& job, const C& c, uint64_t& from, uint64_t& to) {
  if (job.hint == nullptr || !makes_sense(job.hint)) return false;
  const uint64_t most = c.most();
  const double middle = c.from_hint(job.hint[0]), half = job.hint[1] * static_cast<double>(c.places);
  const double low = ceil(middle - half), high = floor(middle + half), end = static_cast<double>(most);
  if (!(low <= high)) return false;
  const auto inside = [&](double x) { return x <= 0 ? 0 : x >= end ? most : static_cast<uint64_t>(x); };
  from = inside(low), to = inside(high);
  return true;
}

// Writes where the k-th largest score stands now, and how wide the next window should be: from how far it moved, and how many
// scores a step of the coordinate is worth here, by the `within` ones that the last window of `span` steps held. One thread; out
// of line because its divisions are long.
__device__ __noinline__ void learn(double* hint, double now, double n, double places, double within, double span, int missed) {
  const double each = span / within, all = n * each / 2;  // half-widths: all * share holds about that share of all scores
  double next = all / 64;
  if (makes_sense(hint)) next = max(4 * fabs(now - hint[0]) * places, missed ? 0 : .75 * hint[1] * places);
  next = min(max(next, min(all / 8192 + 16 * each, all / 16)), all / 16);
  hint[0] = now;
  hint[1] = max(next, places == 1 ? .5 : 1.) / places;  // .5: a window of one key is worth having
  hint[2] = within;
  hint[3] = (hint[3] >= 0 && hint[3] < 1e15 ? hint[3] : 0) + missed;
}
template <class C>
__device__ void learn(const Job& job, const C& c, uint64_t coordinate, double within, double span, int missed) {
  if (job.hint == nullptr) return;
  learn(job.hint, c.to_hint(coordinate), static_cast<double>(job.n), static_cast<double>(c.places), within, span, missed);
}

// Where each layer's part of a launch's blocks, or strips, begins: apart from the layers, or looking one up would read them all.
template <class T>
struct Firsts {
  int of[T::kMost];
};

// The layer whose part holds `at`: the last one that begins at it or before.
template <class T>
__device__ const Job& job_at(const T& table, const Firsts<T>& firsts, int at) {
  int low = 0, high = table.layers;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (firsts.of[middle] <= at ? low : high) = middle;
  }
  return table.layer[low];
}

}  // namespace
