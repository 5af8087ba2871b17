// mixed_linear and its gradients: every row of a batch through the mask of its own task.
//
// Nothing here looks at the values of task_ids on the host, so all of it can be captured in a CUDA graph. An id that is no task
// of the bank opens nothing: its row of y and of dx is NaN, and it takes no part in dW.
#include "bank.h"

namespace {

// ------------------------------------------------------------------------------------------------------------------- grouping

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

// ---------------------------------------------------------------------------------------------------------------------- plain

__device__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// float64 has kernels that do no more than add up: a thread an element of dx or dW, a warp an element of y.

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) plain_forward_kernel(const T* x, const T* weight, const T* bias, const Slot* slots,
                                                                 int64_t rows, int64_t outputs, int64_t inputs, T* y) {
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (item >= rows * outputs) return;
  const Slot slot = slots[item / outputs];
  const int64_t o = item % outputs, row = slot.row;
  Wide<T> sum = 0;
  for (int64_t i = lane; i < inputs; i += kWarpSize) {
    const Wide<T> w = slot.is_open(o * inputs + i) ? static_cast<Wide<T>>(weight[o * inputs + i]) : Wide<T>(0);
    sum = multiply_add(w, static_cast<Wide<T>>(x[row * inputs + i]), sum);
  }
  sum = warp_sum(sum);
  if (bias != nullptr) sum += static_cast<Wide<T>>(bias[o]);
  if (slot.bits == nullptr) sum = NAN;
  if (lane == 0) y[row * outputs + o] = static_cast<T>(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) plain_grad_input_kernel(const T* grad, const T* weight, const Slot* slots,
                                                                    int64_t rows, int64_t outputs, int64_t inputs, T* out) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= rows * inputs) return;
  const Slot slot = slots[item / inputs];
  const int64_t i = item % inputs, row = slot.row;
  Wide<T> sum = 0;
  for (int64_t o = 0; o < outputs; o++) {
    const Wide<T> w = slot.is_open(o * inputs + i) ? static_cast<Wide<T>>(weight[o * inputs + i]) : Wide<T>(0);
    sum = multiply_add(static_cast<Wide<T>>(grad[row * outputs + o]), w, sum);
  }
  out[row * inputs + i] = static_cast<T>(slot.bits == nullptr ? Wide<T>(NAN) : sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) plain_grad_weight_kernel(const T* grad, const T* x, const Slot* slots, int64_t rows,
                                                                     int64_t outputs, int64_t inputs, T* out) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= outputs * inputs) return;
  const int64_t o = item / inputs, i = item % inputs;
  Wide<T> sum = 0;
  for (int64_t s = 0; s < rows; s++) {
    const Slot slot = slots[s];
    if (slot.is_open(item))
      sum = multiply_add(static_cast<Wide<T>>(grad[slot.row * outputs + o]), static_cast<Wide<T>>(x[slot.row * inputs + i]), sum);
  }
  out[item] = static_cast<T>(sum);
}

// ---------------------------------------------------------------------------------------------------------------------- tiles

// A block holds 16,384 weights in its registers, as floats, and lets the rows of the batch pass by: weights are read once for all
// rows, and bits once for every row. A thread has 16 weights that are multiplied and added, for each of 4 outputs.
//
// For 4096 x 4096 weights and 64 rows, 2^30 weights and rows meet. A row costs a thread 64 FFMA, each under a predicate, 28
// instructions, of them 16 R2P, to make predicates of its 64 bits, and some 110 to load, to add up and to loop: 3.1 a weight. An
// H100 issues 33 T a second: 100 us. The bytes of 64 tasks (134 MB) and of W take 50 us, in parallel.

constexpr int kBatch = 8;                               // slots between two barriers
constexpr int kRun = 16;                                // weights in a row that a thread has for each of its outputs
constexpr int kOwn = 4;                                 // outputs of a thread
constexpr int kPiece = 128;                             // weights whose bits are loaded at once
constexpr int kPieces = kRun * kOwn * kBatch / kPiece;  // of a batch, for each thread

// What a block has of the weights: outputs x a length that is summed over, which is along the rows of W for y and along its
// columns for dx. The tile is wide enough there for pieces of bits to be of use.
template <bool Transposed>
struct Tile {
  static constexpr int kLanes = Transposed ? 8 : 32;  // threads that share 4 outputs
  static constexpr int kLength = kLanes * kRun;
  static constexpr int kOutputs = kThreads / kLanes * kOwn;
  static constexpr int kGroups = kWarpSize / kLanes;  // of such threads in a warp

  int lane = threadIdx.x % kLanes, group = threadIdx.x % kWarpSize / kLanes, warp = threadIdx.x / kWarpSize;
  __device__ int output(int own) const { return (warp * kOwn + own) * kGroups + group; }
  // The sum of output n, of which each 4 threads that share it have left a part; from a part on that keeps warps off each other's
  // banks.
  static __device__ float sum_parts(const float* sums, int n) {
    constexpr int kParts = kLanes / kOwn;
    const int warp = n / (kGroups * kOwn);
    const float* const mine = sums + warp * kWarpSize + n % kGroups * kLanes + n / kGroups % kOwn;
    float sum = 0;
#pragma unroll
    for (int p = 0; p < kParts; p++) sum += mine[(p + warp) % kParts * kOwn];
    return sum;
  }
};

// Whether slot i of a batch has the task of the one before it.
__device__ bool again(const Slot* batch, int i) { return i > 0 && batch[i].bits == batch[i - 1].bits; }

// The lowest n bits of four words.
__device__ uint4 lowest(uint4 v, int64_t n) {
  const auto keep = [&](unsigned word, int64_t left) { return left >= 32 ? word : left <= 0 ? 0u : word & ((1u << left) - 1); };
  return make_uint4(keep(v.x, n), keep(v.y, n - 32), keep(v.z, n - 64), keep(v.w, n - 96));
}

// The bits of n weights, at most 128, from weight `first` on.
__device__ uint4 load_piece(const Slot& slot, int64_t first, int64_t n) {
  const int64_t word = first >> 5, last = (first + n - 1) >> 5;
  const auto load = [&](int64_t i) {
    return i <= last ? *reinterpret_cast<const unsigned*>(slot.line(i << 5) + (i & 15) * 4) : 0u;
  };
  const unsigned a = load(word), b = load(word + 1), c = load(word + 2), d = load(word + 3), e = load(word + 4);
  const unsigned shift = first & 31;
  return lowest(make_uint4(__funnelshift_r(a, b, shift), __funnelshift_r(b, c, shift), __funnelshift_r(c, d, shift),
                           __funnelshift_r(d, e, shift)),
                n);
}

// Lane r of the warp has row r of 32 x 32 bits, and gets column r.
__device__ unsigned transpose_bits(unsigned x) {
  const int lane = threadIdx.x % kWarpSize;
  unsigned low = 0x0000ffffu;
#pragma unroll
  for (int d = 16; d > 0; d /= 2, low ^= low << d) {
    const unsigned other = __shfl_xor_sync(kAllLanes, x, d);
    x = lane & d ? (x & ~low) | (other >> d & low) : (x & low) | (other << d & ~low);
  }
  return x;
}

// Copies 16 bytes to shared memory while the thread goes on; zeros where they are not there.
__device__ void copy_later(void* to, const void* from, bool there = true) {
#ifndef SUBNET_KERNELS_EMULATED
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = there ? *static_cast<const uint4*>(from) : uint4{};
#endif
}
// Ends a group of the thread's copies.
__device__ void end_group() {
#ifndef SUBNET_KERNELS_EMULATED
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for the thread's copies but those of the latest `Groups` groups.
template <int Groups>
__device__ void await_copies() {
#ifndef SUBNET_KERNELS_EMULATED
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#endif
}

__device__ void prefetch_line(const void* at) {
#ifndef SUBNET_KERNELS_EMULATED
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
  (void)at;
}

// Where the bits of a tile lie for a batch of slots: [slot][output][lane], 16 each. Tensor cores take them in words, 8 outputs at
// a time, which this keeps off each other's banks; and the slots of a task share the bits of the first.
template <bool Transposed, bool Tensor>
struct Bits {
  static constexpr int kRows = Transposed ? Tile<true>::kLength : Tile<false>::kOutputs;
  static constexpr int kAcross = kPieces * kThreads / kBatch / kRows;  // pieces of a row of W
  static constexpr int kEach = kRows * kAcross;                        // and of a slot

  static __device__ int place(int item) { return Tensor && !Transposed ? item ^ (item / kAcross >> 1 & 3) : item; }

  // Of the tile of W (outputs x inputs) whose first weight is (o, i), the piece that a thread brings of some slots.
  int64_t weight, left;  // its first, and from there to the end of its row
  unsigned line, byte;
  bool inside, whole;

  __device__ Bits(int64_t o, int64_t i, int64_t outputs, int64_t inputs) {
    static_assert(kThreads % kEach == 0);
    const int in_slot = threadIdx.x % kEach;
    const int64_t row = o + in_slot / kAcross, first = i + in_slot % kAcross * kPiece;
    weight = row * inputs + first, left = inputs - first;
    line = static_cast<unsigned>(weight >> 9), byte = static_cast<unsigned>(weight >> 3 & 63);
    inside = row < outputs && first < inputs, whole = inputs % kPiece == 0;
  }

  // Asks for those of a batch. Where whole pieces are copied, Transposed to `raw`, what no weight has is left alone: what is not
  // there is a weight of zero.
  __device__ void load(const Slot* batch, uint4* to, uint4* raw) const {
    const int own = threadIdx.x / kEach;
    if (whole) {
      if (!inside) return;
      uint4* const mine = Transposed ? raw + threadIdx.x : to + place(threadIdx.x);
      static_assert(Transposed || kThreads % (8 * kAcross) == 0);
#pragma unroll
      for (int k = 0; k < kPieces; k++) {
        const int s = own + k * kSlots;
        if (wanted(batch, s)) copy_later(mine + k * kThreads, from(batch[s]));
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < kPieces; k++) {
        const int s = own + k * kSlots;
        put(to, threadIdx.x + k * kThreads,
            inside && wanted(batch, s) ? load_piece(batch[s], weight, min(left, int64_t{kPiece})) : uint4{});
      }
    }
  }
  // Brings what the thread has copied to where it is read.
  __device__ void settle(uint4* to, const uint4* raw) const {
    if constexpr (Transposed) {
      if (!whole) return;
#pragma unroll 1
      for (int k = 0; k < kPieces; k++) put(to, threadIdx.x + k * kThreads, raw[threadIdx.x + k * kThreads]);
    }
  }
  // Brings the pieces of a batch near that load() will ask for.
  __device__ void prefetch(const Slot* batch) const {
    if (!inside || threadIdx.x % kAcross > 0) return;
#pragma unroll
    for (int k = 0; k < kPieces; k++) {
      const int s = threadIdx.x / kEach + k * kSlots;
      if (wanted(batch, s)) prefetch_line(from(batch[s]));
    }
  }

 private:
  static constexpr int kSlots = kThreads / kEach;  // apart are the pieces of a thread

  static __device__ bool wanted(const Slot* batch, int s) {
    const bool first = !Tensor || s == 0 || batch[s].bits != batch[s - 1].bits;
    return first & (batch[s].bits != nullptr);
  }
  __device__ const uint4* from(const Slot& slot) const {
    return reinterpret_cast<const uint4*>(slot.bits + uint64_t{line} * slot.step + byte);
  }
  static __device__ void put(uint4* bits, int item, const uint4& piece) {
    if constexpr (!Transposed) {
      bits[place(item)] = piece;
    } else {
      const unsigned words[] = {piece.x, piece.y, piece.z, piece.w};
      auto* to = reinterpret_cast<unsigned*>(bits) + item / kRows * kRows * 4 + item % kRows / kWarpSize;
#pragma unroll
      for (int c = 0; c < 4; c++) to[(c * kWarpSize + threadIdx.x % kWarpSize) * 4] = transpose_bits(words[c]);
    }
  }
};

// The bits of a thread's weights for slot s of a batch.
template <bool Transposed>
__device__ void own_bits(const uint4* bits, int s, const Tile<Transposed>& tile, unsigned (&own)[kOwn]) {
#pragma unroll
  for (int r = 0; r < kOwn; r++)
    own[r] = reinterpret_cast<const uint16_t*>(
        bits)[(s * Tile<Transposed>::kOutputs + tile.output(r)) * Tile<Transposed>::kLanes + tile.lane];
}

// What comes to a block while earlier batches of slots are in work: their rows of x, their bits, and, twice as far ahead, the
// slots. T is float, or uint16_t for the tensor cores.
template <class T, bool Transposed>
struct Flow {
  static constexpr bool kTensor = sizeof(T) == 2;
  static constexpr int kAhead = kTensor && !Transposed ? 2 : 1, kStages = kAhead + 1, kRing = 2 * kAhead + 1;  // batches
  static constexpr int kEach = 16 / sizeof(T), kChunks = Tile<Transposed>::kLength / kEach;                    // of a row of x
  static constexpr int kQuads = kChunks / 4;                                    // what a thread has of it
  static constexpr int kCopies = (kBatch * kChunks + kThreads - 1) / kThreads;  // of a thread, for a batch

  uint4 bits[kStages][kPieces * kThreads];
  uint4 raw[kStages][Transposed ? kPieces * kThreads : 1];  // as they come
  uint4 x[kStages][kBatch * kChunks];
  Slot slot[kRing][kBatch];

  // Chunk j of quad q of slot s: what 8 neighbouring threads read at a time is kept off each other's banks.
  static __device__ int place(int s, int q, int j) {
    const int turn = (q >> 1 & 1) | (kTensor ? s << 1 & 2 : q >> 1 & 2);
    return (s * kQuads + q) * 4 + (j ^ turn);
  }
  __device__ const Slot* batch(unsigned b) const { return slot[b % kRing]; }
};

// A thread's part in that, for `count` slots and a tile of W whose first weight is (o, i); x begins with column `along`.
template <class T, bool Transposed>
struct Source {
  using Its = Flow<T, Transposed>;
  static constexpr int kEach = Its::kEach, kChunks = Its::kChunks, kAcross = kThreads / kChunks;

  Its& flow;
  const Slot* slots;
  int count;
  Bits<Transposed, Its::kTensor> bits;
  const T* x;  // the chunk that a thread brings of some rows
  int64_t length, left;
  bool vectors;

  __device__ Source(Its& flow_, const Slot* slots_, int count_, const T* rows, int64_t along, int64_t length_, int64_t o,
                    int64_t i, int64_t outputs, int64_t inputs)
      : flow(flow_), slots(slots_), count(count_), bits(o, i, outputs, inputs), length(length_) {
    static_assert(kThreads % kChunks == 0);
    const int64_t at = along + threadIdx.x % kChunks * kEach;
    left = length - at, vectors = length % kEach == 0, x = left > 0 ? rows + at : rows;
#pragma unroll
    for (int b = 0; b < Its::kAhead; b++) ask_for_slots(b);
    end_group();
    await_copies<0>();
    __syncthreads();
#pragma unroll 1
    for (int b = 0; b < Its::kAhead; b++) ask(b);
  }

  // The slots of batch b, some of which may not be there.
  __device__ void ask_for_slots(unsigned b) const {
    if (threadIdx.x >= kBatch) return;
    const int at = static_cast<int>(b) * kBatch + threadIdx.x;
    copy_later(&flow.slot[b % Its::kRing][threadIdx.x], slots + (at < count ? at : 0), at < count);
  }
  // What batch b needs, whose slots are here.
  __device__ void ask(unsigned b) const {
    if (static_cast<int>(b) * kBatch < count) {
      const Slot* const batch = flow.batch(b);
      bits.load(batch, flow.bits[b % Its::kStages], flow.raw[b % Its::kStages]);
      const int own = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
      uint4* const to = flow.x[b % Its::kStages];
      if (own < kBatch) {
        const auto each = [&](const auto& copy) {
#pragma unroll
          for (int k = 0; k < Its::kCopies; k++) {
            const int s = own + k * kAcross;
            copy(to + Its::place(s, chunk / 4, chunk % 4), x + batch[s].row * length);
          }
        };
        if (vectors)
          each([&](uint4* at, const T* from) { copy_later(at, from, left > 0); });
        else
          each([&](uint4* at, const T* from) { copy_elements(at, from); });
      }
      ask_for_slots(b + Its::kAhead);
    }
    end_group();
  }
  __device__ void copy_elements(uint4* to, const T* from) const {
#pragma unroll 1
    for (int n = 0; n < kEach; n++) reinterpret_cast<T*>(to)[n] = n < left ? from[n] : T{};
  }

  // Waits for the thread's own part of batch b, the next; a barrier makes it that of all.
  __device__ void await(unsigned b) const {
    await_copies<Its::kAhead - 1>();
    bits.settle(flow.bits[b % Its::kStages], flow.raw[b % Its::kStages]);
  }

  // Whether any of the floats that the thread has brought of batch b is not finite.
  __device__ bool any_special(unsigned b) const {
    const int own = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    bool special = false;
    if (own >= kBatch) return false;
#pragma unroll
    for (int k = 0; k < Its::kCopies; k++) {
      const int s = own + k * kAcross;
      const uint4 four = flow.x[b % Its::kStages][Its::place(s, chunk / 4, chunk % 4)];
      for (const unsigned word : {four.x, four.y, four.z, four.w}) special |= (word & 0x7f800000u) == 0x7f800000u;
    }
    return special;
  }
};

// 16 elements as floats, of which n are there.
template <class T>
__device__ void load_run(const T* from, int64_t n, bool vectors, float (&to)[kRun]) {
  constexpr int kEach = 16 / sizeof(T);
  const int here = static_cast<int>(min(n, int64_t{kRun}));
  if (vectors && here == kRun) {
#pragma unroll
    for (int j = 0; j < kRun; j += kEach) {
      const auto pack = *reinterpret_cast<const Pack<T, kEach>*>(from + j);
#pragma unroll
      for (int k = 0; k < kEach; k++) to[j + k] = static_cast<float>(pack.v[k]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRun; j++) to[j] = j < here ? static_cast<float>(from[j]) : 0.0f;
  }
}

// The sums of a thread's 16 weights for each of its 4 outputs. A closed weight that meets a finite x adds nothing and is passed
// over; with Select it adds zero times x, which an infinite x makes NaN. Output by output, so that R2P can make predicates of 7
// bits at a time; in two sums, so that an FFMA need not wait for the one before.
template <bool Select>
__device__ void multiply(const float (&w)[kOwn][kRun], const float (&x)[kRun], const unsigned (&bits)[kOwn], float (&sum)[kOwn]) {
#pragma unroll
  for (int r = 0; r < kOwn; r++) {
    float part[2] = {};
#pragma unroll
    for (int j = 0; j < kRun; j++) {
      const bool open = bits[r] & 1u << j;
      if constexpr (Select)
        part[j % 2] = multiply_add(open ? w[r][j] : 0.0f, x[j], part[j % 2]);
      else if (open)
        part[j % 2] = multiply_add(w[r][j], x[j], part[j % 2]);
    }
    sum[r] = part[0] + part[1];
  }
}

// Adds up the 4 sums of 4 lanes: lane l gets that of output l % 4.
__device__ float sum_lanes(const float (&sum)[kOwn], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  const float a = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(kAllLanes, odd ? sum[0] : sum[1], 1);
  const float b = (odd ? sum[3] : sum[2]) + __shfl_xor_sync(kAllLanes, odd ? sum[2] : sum[3], 1);
  return (upper ? b : a) + __shfl_xor_sync(kAllLanes, upper ? a : b, 2);
}

// y, or Transposed dx, before it is summed over blockIdx.y: partial (lengths, slots, all outputs of the sum). A block takes
// `each` slots.
template <bool Transposed>
struct ProductShared {
  Flow<float, Transposed> flow;
  float sums[2][kBatch][kThreads];
};

// Two blocks a multiprocessor are worth the few bytes of a thread that spill in dx, of product_kernel and tensor_kernel alike.
template <bool Transposed>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(const float* rows, const float* weight, const Slot* slots, int count, int each, int64_t outputs,
                   int64_t inputs, float* partial) {
  using Tile = Tile<Transposed>;
  using Flow = Flow<float, Transposed>;
  SK_DYNAMIC_SHARED(ProductShared<Transposed>, shared);
  Flow& flow = shared->flow;
  const Tile tile;
  const int64_t out = int64_t{blockIdx.x} * Tile::kOutputs, along = int64_t{blockIdx.y} * Tile::kLength;
  const int64_t width = Transposed ? inputs : outputs, length = Transposed ? outputs : inputs;
  const int64_t o = Transposed ? along : out, i = Transposed ? out : along;
  const int begin = blockIdx.z * each;
  const Source<float, Transposed> source(flow, slots + begin, min(count - begin, each), rows, along, length, o, i, outputs,
                                         inputs);

  float w[kOwn][kRun];
#pragma unroll
  for (int r = 0; r < kOwn; r++) {
    const int64_t n = out + tile.output(r), k = along + tile.lane * kRun;
    if constexpr (Transposed) {
#pragma unroll
      for (int j = 0; j < kRun; j++) w[r][j] = n < width && k + j < length ? weight[(k + j) * inputs + n] : 0.0f;
    } else {
      load_run(weight + n * inputs + k, n < width ? length - k : 0, inputs % 8 == 0, w[r]);
    }
  }
  // The sums of batch b, while the next is in work.
  const int own_slot = threadIdx.x / Tile::kOutputs, own_output = threadIdx.x % Tile::kOutputs;
  float* to = partial + (int64_t{blockIdx.y} * count + begin + own_slot) * width + out + own_output;
  const bool there = out + own_output < width;
  const auto put = [&](unsigned b) {
#pragma unroll
    for (int k = 0; k < kBatch; k += kThreads / Tile::kOutputs, to += kThreads / Tile::kOutputs * width)
      if (there && static_cast<int>(b) * kBatch + k + own_slot < source.count)
        *to = Tile::sum_parts(shared->sums[b & 1][k + own_slot], own_output);
  };

  unsigned b = 0;
  for (int left = source.count; left > 0; left -= kBatch, b++) {
    const int here = min(left, kBatch);
    source.await(b);
    const bool special = __syncthreads_or(source.any_special(b));
    source.ask(b + Flow::kAhead);
    if (b > 0) put(b - 1);
    for (int s = 0; s < here; s++) {
      unsigned bits[kOwn];
      float x[kRun], sum[kOwn];
      own_bits(flow.bits[b % Flow::kStages], s, tile, bits);
#pragma unroll
      for (int j = 0; j < kRun / 4; j++) {
        const auto four = reinterpret_cast<const float4*>(flow.x[b % Flow::kStages])[Flow::place(s, tile.lane, j)];
        x[4 * j] = four.x, x[4 * j + 1] = four.y, x[4 * j + 2] = four.z, x[4 * j + 3] = four.w;
      }
      if (special)
        multiply<true>(w, x, bits, sum);
      else
        multiply<false>(w, x, bits, sum);
      shared->sums[b & 1][s][threadIdx.x] = sum_lanes(sum, tile.lane);
    }
  }
  __syncthreads();
  put(b - 1);
}

// float16 and bfloat16 go to the tensor cores, which take the weights of 16 outputs and 8 rows of the batch at a time. Rows of
// one task that are neighbours among the 8 slots of a batch share the masked weights; a row alone costs as much as 8 of its task.
// A thread then has 32 pairs of weights to mask, each with a PRMT, which makes two bytes of ones or zeros of a bit twice, and a
// LOP3 on the half-rate integer pipe, and 16 shifts on another: with what is around them that pipe takes 95 us for 64 rows of 64
// tasks.

constexpr int kStrip = 32;  // weights of an output that a thread has; a warp has 4 strips
constexpr int kSteps = 8;   // multiplications of 16 x 16 with 16 x 8 that those of a warp make

// 32 elements in the pairs that meet in a step: word 2 b has elements b and b + 8, the next b + 16 and b + 24.
__device__ void pair_up(const unsigned (&word)[kStrip / 2], unsigned (&to)[2 * kSteps]) {
#pragma unroll
  for (int i = 0; i < 2 * kSteps; i++) {
    const int first = i / 2 + i % 2 * 16;
    to[i] = __byte_perm(word[first / 2], word[first / 2 + 4], first % 2 ? 0x7632 : 0x5410);
  }
}
__device__ void set_four(unsigned (&word)[kStrip / 2], int at, const uint4& four) {
  word[at] = four.x, word[at + 1] = four.y, word[at + 2] = four.z, word[at + 3] = four.w;
}

// 32 elements, of which n are there, in pairs.
__device__ void load_pairs(const uint16_t* from, int64_t n, bool vectors, unsigned (&to)[2 * kSteps]) {
  const int here = static_cast<int>(min(n, int64_t{kStrip}));
  unsigned word[kStrip / 2];
  if (vectors && here == kStrip) {
#pragma unroll
    for (int j = 0; j < 4; j++) set_four(word, 4 * j, reinterpret_cast<const uint4*>(from)[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kStrip / 2; j++)
      word[j] = (2 * j < here ? from[2 * j] : 0u) | (2 * j + 1 < here ? unsigned{from[2 * j + 1]} << 16 : 0u);
  }
  pair_up(word, to);
}

// The highest bits of two bytes of x, the lower ones or the upper ones, 16 times each.
template <bool Upper>
__device__ unsigned spread_highest(unsigned x) {
#ifndef SUBNET_KERNELS_EMULATED
  unsigned result;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(x), "n"(Upper ? 0xbbaa : 0x9988));
  return result;
#else
  x = Upper ? x >> 16 : x;
  return (x & 0x80u ? 0xffffu : 0u) | (x & 0x8000u ? 0xffff0000u : 0u);
#endif
}

// sum += a b for a 16 x 16 and b 16 x 8 of T, spread over the warp as mma.m16n8k16 has them.
template <class T>
__device__ void multiply_tiles(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifndef SUBNET_KERNELS_EMULATED
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  uint64_t all[3][kWarpSize];
  std::memcpy(all[0], simt::exchange(kAllLanes, a[0] | uint64_t{a[1]} << 32), sizeof all[0]);
  std::memcpy(all[1], simt::exchange(kAllLanes, a[2] | uint64_t{a[3]} << 32), sizeof all[1]);
  std::memcpy(all[2], simt::exchange(kAllLanes, b[0] | uint64_t{b[1]} << 32), sizeof all[2]);
  const auto value = [](uint64_t word, int at) {
    const auto raw = static_cast<uint16_t>(word >> 16 * at);
    T result;
    std::memcpy(&result, &raw, sizeof raw);
    return static_cast<float>(result);
  };
  const int lane = simt::lane(), row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; i++)
    for (int half = 0; half < 2; half++)
      for (int t = 0; t < 4; t++)
        for (int k = 0; k < 2; k++)
          sum[i] += value(all[half][row * 4 + t], i / 2 * 2 + k) * value(all[2][(column + i % 2) * 4 + t], half * 2 + k);
#endif
}

// As product_kernel, for T of 16 bits.
template <bool Transposed>
struct TensorShared {
  static constexpr int kSplit = Tile<Transposed>::kLength / (4 * kStrip);  // warps that share 16 outputs
  Flow<uint16_t, Transposed> flow;
  float sums[2][kBatch][kSplit * Tile<Transposed>::kOutputs + 4];  // 4 more keep the slots off each other's banks
};

// As in product_kernel, dx spills a few bytes of a thread in tensor_kernel.
template <class T, bool Transposed>
__global__ void __launch_bounds__(kThreads, 2) tensor_kernel(const T* rows_, const T* weight_, const Slot* slots, int count,
                                                             int each, int64_t outputs, int64_t inputs, float* partial) {
  using Tile = Tile<Transposed>;
  using Flow = Flow<uint16_t, Transposed>;
  constexpr int kSplit = TensorShared<Transposed>::kSplit, kStrips = Tile::kLength / kStrip;
  SK_DYNAMIC_SHARED(TensorShared<Transposed>, shared);
  Flow& flow = shared->flow;
  const auto* const rows = reinterpret_cast<const uint16_t*>(rows_);
  const auto* const weight = reinterpret_cast<const uint16_t*>(weight_);
  const int64_t out = int64_t{blockIdx.x} * Tile::kOutputs, along = int64_t{blockIdx.y} * Tile::kLength;
  const int64_t width = Transposed ? inputs : outputs, length = Transposed ? outputs : inputs;
  const int64_t o = Transposed ? along : out, i = Transposed ? out : along;
  const int begin = blockIdx.z * each;
  const int warp = threadIdx.x / kWarpSize, group = threadIdx.x % kWarpSize / 4, four = threadIdx.x % 4;
  const int split = warp % kSplit, strip = split * 4 + four, output = warp / kSplit * 16 + group;  // and output + 8
  const Source<uint16_t, Transposed> source(flow, slots + begin, min(count - begin, each), rows, along, length, o, i, outputs,
                                            inputs);

  unsigned w[2][2 * kSteps];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int64_t n = out + output + 8 * r, k = along + strip * kStrip;
    if constexpr (Transposed) {
#pragma unroll
      for (int j = 0; j < 2 * kSteps; j++) {
        const int64_t a = k + j / 2 + j % 2 * 16, b = a + 8;
        w[r][j] = (n < width && a < length ? weight[a * inputs + n] : 0u) |
                  (n < width && b < length ? unsigned{weight[b * inputs + n]} << 16 : 0u);
      }
    } else {
      load_pairs(weight + n * inputs + k, n < width ? length - k : 0, inputs % 8 == 0, w[r]);
    }
  }
  const int word = Bits<Transposed, true>::place(output * (kStrips / 4) + split) * 4 + four;
  static_assert(Transposed || Bits<Transposed, true>::kAcross == kStrips / 4);
  // The sums of batch b, while the next is in work.
  const int own_slot = threadIdx.x / Tile::kOutputs, own_output = threadIdx.x % Tile::kOutputs;
  float* to = partial + (int64_t{blockIdx.y} * count + begin + own_slot) * width + out + own_output;
  const bool there = out + own_output < width;
  const auto put = [&](unsigned b) {
#pragma unroll
    for (int k = 0; k < kBatch; k += kThreads / Tile::kOutputs, to += kThreads / Tile::kOutputs * width) {
      float sum = 0;
#pragma unroll
      for (int p = 0; p < kSplit; p++) sum += shared->sums[b & 1][k + own_slot][p * Tile::kOutputs + own_output];
      if (there && static_cast<int>(b) * kBatch + k + own_slot < source.count) *to = sum;
    }
  };

  unsigned b = 0;
  for (int left = source.count; left > 0; left -= kBatch, b++) {
    const int here = min(left, kBatch);
    source.await(b);
    __syncthreads();
    source.ask(b + Flow::kAhead);
    if (b > 0) put(b - 1);

    unsigned x[2 * kSteps];
    {
      unsigned natural[kStrip / 2];
#pragma unroll
      for (int j = 0; j < 4; j++) set_four(natural, 4 * j, flow.x[b % Flow::kStages][Flow::place(group, strip, j)]);
      pair_up(natural, x);
    }
    const auto* const words = reinterpret_cast<const unsigned*>(flow.bits[b % Flow::kStages]) + word;
    const int slot = threadIdx.x % kBatch;  // a bit for each slot that begins a task
    unsigned runs = __ballot_sync(kAllLanes, slot < here && !again(flow.batch(b), slot)) & ((1u << kBatch) - 1);
    float total[4] = {};
    const auto first = [&] { return (__ffs(static_cast<int>(runs)) - 1) & (kBatch - 1); };  // any where there is none
    const auto load = [&](int s) {
      const auto* const from = words + s * (Tile::kOutputs * kStrips);
      return make_uint2(from[0], from[8 * kStrips]);
    };
    int s = first();
    uint2 open = load(s);
    while (runs) {
      runs &= runs - 1;
      const int next = first();
      const uint2 later = load(next);
      float sum[4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const unsigned upper = open.x << (7 - step), lower = open.y << (7 - step);
        const unsigned masked[4] = {w[0][2 * step] & spread_highest<false>(upper), w[1][2 * step] & spread_highest<false>(lower),
                                    w[0][2 * step + 1] & spread_highest<true>(upper),
                                    w[1][2 * step + 1] & spread_highest<true>(lower)};
        multiply_tiles<T>(sum, masked, {x[2 * step], x[2 * step + 1]});
      }
      // Of slots before s it has come too late, and those of the next runs will be written over.
      if (four * 2 >= s) total[0] = sum[0], total[2] = sum[2];
      if (four * 2 + 1 >= s) total[1] = sum[1], total[3] = sum[3];
      s = next, open = later;
    }
#pragma unroll
    for (int c = 0; c < 4; c++) shared->sums[b & 1][four * 2 + c % 2][split * Tile::kOutputs + output + c / 2 * 8] = total[c];
  }
  __syncthreads();
  put(b - 1);
}

// The sums of product_kernel's parts, in order, to the rows where they belong.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const float* partial, int64_t lengths, const Slot* slots, const T* bias, int64_t width, T* out) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x, slot = blockIdx.y;
  if (n >= width) return;
  float sum = 0;
  for (int64_t k = 0; k < lengths; k++) sum += partial[(k * gridDim.y + slot) * width + n];
  if (bias != nullptr) sum += static_cast<float>(bias[n]);
  if (slots[slot].bits == nullptr) sum = NAN;
  out[slots[slot].row * width + n] = static_cast<T>(sum);
}

// The slots in work of grad_weight_kernel; x and the gradients as floats.
struct Stage {
  uint4 bits[kPieces * kThreads];
  float4 x[kBatch][4][Tile<false>::kLanes];  // 16 for each lane
  float4 grads[kBatch][Tile<false>::kOutputs / kOwn];
  Slot slot[2][kBatch];  // these and the next

  // The slots [first, end) of the next batch, some of which may not be there.
  __device__ void next(const Slot* slots, int64_t first, int64_t end, int half) {
    const int i = threadIdx.x;
    if (i < kBatch) slot[half][i] = first + i < end ? slots[first + i] : Slot{nullptr, 0, 0};
  }
};

// dW: the sums stay with the weights, and rows come in the order of the slots.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_weight_kernel(const T* grad, const T* x, const Slot* slots, int64_t count, int64_t outputs, int64_t inputs, T* to) {
  using Tile = Tile<false>;
  __shared__ Stage stage;
  const Tile tile;
  const int64_t out = int64_t{blockIdx.x} * Tile::kOutputs, along = int64_t{blockIdx.y} * Tile::kLength;
  const Bits<false, false> source(out, along, outputs, inputs);
  float sum[kOwn][kRun] = {};
  stage.next(slots, 0, count, 0);
  __syncthreads();

  int half = 0;
  for (int64_t first = 0; first < count; first += kBatch, half ^= 1) {
    source.load(stage.slot[half], stage.bits, nullptr);
    end_group();
    {
      const int s = threadIdx.x / Tile::kLanes, lane = threadIdx.x % Tile::kLanes;
      static_assert(kBatch * Tile::kLanes == kThreads);
      const int64_t at = along + lane * kRun;
      float values[kRun];
      load_run(x + stage.slot[half][s].row * inputs + at, inputs - at, inputs % 8 == 0, values);
#pragma unroll
      for (int j = 0; j < kRun / 4; j++)
        stage.x[s][j][lane] = make_float4(values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3]);
    }
    {
      const int s = threadIdx.x / Tile::kOutputs, n = threadIdx.x % Tile::kOutputs;
      static_assert(kBatch * Tile::kOutputs == kThreads);
      reinterpret_cast<float*>(stage.grads[s])[n] =
          out + n < outputs ? static_cast<float>(grad[stage.slot[half][s].row * outputs + out + n]) : 0.0f;
    }
    stage.next(slots, first + kBatch, count, half ^ 1);
    await_copies<0>();
    __syncthreads();
    source.prefetch(stage.slot[half ^ 1]);
    const int here = static_cast<int>(min(count - first, int64_t{kBatch}));
    for (int s = 0; s < here; s++) {
      const float4 four = stage.grads[s][tile.warp];
      const float g[kOwn] = {four.x, four.y, four.z, four.w};
      unsigned bits[kOwn];
      float values[kRun];
      own_bits(stage.bits, s, tile, bits);
#pragma unroll
      for (int j = 0; j < kRun / 4; j++) {
        const float4 piece = stage.x[s][j][tile.lane];
        values[4 * j] = piece.x, values[4 * j + 1] = piece.y, values[4 * j + 2] = piece.z, values[4 * j + 3] = piece.w;
      }
#pragma unroll
      for (int r = 0; r < kOwn; r++) {
#pragma unroll
        for (int j = 0; j < kRun; j++)
          if (bits[r] & 1u << j) sum[r][j] = multiply_add(g[r], values[j], sum[r][j]);
      }
    }
    __syncthreads();
  }

  constexpr int kEach = 16 / sizeof(T);
#pragma unroll
  for (int r = 0; r < kOwn; r++) {
    const int64_t o = out + tile.output(r), i = along + tile.lane * kRun;
    if (o >= outputs) continue;
    T* const row = to + o * inputs + i;
    if (inputs % 8 == 0 && i + kRun <= inputs) {
#pragma unroll
      for (int j = 0; j < kRun; j += kEach) {
        Pack<T, kEach> pack;
#pragma unroll
        for (int k = 0; k < kEach; k++) pack.v[k] = static_cast<T>(sum[r][j + k]);
        *reinterpret_cast<Pack<T, kEach>*>(row + j) = pack;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kRun; j++)
        if (i + j < inputs) row[j] = static_cast<T>(sum[r][j]);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------------- ops

// What the three ops share: checked arguments, made contiguous, and rows in groups.
struct Call {
  Place place;
  Tensor rows, other;  // x or grad (B, ...); the weight, or x for the weight's gradient
  Bank bank;           // may hold copies of blocks, to which the slots point
  int64_t count, outputs, inputs;
  Tensor scratch;

  Call(const char* op, const Tensor& rows_, const char* rows_name, const Tensor& other_, const char* other_name,
       const std::vector<Tensor>& bank_, const Tensor& task_ids, int64_t outputs_, int64_t inputs_)
      : place(op, rows_), bank(place, bank_, outputs_ * inputs_), count(rows_.size(0)), outputs(outputs_), inputs(inputs_) {
    with_float(op, rows_name, rows_.scalar_type(), [](auto) {});
    STD_TORCH_CHECK(other_.scalar_type() == rows_.scalar_type(), op, ": ", rows_name, " and ", other_name,
                    " must have one dtype");
    STD_TORCH_CHECK(task_ids.scalar_type() == ScalarType::Long && task_ids.dim() == 1 && task_ids.numel() == count, op,
                    ": task_ids must be int64 with one id for each of ", count, " rows, got ", task_ids.numel());
    constexpr int64_t kMostRows = 0x7fffffff;
    STD_TORCH_CHECK(count <= kMostRows, op, ": a batch may have at most ", kMostRows, " rows, got ", count);
    place.check(other_name, other_);
    place.check("task_ids", task_ids);
    rows = aligned(rows_), other = aligned(other_);
    if (count > 0) scratch = group_rows(place, bank, aligned(task_ids), static_cast<int>(count));
  }

  const Slot* slots() const { return count > 0 ? static_cast<const Slot*>(scratch.const_data_ptr()) : nullptr; }
};

dim3 blocks_for(int64_t threads) { return dim3(static_cast<unsigned>(ceil_div(threads, kThreads))); }

// y, or Transposed dx. Partial sums take at most 64 MB: a longer batch is taken in parts.
template <class T, bool Transposed>
void product(const Call& call, const Tensor* bias_, const Tensor& out_) {
  using Tile = Tile<Transposed>;
  const auto* rows = static_cast<const T*>(call.rows.const_data_ptr());
  const auto* weight = static_cast<const T*>(call.other.const_data_ptr());
  const auto* bias = bias_ ? static_cast<const T*>(bias_->const_data_ptr()) : nullptr;
  auto* out = static_cast<T*>(out_.mutable_data_ptr());
  const Place& place = call.place;
  const int64_t width = Transposed ? call.inputs : call.outputs, length = Transposed ? call.outputs : call.inputs;
  if constexpr (std::is_same_v<T, double>) {
    if constexpr (Transposed)
      place.launch(plain_grad_input_kernel<T>, blocks_for(call.count * width), kThreads, 0, rows, weight, call.slots(),
                   call.count, call.outputs, call.inputs, out);
    else
      place.launch(plain_forward_kernel<T>, blocks_for(call.count * width * kWarpSize), kThreads, 0, rows, weight, bias,
                   call.slots(), call.count, call.outputs, call.inputs, out);
  } else {
    constexpr int64_t kMostBytes = 64 << 20, kMostSlots = 8192;
    const int64_t across = ceil_div(width, Tile::kOutputs), lengths = ceil_div(length, Tile::kLength);
    const int64_t most = std::clamp<int64_t>(kMostBytes / std::max<int64_t>(1, lengths * width * 4), kBatch, kMostSlots);
    const int64_t part = std::min(call.count, most / kBatch * kBatch);
    const Tensor scratch = place.scratch(lengths * part * width * 4);
    auto* partial = static_cast<float*>(scratch.mutable_data_ptr());
    for (int64_t first = 0; first < call.count; first += part) {
      const int64_t count = std::min(part, call.count - first), batches = ceil_div(count, kBatch);
      // A few tiles are taken by several blocks each, which share the slots.
      const int64_t wanted = ceil_div(place.processors() * 4, std::max<int64_t>(1, across * lengths));
      const int64_t each = ceil_div(batches, std::min(wanted, batches)) * kBatch;
      void (*kernel)(const T*, const T*, const Slot*, int, int, int64_t, int64_t, float*);
      size_t shared;
      if constexpr (sizeof(T) == 2)
        kernel = tensor_kernel<T, Transposed>, shared = sizeof(TensorShared<Transposed>);
      else
        kernel = product_kernel<Transposed>, shared = sizeof(ProductShared<Transposed>);
      place.launch(
          kernel,
          dim3(static_cast<unsigned>(across), static_cast<unsigned>(lengths), static_cast<unsigned>(ceil_div(count, each))),
          kThreads, shared, rows, weight, call.slots() + first, static_cast<int>(count), static_cast<int>(each), call.outputs,
          call.inputs, partial);
      place.launch(finish_kernel<T>, dim3(blocks_for(width).x, static_cast<unsigned>(count)), kThreads, 0,
                   static_cast<const float*>(partial), lengths, call.slots() + first, bias, width, out);
    }
  }
}

Tensor mixed_linear_cuda(const Tensor& x, const Tensor& weight, std::vector<Tensor> bank, const Tensor& task_ids,
                         std::optional<Tensor> bias) {
  const char* op = "mixed_linear";
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), op, ": x must be (B, I) and weight (O, I)");
  const Call call(op, x, "x", weight, "weight", bank, task_ids, weight.size(0), weight.size(1));
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->numel() == call.outputs, op, ": bias must be (", call.outputs,
                    ",) in the dtype of weight, got ", bias->numel());
    call.place.check("bias", *bias);
    bias = aligned(*bias);
  }
  Tensor y = call.place.empty({call.count, call.outputs}, dtype_code(x));
  if (y.numel() == 0) return y;
  with_float(op, "x", x.scalar_type(), [&](auto zero) { product<decltype(zero), false>(call, bias ? &*bias : nullptr, y); });
  return y;
}

Tensor mixed_linear_grad_input_cuda(const Tensor& grad, const Tensor& weight, std::vector<Tensor> bank, const Tensor& task_ids) {
  const char* op = "mixed_linear_grad_input";
  STD_TORCH_CHECK(grad.dim() == 2 && weight.dim() == 2 && grad.size(1) == weight.size(0), op,
                  ": grad must be (B, O) and weight (O, I)");
  const Call call(op, grad, "grad", weight, "weight", bank, task_ids, weight.size(0), weight.size(1));
  Tensor out = call.place.empty({call.count, call.inputs}, dtype_code(grad));
  if (out.numel() == 0) return out;
  with_float(op, "grad", grad.scalar_type(), [&](auto zero) { product<decltype(zero), true>(call, nullptr, out); });
  return out;
}

Tensor mixed_linear_grad_weight_cuda(const Tensor& grad, const Tensor& x, std::vector<Tensor> bank, const Tensor& task_ids) {
  const char* op = "mixed_linear_grad_weight";
  STD_TORCH_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0), op, ": grad must be (B, O) and x (B, I)");
  const Call call(op, grad, "grad", x, "x", bank, task_ids, grad.size(1), x.size(1));
  Tensor out = call.place.empty({call.outputs, call.inputs}, dtype_code(grad));
  if (out.numel() == 0) return out;
  with_float(op, "grad", grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* g = static_cast<const T*>(call.rows.const_data_ptr());
    const auto* rows = static_cast<const T*>(call.other.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    if constexpr (std::is_same_v<T, double>) {
      call.place.launch(plain_grad_weight_kernel<T>, blocks_for(out.numel()), kThreads, 0, g, rows, call.slots(), call.count,
                        call.outputs, call.inputs, to);
    } else {
      const dim3 grid(static_cast<unsigned>(ceil_div(call.outputs, Tile<false>::kOutputs)),
                      static_cast<unsigned>(ceil_div(call.inputs, Tile<false>::kLength)));
      call.place.launch(grad_weight_kernel<T>, grid, kThreads, 0, g, rows, call.slots(), call.count, call.outputs, call.inputs,
                        to);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("mixed_linear", TORCH_BOX(&mixed_linear_cuda));
  m.impl("mixed_linear_grad_input", TORCH_BOX(&mixed_linear_grad_input_cuda));
  m.impl("mixed_linear_grad_weight", TORCH_BOX(&mixed_linear_grad_weight_cuda));
}
