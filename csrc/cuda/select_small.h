// One block selects from all scores of a layer: of small ones at once, and of one whose windows have missed twice.
#pragma once
#include "select.h"

namespace {

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
  constexpr int kFlight = sizeof(typename C::K) == 8 ? 4 : 8;
  uint64_t low = 0, high = c.most_key();
  int64_t need = job.k, count = job.n;
  uint64_t from, to;
  if (missed == 0 && window_of_hint(job, c, from, to)) {
    from /= c.places, to /= c.places;
    unsigned above = 0, within = 0;
#pragma unroll kFlight
    for (int64_t i = threadIdx.x; i < job.n; i += kBlock) {
      const uint64_t own = c.key(i);
      above += own > to, within += own >= from && own <= to;
    }
    above = __reduce_add_sync(kAllLanes, above), within = __reduce_add_sync(kAllLanes, within);
    if (lane_of_thread() == 0) ranking.warp[threadIdx.x / kWarpSize] = static_cast<long long>(above) << 32 | within;
    __syncthreads();
    const long long both = warp_sum(ranking.warp[lane_of_thread()]), larger = both >> 32, inside = both & 0xffffffff;
    if (larger < job.k && job.k <= larger + inside)
      low = from, high = to, need = job.k - larger, count = inside;
    else
      missed = 1;
  }
  const Cut cut = cut_in_block<kFlight>(
      job.n, count, low, high, 0, strips(job.n) * kStrip - 1, need, job.ties == Ties::all, ranking,
      [&](int64_t i) -> uint64_t { return c.key(i); }, [&](int64_t i) { return c.order(i); });
  write_all(job, c, cut.value, cut.order);
  const auto places = static_cast<double>(c.places);
  const uint64_t place = c.places == 1 ? 0 : cut.order / kStrip;
  if (threadIdx.x == 0) learn(job, c, cut.value * c.places + place, cut.within, cut.span * places, missed);
}

// Of a small layer, or of one whose second window has missed too. Out of line: it would take registers from what settles.
template <int Round>
__device__ __noinline__ void select_from_all(const Job& job, Ranking& ranking) {
  with_coordinate(job, Round, [&](const auto& c) { select_in_block(job, c, Round == kFirst ? 0 : 2, ranking); });
}

}  // namespace
