// The rows of a mixed batch, grouped on the device by the task whose mask they go through.
#pragma once
#include "bank.h"

namespace {

// A row of the batch; the kernels take them sorted by task, so that the rows of a task find its bits in the caches.
struct alignas(16) Slot {
  const uint8_t* bits;  // its task's, as TaskLines; null for an id that is no task
  uint32_t step;
  int32_t row;

  __device__ const uint8_t* line(int64_t weight) const { return bits + (weight >> 9) * int64_t{step}; }
  __device__ bool is_open(int64_t weight) const { return bits != nullptr && line(weight)[weight >> 3 & 63] >> (weight & 7) & 1; }
};
struct Keyed {
  int32_t key, row;
};

constexpr int kFew = 256;  // rows that are ranked by comparing each with each
constexpr int kSorters = 1024;
constexpr int kDigit = 8, kDigits = 1 << kDigit;  // bits that a pass sorts by

template <class Table>
__device__ int key_of(const Table& bank, int64_t id) {
  return id >= 0 && id < bank.tasks ? static_cast<int>(id) : bank.tasks;
}
template <class Table>
__device__ Slot slot_of(const Table& bank, int key, int row) {
  if (key == bank.tasks) return {nullptr, 0, row};
  const TaskLines lines = bank.task(key);
  return {lines.first, static_cast<uint32_t>(lines.step), row};
}

template <class Table>
__global__ void __launch_bounds__(kFew)
    group_few_kernel(const __grid_constant__ Table bank, const int64_t* ids, int n, Slot* slots) {
  __shared__ int keys[kFew];
  const int row = threadIdx.x;
  const int key = row < n ? key_of(bank, ids[row]) : 0;
  keys[row] = key;
  __syncthreads();
  if (row >= n) return;
  int rank = 0;
  for (int i = 0; i < n; i++) rank += keys[i] < key || (keys[i] == key && i < row);
  slots[rank] = slot_of(bank, key, row);
}

// A stable radix sort by one block: rows of a task stay in order. `from` and `to` change places with every pass.
template <class Table>
__global__ void __launch_bounds__(kSorters) group_many_kernel(const __grid_constant__ Table bank, const int64_t* ids, int n,
                                                              int passes, Keyed* from, Keyed* to, Slot* slots) {
  constexpr int kWarps = kSorters / kWarpSize;
  __shared__ int base[kDigits], counts[kWarps][kDigits];
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  for (int pass = 0; pass < passes; pass++) {
    const auto read = [&](int i) { return pass == 0 ? Keyed{key_of(bank, ids[i]), i} : from[i]; };
    const auto digit_of = [&](const Keyed& k) { return k.key >> pass * kDigit & (kDigits - 1); };
    if (thread < kDigits) base[thread] = 0;
    __syncthreads();
    for (int i = thread; i < n; i += kSorters) atomicAdd(&base[digit_of(read(i))], 1);
    __syncthreads();
    if (warp == 0) {  // where the rows of each digit begin
      constexpr int kEach = kDigits / kWarpSize;
      int total = 0;
      for (int i = 0; i < kEach; i++) total += base[lane * kEach + i];
      int before = total;
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, before, offset);
        if (lane >= offset) before += other;
      }
      before -= total;
      for (int i = 0; i < kEach; i++) {
        const int count = base[lane * kEach + i];
        base[lane * kEach + i] = before;
        before += count;
      }
    }
    for (int begin = 0; begin < n; begin += kSorters) {
      for (int i = thread; i < kWarps * kDigits; i += kSorters) (&counts[0][0])[i] = 0;
      __syncthreads();
      const bool inside = n - begin > thread;
      const Keyed mine = inside ? read(begin + thread) : Keyed{};
      const int digit = inside ? digit_of(mine) : kDigits;
      const unsigned same = __match_any_sync(kAllLanes, digit);
      const int rank = __popc(same & ((1u << lane) - 1));
      if (inside && rank == 0) counts[warp][digit] = __popc(same);
      __syncthreads();
      if (thread < kDigits) {  // where those of each warp begin
        int next = base[thread];
        for (int w = 0; w < kWarps; w++) {
          const int count = counts[w][thread];
          counts[w][thread] = next;
          next += count;
        }
        base[thread] = next;
      }
      __syncthreads();
      if (inside) {
        const int at = counts[warp][digit] + rank;
        if (pass + 1 == passes)
          slots[at] = slot_of(bank, mine.key, mine.row);
        else
          to[at] = mine;
      }
      __syncthreads();
    }
    Keyed* const before = from;
    from = to;
    to = before;
  }
}

// The slots of a batch; they lie in scratch memory.
Tensor group_rows(const Place& place, const Bank& bank, const Tensor& task_ids, int n) {
  constexpr int64_t kAlign = 512;
  const int64_t slot_bytes = ceil_div(n * sizeof(Slot), kAlign) * kAlign, keyed_bytes = n > kFew ? n * sizeof(Keyed) : 0;
  Tensor scratch = place.scratch(slot_bytes + 2 * keyed_bytes);
  auto* at = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  auto* slots = reinterpret_cast<Slot*>(at);
  auto* keyed = reinterpret_cast<Keyed*>(at + slot_bytes);
  const auto* ids = static_cast<const int64_t*>(task_ids.const_data_ptr());
  bank.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    if (n <= kFew) {
      place.launch(group_few_kernel<Table>, 1, kFew, 0, table, ids, n, slots);
    } else {
      int passes = 1;
      while (bank.tasks() >> passes * kDigit) passes++;
      place.launch(group_many_kernel<Table>, 1, kSorters, 0, table, ids, n, passes, keyed, keyed + n, slots);
    }
  });
  return scratch;
}

}  // namespace
