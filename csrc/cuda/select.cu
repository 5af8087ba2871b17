// Exact top-k of scores to bits, for many layers in one call: `select`, and `refresh_`, which also writes the effective weight.
//
// One read of the scores. A window of keys that should hold the k-th largest one is guessed (`begin`), from the last call's hint
// or from a sample. The scan writes the bits of all scores above it, counts them, and lists the few inside: the candidates. The
// counts prove the guess, and then the candidates are settled exactly: by a histogram of the window that the scan has made, all
// but those of the bin of the k-th largest, and by the last block of the layer these. Where the counts disprove the guess, the
// scan and the settling run once more with another sample; should that fail too, one block selects from all scores, as it does
// for small layers at once. Both second launches end at once where no layer needs them: nothing waits for the host, and the
// launches depend on sizes alone.
//
// Ties are no special case, because the window is one of key and place: among equal keys the strip of a score decides
// (`Coordinate`), so that constant scores are sampled, bounded and settled as any others are. ties="all" knows no places: its
// window is of whole keys, and one key alone needs no list. Should whole keys be too many to list, the second round finds the key
// with places nevertheless, and a third scan opens its ties wherever they are. Only float64 scores, whose keys leave no room for
// places, go without.
//
// All counts are of whole numbers, and no result depends on the order in which blocks run: the same scores give the same bits and
// hints.
#include <bit>
#include <cmath>

#include "scores.h"

namespace {

constexpr int kBlock = 1024;             // threads of a block that ranks
constexpr int64_t kSmall = 16 * kStrip;  // up to so many scores one block selects from all of them
constexpr int kDigit = 11;               // bits that a round of a ranking decides
constexpr int kFew = 128;                // up to so many values are ranked by comparing each with each
constexpr int kPilots = 127;             // sampled scores that divide a layer's range for the histogram of a sample
constexpr int kParts = 16;               // bins from one pilot to the next
constexpr int kSampled = 2;              // scores that a thread samples in the first round, in one of many blocks
constexpr int kSampledAgain = 8;         // and in the second, in one block
constexpr int kBinBits = 9;              // of the histogram of a window
constexpr int kBins = 1 << kBinBits;
constexpr int kMostSegments = 128;
static_assert((kPilots + 1) * kParts == 1 << kDigit && kPilots < kFew);

enum class Ties : int { last, first, all };

// A layer is scanned in the first round, again where the window of that one missed, and, for ties="all" only, once more where the
// second round has found the key whose ties are to be opened wherever they are.
constexpr int kFirst = 0, kAgain = 1, kTies = 2;

struct Job : Layer {
  double* hint;  // null for `select`
  int64_t k;
  uint8_t* candidates;
  int64_t stride;               // n by the number of scores that `begin` samples
  int first_block, blocks;      // of `begin`: those that sample it, or the one that selects from it
  int first_segment, segments;  // the candidates' list is in 2^x parts: a counter each, and a block each that settles it
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
  if (threadIdx.x == 0) {  // a fence is for all that the barrier has put before it
    __threadfence();
    came = atomicAdd(counter, 1u);
    __threadfence();
  }
  __syncthreads();
  return came == static_cast<unsigned>(blocks - 1);
}

// ---------------------------------------------------------------------------------------------------------------- ranking

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

// The need-th largest of the list's values in [low, high], 1 <= need <= their number: narrowed down to a range that holds at most
// `enough` of them, or to one value. get(i, value) says whether item i takes part;
// Flight of a thread's are asked for at a time. All threads of a block of kBlock.
template <int Flight, class Get>
__device__ Rank rank_in_block(int64_t items, uint64_t low, uint64_t high, int64_t need, int64_t enough, Ranking& r,
                              const Get& get) {
  constexpr int64_t kRun = int64_t{1} << 31;  // items whose counts fit in a bin
  int64_t count = items;
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

// The need-th largest of a list whose values lie in [low, high] and whose orders, all different, in [first, last]; value(i),
// order(i). With `all_ties` its value alone, of order `first`. All threads of a block of kBlock.
template <int Flight, class Value, class Order>
__device__ Cut cut_in_block(int64_t items, uint64_t low, uint64_t high, uint64_t first, uint64_t last, int64_t need,
                            bool all_ties, Ranking& r, const Value& value, const Order& order) {
  const int thread = threadIdx.x;
  Rank found = rank_in_block<Flight>(items, low, high, need, kFew, r, [&](int64_t i, uint64_t& at) {
    at = value(i);
    return true;
  });
  low = found.low, high = found.high;
  const double within = static_cast<double>(found.count), span = static_cast<double>(high - low) + 1;
  if (found.count > kFew) {  // ties
    if (all_ties || found.need >= found.count) return {low, first, within, span};
    found = rank_in_block<Flight>(items, first, last, found.need, kFew, r, [&](int64_t i, uint64_t& at) {
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

// ------------------------------------------------------------------------------------------------------------------ hints

__device__ bool makes_sense(const double* hint) { return hint[1] > 0 && hint[1] < 1e19 && fabs(hint[0]) < 1e19; }

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

// ------------------------------------------------------------------------------------------------------- one block, all scores

// Bits and effective weights of the scores above `key`, and of those equal to it whose order reaches `cut`. All threads of a
// block.
template <class C>
__device__ void write_all(const Job& job, const C& c, uint64_t key, uint64_t cut) {
  const int64_t words = mask_words(job.n);
  const int lane = lane_of_thread();
#pragma unroll 4
  for (int64_t word = threadIdx.x / kWarpSize; word < words; word += kBlock / kWarpSize) {
    const int64_t i = word * kWarpSize + lane;
    const bool there = i < job.n;
    bool open = false;
    if (there) {
      const uint64_t own = c.key(i);
      open = own > key || (own == key && c.order(i) >= cut);
    }
    const unsigned bits = __ballot_sync(kAllLanes, open);
    if (lane == 0) job.bits[word] = bits;
    if (there && job.weight_size == 4)
      static_cast<uint32_t*>(job.w_eff)[i] = open ? static_cast<const uint32_t*>(job.weight)[i] : 0;
    else if (there && job.weight_size == 2)
      static_cast<uint16_t*>(job.w_eff)[i] = open ? static_cast<const uint16_t*>(job.weight)[i] : uint16_t{0};
    else if (there && job.weight_size == 8)
      static_cast<uint64_t*>(job.w_eff)[i] = open ? static_cast<const uint64_t*>(job.weight)[i] : 0;
  }
}

template <class C>
__device__ void select_in_block(const Job& job, const C& c, int missed, Ranking& ranking) {
  if (job.k == 0) return write_all(job, c, uint64_t{c.most_key()} + 1, 0);
  if (job.k == job.n) return write_all(job, c, 0, 0);
  const Cut cut = cut_in_block<sizeof(typename C::K) == 8 ? 4 : 8>(
      job.n, 0, c.most_key(), 0, strips(job.n) * kStrip - 1, job.k, job.ties == Ties::all, ranking,
      [&](int64_t i) -> uint64_t { return c.key(i); }, [&](int64_t i) { return c.order(i); });
  write_all(job, c, cut.value, cut.order);
  const auto places = static_cast<double>(c.places);
  const uint64_t place = c.places == 1 ? 0 : cut.order / kStrip;
  if (threadIdx.x == 0) learn(job, c, cut.value * c.places + place, cut.within, cut.span * places, missed);
}

// ------------------------------------------------------------------------------------------------------------------ begin

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

// A block's part of the guess: all its layer's take a sample, and the last one looks at it.
template <class C>
__device__ void begin_large(const Job& job, const C& c, State& state, int block, Ranking& r) {
  Attempt& attempt = state.attempt[kFirst];
  uint64_t low = 0, high = 0;
  if (job.k == 0 || job.k == job.n || window_of_hint(job, c, low, high)) {
    if (block == 0 && threadIdx.x == 0) set_window(attempt, job, c, low, high);
    return;
  }
  constexpr int64_t kOwn = kSampled * kBlock;
  const int64_t parts = job.blocks * kOwn;
  take_sample<kSampled>(job, c, 0, block * kOwn, job.stride, r);
  for (int i = threadIdx.x; i < 1 << kDigit; i += kBlock)
    if (r.bins[i] != 0) atomicAdd(&state.sample[i], r.bins[i]);
  if (last_to_come(&state.sampled, job.blocks, r.listed)) guess_by_sample(attempt, job, c, 3.5, parts, state.sample, r);
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

template <class T>
__global__ void __launch_bounds__(kBlock)
    begin_kernel(const __grid_constant__ T table, const __grid_constant__ Firsts<T> firsts, State* states) {
  __shared__ Ranking ranking;
  const int block = static_cast<int>(blockIdx.x);
  const Job& job = job_at(table, firsts, block);
  if (job.large < 0)
    return with_scores(job.size, job.value, [&](auto raw, auto value) {
      using S = decltype(raw);
      select_in_block(job, Coordinate<Key<S>>(job, kFirst, sizeof(S), decltype(value)::value), 0, ranking);
    });
  with_coordinate(job, kFirst, [&](const auto& c) { begin_large(job, c, states[job.large], block - job.first_block, ranking); });
}

// ------------------------------------------------------------------------------------------------------------- candidates

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

// ------------------------------------------------------------------------------------------------------------------- scan

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
  if (round != kFirst && *missed == 0) return;
  for (int i = threadIdx.x; i < kBins; i += kStripThreads) bins[i] = 0;
  const int start = run * static_cast<int>(blockIdx.x), end = start + min(run, static_cast<int>(table.tiles) - start);
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

// ----------------------------------------------------------------------------------------------------------------- settle

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
      count, low_key, high_key, first, last, totals.need, job.ties == Ties::all, ranking,
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

// What comes next for a layer whose window has missed, once and twice. Out of line: rare, they would take registers from what is
// not.
__device__ __noinline__ void sample_again(const Job& job, Attempt& attempt, Ranking& ranking) {
  with_coordinate(job, kAgain, [&](const auto& c) {
    constexpr int64_t kParts = kSampledAgain * kBlock;
    take_sample<kSampledAgain>(job, c, 1, 0, job.n / kParts, ranking);
    guess_by_sample(attempt, job, c, 5, kParts, ranking.bins, ranking);
  });
}
__device__ __noinline__ void select_from_all(const Job& job, Ranking& ranking) {
  with_coordinate(job, kAgain, [&](const auto& c) { select_in_block(job, c, 2, ranking); });
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
    if (round == kAgain) return select_from_all(job, ranking);
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
  if (round != kFirst && *missed == 0) return;
  const int block = static_cast<int>(blockIdx.x);
  const Job& job = job_at(table, firsts, block);
  State& state = states[job.large];
  if (state.attempt[round].guess < Guess::window) return;
  with_coordinate(job, round, [&](const auto& c) {
    settle_segment(job, c, state, round, block - job.first_segment, missed, ranking, totals);
  });
}

// -------------------------------------------------------------------------------------------------------------------- ops

void run(const Place& place, std::vector<Job>& jobs) {
  const auto tiles_of = [](const Job& job) { return job.n > kSmall ? strips(job.n) : 0; };  // a tile is a strip
  with_tables(jobs, tiles_of, [&](auto& table) {
    using T = std::decay_t<decltype(table)>;
    Firsts<T> first_block = {}, first_segment = {}, first_strip = {};
    int large = 0, blocks = 0, segments = 0;
    int64_t bytes = 0;
    for (int i = 0; i < table.layers; i++) {
      Job& job = table.layer[i];
      first_block.of[i] = job.first_block = blocks;
      first_segment.of[i] = job.first_segment = segments;
      first_strip.of[i] = static_cast<int>(job.first_tile);
      job.large = -1, job.blocks = 1;
      if (job.n > kSmall) {
        // Room for a twelfth of the scores, twice what a window should hold, and for whole strips of ties at either end of it.
        job.large = large++;
        job.blocks = static_cast<int>(std::clamp<int64_t>(job.n >> 17, 2, 32));
        job.stride = job.n / (int64_t{job.blocks} * kSampled * kBlock);
        job.segments =
            static_cast<int>(std::bit_floor(static_cast<uint64_t>(std::clamp<int64_t>(strips(job.n) / 128, 1, kMostSegments))));
        job.capacity =
            static_cast<int>(std::min<int64_t>(job.n / (12 * job.segments) + 2 * kStrip + 2 * kStrip / job.segments, INT32_MAX));
        segments += job.segments;
        bytes += candidate_bytes(job);
      }
      blocks += job.blocks;
    }
    constexpr int64_t kHead = 512;
    const int64_t states_end = kHead + ceil_div(int64_t{large} * int64_t{sizeof(State)}, 512) * 512;
    const Tensor scratch = place.scratch(states_end + bytes);
    auto* const memory = static_cast<uint8_t*>(scratch.mutable_data_ptr());
    auto* const missed = reinterpret_cast<unsigned*>(memory);
    auto* const states = reinterpret_cast<State*>(memory + kHead);
    uint8_t* candidates = memory + states_end;
    for (int i = 0; i < table.layers; i++) {
      Job& job = table.layer[i];
      if (job.large < 0) continue;
      job.candidates = candidates;
      candidates += candidate_bytes(job);
    }
    if (large) place.zero(memory, static_cast<size_t>(states_end));
    place.launch(begin_kernel<T>, dim3(static_cast<unsigned>(blocks)), kBlock, 0, table, first_block, states);
    STD_TORCH_CHECK(table.tiles <= INT32_MAX, place.op(), ": more than 2^41 scores in a call");
    const auto run = static_cast<int>(std::max<int64_t>(ceil_div(table.tiles, place.processors() * 4), 1));
    const auto scanning = static_cast<unsigned>(ceil_div(table.tiles, run));
    const bool all = table.layer[0].ties == Ties::all;
    for (const int round : {kFirst, kAgain, kTies}) {
      if (round == kTies && !all) break;
      place.launch(scan_kernel<T>, dim3(scanning), kStripThreads, 0, table, first_strip, states, missed, round, run);
      if (round == kTies) break;
      place.launch(settle_kernel<T>, dim3(static_cast<unsigned>(segments)), kBlock, 0, table, first_segment, states, missed,
                   round);
    }
  });
}

bool by_value(const char* op, const std::string& by) {
  STD_TORCH_CHECK(by == "magnitude" || by == "value", op, ": by must be 'magnitude' or 'value', got '", by, "'");
  return by == "value";
}

Ties tie_rule(const char* op, const std::string& ties) {
  if (ties == "last") return Ties::last;
  if (ties == "first") return Ties::first;
  STD_TORCH_CHECK(ties == "all", op, ": ties must be 'last', 'first' or 'all', got '", ties, "'");
  return Ties::all;
}

Job job_of(const char* op, Arguments& arguments, const Tensor& scores, int64_t k, bool value, Ties ties) {
  Job job = {};
  arguments.take_scores(job, scores);
  STD_TORCH_CHECK(k >= 0 && k <= job.n, op, ": k must be between 0 and ", job.n, ", got ", k);
  job.k = k, job.value = value, job.ties = ties;
  return job;
}

std::vector<Tensor> select_cuda(std::vector<Tensor> scores, std::vector<int64_t> k, std::string by, std::string ties) {
  check_lengths("select", scores.size(), k.size(), "values of k");
  const bool value = by_value("select", by);
  const Ties rule = tie_rule("select", ties);
  std::vector<Tensor> bits;
  if (scores.empty()) return bits;
  const Place place("select", scores[0]);
  Arguments arguments(place);
  std::vector<Job> jobs;
  for (size_t i = 0; i < scores.size(); i++) {
    Job job = job_of("select", arguments, scores[i], k[i], value, rule);
    bits.push_back(arguments.new_bits(job));
    if (job.n) jobs.push_back(job);
  }
  run(place, jobs);
  return bits;
}

void refresh_cuda(std::vector<Tensor> scores, std::vector<Tensor> weights, std::vector<int64_t> k, std::vector<Tensor> bits,
                  std::vector<Tensor> w_eff, std::vector<Tensor> hints, std::string by, std::string ties) {
  const char* const op = "refresh_";
  check_lengths(op, scores.size(), weights.size(), "weights");
  check_lengths(op, scores.size(), k.size(), "values of k");
  check_lengths(op, scores.size(), bits.size(), "bits");
  check_lengths(op, scores.size(), w_eff.size(), "effective weights");
  check_lengths(op, scores.size(), hints.size(), "hints");
  const bool value = by_value(op, by);
  const Ties rule = tie_rule(op, ties);
  if (scores.empty()) return;
  const Place place(op, scores[0]);
  Arguments arguments(place);
  std::vector<Job> jobs;
  for (size_t i = 0; i < scores.size(); i++) {
    Job job = job_of(op, arguments, scores[i], k[i], value, rule);
    arguments.take_bits(job, bits[i]);
    place.check("hints", hints[i]);
    STD_TORCH_CHECK(hints[i].scalar_type() == ScalarType::Double && hints[i].numel() == 4 && hints[i].is_contiguous(), op,
                    ": hints must be contiguous float64 with 4 elements, got ", hints[i].numel());
    job.hint = static_cast<double*>(hints[i].mutable_data_ptr());
    arguments.take_weight(job, weights[i], w_eff[i]);
    if (job.n) jobs.push_back(job);
  }
  run(place, jobs);
  arguments.flush();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("select", TORCH_BOX(&select_cuda));
  m.impl("refresh_", TORCH_BOX(&refresh_cuda));
}
