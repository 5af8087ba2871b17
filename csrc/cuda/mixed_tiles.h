// Tiles of the weight for mixed rows, and what comes to the blocks that have one.
//
// A block holds 16,384 weights in its registers and lets the rows of the batch pass by: weights are read once for all rows, and
// bits once for every row. What the next batches of rows need comes to shared memory while one is in work.
#pragma once
#include "mixed_plain.h"

namespace {

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

}  // namespace
