// compressed_linear, decompress: products with weights of which only the open ones are stored.
//
// The product is bound by the latency of its loads and by decoding. A row of the weight is a warp's, or that of a few warps where
// rows are few; x lies in shared memory, the elements of up to eight of its rows side by side, so that one load serves all of
// them. A bitmap is decoded bit by bit: a lane owns 32 columns, and finds its values by counting the bits before them. What is
// closed takes no part: neither its weight, which is not there, nor the x that it would be multiplied by.
//
// What the offsets and columns hold is not known to the host. The kernels keep within the memory that they were given whatever it
// is; of a weight that `compress` did not make the result is otherwise undefined.
#include <limits>

#include "../floats.h"
#include "device.h"

namespace {

constexpr int kSegment = kWarpSize * 32;  // columns that a warp's lanes own, a word of 32 bits each

// A compressed weight. The values of row o are [offsets[o], offsets[o + 1]); where they are in the row is either a bitmap, whole
// words of 64 bits a row, or their columns.
struct Compressed {
  const void *values, *positions;
  const int64_t* offsets;
  int64_t outputs, count;
  int inputs, row_words;  // words of 32 bits in a row of the bitmap

  struct Row {
    int64_t begin;
    int length;
  };
  __device__ Row row(int64_t o) const {
    if (o >= outputs) return {0, 0};
    const int64_t begin = min(max(offsets[o], int64_t{0}), count), end = min(max(offsets[o + 1], begin), count);
    return {begin, static_cast<int>(min(end - begin, static_cast<int64_t>(inputs)))};
  }
  // The bits of word w of a row that are columns: what is beyond the last one is not trusted to be closed.
  __device__ unsigned inside(int w) const {
    const int left = inputs - w * 32;
    return left >= 32 ? kAllLanes : left <= 0 ? 0 : (1u << left) - 1;
  }
  __device__ const uint32_t* row_bits(int64_t o) const { return static_cast<const uint32_t*>(positions) + o * row_words; }
  // Bits set in the first words of a row; every lane of a warp has the sum.
  __device__ int ones_before(const uint32_t* row_bits, int words) const {
    unsigned ones = 0;
    for (int w = threadIdx.x % kWarpSize; w < words; w += kWarpSize) ones += __popc(row_bits[w]);
    return static_cast<int>(__reduce_add_sync(kAllLanes, ones));
  }
};

// What the compiler makes of these costs instructions where there are none to spare.
#ifndef SUBNET_KERNELS_EMULATED
// Keeps it from taking a pointer apart, or making something anew, at every use.
template <class T>
__device__ __forceinline__ void keep_in_register(T*& pointer) {
  asm("" : "+l"(pointer));
}
__device__ __forceinline__ void keep_in_register(unsigned& value) { asm("" : "+r"(value)); }
template <class T>
__device__ __forceinline__ void keep_shared_in_register(T*& pointer) {
  auto at = static_cast<unsigned>(__cvta_generic_to_shared(pointer));
  asm("" : "+r"(at));
  pointer = static_cast<T*>(__cvta_shared_to_generic(at));
}
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
// 1 << bit, and 0 for -1.
__device__ __forceinline__ unsigned one_bit(int bit) {
  unsigned result;
  asm("shl.b32 %0, 1, %1;" : "=r"(result) : "r"(bit));
  return result;
}
#else
template <class T>
void keep_in_register(T&) {}
void prefetch(const void*) {}
template <class T>
void keep_shared_in_register(T*&) {}
unsigned one_bit(int bit) { return bit < 0 ? 0 : 1u << bit; }
#endif

// A value from global memory, wherever the compiler thinks that it is.
template <class T>
__device__ __forceinline__ T load_global(const T* at) {
  using Raw = std::conditional_t<sizeof(T) == 2, unsigned short, std::conditional_t<sizeof(T) == 4, float, double>>;
  union Value {
    Raw raw;
    T value;
    __device__ Value(Raw x) : raw(x) {}
  };
  return Value(__ldg(reinterpret_cast<const Raw*>(at))).value;
}

// The sum over the lanes up to this one.
__device__ __forceinline__ unsigned sum_to_lane(unsigned value) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, value, offset);
    if (static_cast<int>(threadIdx.x) % kWarpSize >= offset) value += other;
  }
  return value;
}

// ------------------------------------------------------------------------------------------------------------ rows of x

// Rows rows of x as the products read them: at(column) has their elements of one column, and from lane(segment) on,
// of_lane(lane, j, bit) those of a column that the lane owns in the j-th segment.
//
// For a bitmap, column c of a segment lies at (c % 32) * 32 + c / 32: lanes that read a column each of their own words never meet
// in a bank. For columns, whose order is anybody's guess, an element is left out after each eight, which keeps the stores apart.
// At column `inputs` there are zeros, for columns that take no part.
template <class T, int Rows, bool Bitmap>
struct Staged {
  // The elements of one row are converted already: shared memory moves no less than 4 bytes a lane.
  using Element = std::conditional_t<Rows == 1, Wide<T>, T>;
  using Column = Pack<Element, Rows>;
  static constexpr int kVector = (Rows > 4 ? 4 : 16) / sizeof(T);  // columns that a thread loads at once

  Column* memory;

  static __host__ __device__ int place(int column) {
    if constexpr (Bitmap) return (column & ~(kSegment - 1)) | (column & 31) << 5 | (column >> 5 & 31);
    return column + (column >> 3);
  }
  static int units(int inputs) {
    return static_cast<int>(Bitmap ? ceil_div(inputs, kSegment) * (kSegment / kVector) : ceil_div(inputs + 1, kVector));
  }
  static size_t bytes(int inputs) {
    const int columns = units(inputs) * kVector;
    return columns == 0 ? 0 : sizeof(Column) * (Bitmap ? columns : place(columns - 1) + 1);
  }

  // The first column of a unit of kVector: for a bitmap in such an order that neighbouring lanes store to different banks.
  static __device__ int unit_column(int unit) {
    if constexpr (!Bitmap) return unit * kVector;
    constexpr int kApart = 128 / static_cast<int>(sizeof(Column)), kUnits = 32 / kVector;
    constexpr int kSegmentUnits = kSegment / kVector;
    const int segment = unit / kSegmentUnits, rest = unit % kSegmentUnits;
    const int word = rest / (kApart * kUnits) * kApart + rest % kApart;
    return segment * kSegment + word * 32 + rest / kApart % kUnits * kVector;
  }

  __device__ void fill(const T* x, int rows, int inputs, int units) const {
    if (inputs % kVector) {  // rows that begin anywhere
#pragma unroll 1
      for (int column = threadIdx.x; column < units * kVector; column += blockDim.x) {
        Column all;
#pragma unroll
        for (int r = 0; r < Rows; r++)
          all.v[r] = static_cast<Element>(r < rows && column < inputs ? x[int64_t{r} * inputs + column] : T(0.0f));
        memory[place(column)] = all;
      }
      return;
    }
#pragma unroll 1
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
      const int column = unit_column(unit);
      Pack<T, kVector> part[Rows];
#pragma unroll
      for (int r = 0; r < Rows; r++) {
        if (r < rows && column < inputs)
          part[r] = *reinterpret_cast<const Pack<T, kVector>*>(x + int64_t{r} * inputs + column);
        else
#pragma unroll
          for (int k = 0; k < kVector; k++) part[r].v[k] = T(0.0f);
      }
#pragma unroll
      for (int k = 0; k < kVector; k++) {
        Column all;
#pragma unroll
        for (int r = 0; r < Rows; r++) all.v[r] = static_cast<Element>(part[r].v[k]);
        memory[place(column + k)] = all;
      }
    }
  }

  __device__ Column at(int column) const { return memory[place(column)]; }
  __device__ const Column* lane(int segment) const {
    const Column* first = memory + segment * kSegment + threadIdx.x % kWarpSize;
    keep_shared_in_register(first);
    return first;
  }
  static __device__ Column of_lane(const Column* lane, int j, int bit) { return lane[j * kSegment + bit * kWarpSize]; }
};

// The same of one row that shared memory cannot hold, where it is.
template <class T>
struct Unstaged {
  using Column = Pack<T, 1>;

  const T* x;
  int inputs;

  __device__ Column at(int column) const { return {column < inputs ? x[column] : T(0.0f)}; }
  __device__ int lane(int segment) const { return segment * kSegment + static_cast<int>(threadIdx.x) % kWarpSize * 32; }
  __device__ Column of_lane(int lane, int j, int bit) const { return at(lane + j * kSegment + bit); }
};

// -------------------------------------------------------------------------------------------------------- parts of a row

template <class T, int Rows>
struct BitmapPart {
  static constexpr int kWords = Rows > 2 ? 2 : 4;  // of a lane that are decoded side by side

  const Compressed& c;
  const uint32_t* bits;
  const T* values;
  int length, used, segment, end;
  unsigned word[kWords];

  __device__ BitmapPart(const Compressed& c, int64_t o, int part, int parts) : c(c), used(0), segment(0), end(0) {
    bits = c.row_bits(o);
    if (o < c.outputs) {
      const int segments = (c.inputs + kSegment - 1) / kSegment, each = (segments + parts - 1) / parts;
      segment = min(part * each, segments);
      end = min(segment + each, segments);
    }
    load();  // before anything is known of the row: its loads are under way together
    const auto row = c.row(o);
    values = static_cast<const T*>(c.values) + row.begin;
    keep_in_register(values);
    length = row.length;
    // Which values are its own shows only when the bits are counted; all parts together ask for the row's.
    constexpr int kLine = 128 / sizeof(T);
    for (int i = (part * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize) * kLine; i < length;
         i += parts * kWarpSize * kLine)
      prefetch(values + i);
    if (segment > 0) used = c.ones_before(bits, min(segment * kWarpSize, c.row_words));
  }

  __device__ void load() {
    const int first = segment * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int j = 0; j < kWords; j++)
      word[j] = segment + j < end && first + j * kWarpSize < c.row_words ? bits[first + j * kWarpSize] : 0;
  }

  template <class X>
  __device__ void add_to(Wide<T> (&sum)[Rows], const X& x) {
    while (segment < end) {
      unsigned left[kWords], counted[kWords / 2];  // counts of two words in one sum: they are at most 1024
      int last[kWords];
#pragma unroll
      for (int j = 0; j < kWords; j++) left[j] = word[j];
      if ((segment + kWords) * kSegment > c.inputs) {
        const int first = segment * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
        for (int j = 0; j < kWords; j++) left[j] &= c.inside(first + j * kWarpSize);
      }
#pragma unroll
      for (int j = 0; j < kWords; j += 2) counted[j / 2] = sum_to_lane(__popc(left[j]) | __popc(left[j + 1]) << 16);
#pragma unroll
      for (int j = 0; j < kWords; j++) {
        const int shift = j % 2 * 16;
        last[j] = used + static_cast<int>(counted[j / 2] >> shift & 0xffffu) - 1;
        used += static_cast<int>(__shfl_sync(kAllLanes, counted[j / 2], kWarpSize - 1) >> shift & 0xffffu);
      }
      if (used > length) {  // more bits than values: the last ones have none
#pragma unroll
        for (int j = 0; j < kWords; j++)
          while (last[j] >= length && left[j]) left[j] ^= one_bit(31 - __clz(left[j])), last[j]--;
      }
      const auto lane = x.lane(segment);
      segment += kWords;
      load();
      for (;;) {
        unsigned any = 0;
#pragma unroll
        for (int j = 0; j < kWords; j++) any |= left[j];
        if (any == 0) break;
        // The highest bit of each word. Only loads and sums depend on whether there is one, so that nothing here branches.
        bool open[kWords];
        T value[kWords];
        typename X::Column column[kWords];
#pragma unroll
        for (int j = 0; j < kWords; j++) {
          open[j] = left[j] != 0;
          const int bit = 31 - __clz(left[j]);
          left[j] ^= one_bit(bit);
          if (open[j]) value[j] = load_global(values + last[j]);
          if (open[j]) column[j] = x.of_lane(lane, j, bit);
          last[j]--;
        }
#pragma unroll
        for (int j = 0; j < kWords; j++)
          if (open[j]) {
#pragma unroll
            for (int r = 0; r < Rows; r++) sum[r] += static_cast<Wide<T>>(value[j]) * static_cast<Wide<T>>(column[j].v[r]);
          }
      }
    }
  }
};

template <class T, class Column, int Rows>
struct IndexPart {
  static constexpr int kEach = sizeof(T) > 4 ? 2 : 4;  // values of a unit, which one instruction loads
  static constexpr int kUnits = Rows == 1 ? 4 : Rows == 2 || sizeof(T) == 2 ? 2 : 1;  // of them that a lane has in flight

  // Units lie at multiples of kEach in the memory of all values: the first and the last of a row hold values of its neighbours
  // too.
  const T* values;  // of the row's first unit
  const Column* columns;
  int lead, length;    // values of the row before in the first unit; values of the row
  int unit, end_unit;  // those of the lane's part that are whole
  int rest;            // values of the row from this one on are in the unit that the end of all values cuts off
  unsigned none;       // the column with zeros, for columns that are not there
  // The units, loaded as the words that they are: elements would be unpacked before there is time for it.
  template <class E>
  union Unit {
    Pack<unsigned, kEach * sizeof(E) / 4> raw;
    E v[kEach];
    __device__ Unit() : raw{} {}
  };
  Unit<T> value[kUnits];
  Unit<Column> column[kUnits];

  __device__ IndexPart(const Compressed& c, int64_t o, int part, int parts) : none(static_cast<unsigned>(c.inputs)) {
    keep_in_register(none);
    const auto row = c.row(o);
    const int64_t first = row.begin / kEach;
    values = static_cast<const T*>(c.values) + first * kEach;
    columns = static_cast<const Column*>(c.positions) + first * kEach;
    lead = static_cast<int>(row.begin % kEach), length = row.length;
    const int units = (lead + length + kEach - 1) / kEach;
    const int whole = static_cast<int>(min(static_cast<int64_t>(units), c.count / kEach - first));
    const int each = (whole + parts - 1) / parts;
    unit = part * each + static_cast<int>(threadIdx.x) % kWarpSize;
    end_unit = min(whole, (part + 1) * each);
    rest = part == parts - 1 && whole < units ? max(whole * kEach - lead, 0) : length;
    load();
  }

  __device__ void load() {
#pragma unroll
    for (int k = 0; k < kUnits; k++) {
      const int at = unit + k * kWarpSize;
      if (at < end_unit) value[k].raw = reinterpret_cast<const decltype(Unit<T>::raw)&>(values[int64_t{at} * kEach]);
      if (at < end_unit) column[k].raw = reinterpret_cast<const decltype(Unit<Column>::raw)&>(columns[int64_t{at} * kEach]);
    }
  }

  template <class X>
  __device__ void add(Wide<T> (&sum)[Rows], const X& x, T value, Column column) const {
    const auto of_x = x.at(static_cast<int>(min(static_cast<unsigned>(column), none)));
#pragma unroll
    for (int r = 0; r < Rows; r++) sum[r] += static_cast<Wide<T>>(value) * static_cast<Wide<T>>(of_x.v[r]);
  }

  template <class X>
  __device__ void add_to(Wide<T> (&sum)[Rows], const X& x) {
    for (; unit < end_unit; unit += kUnits * kWarpSize, load()) {
#pragma unroll
      for (int k = 0; k < kUnits; k++) {
        const int at = unit + k * kWarpSize;
        const int first = at < end_unit ? at * kEach - lead : -kEach;
#pragma unroll
        for (int j = 0; j < kEach; j++)
          if (static_cast<unsigned>(first + j) < static_cast<unsigned>(length)) add(sum, x, value[k].v[j], column[k].v[j]);
      }
    }
    const int i = rest + static_cast<int>(threadIdx.x) % kWarpSize;
    if (i < length) add(sum, x, values[lead + i], columns[lead + i]);
  }
};

// -------------------------------------------------------------------------------------------------------------- products

// A block for eight rows of x has a multiprocessor to itself, because filling its shared memory is what takes long.
template <int Rows>
constexpr int kThreads = Rows > 4 ? 1024 : 512;

// Column: what columns are stored as, or void for a bitmap.
template <class T, class Column, int Rows>
using PartOf = std::conditional_t<std::is_void_v<Column>, BitmapPart<T, Rows>, IndexPart<T, Column, Rows>>;
template <class T, class Column, int Rows>
using StagedFor = Staged<T, Rows, std::is_void_v<Column>>;

// y[b][o] for Rows rows of the batch at a time (blockIdx.y) and kWarps / parts rows of the weight (blockIdx.x), in a fixed order.
template <class T, class Column, int Rows, bool InShared>
__global__ void __launch_bounds__(kThreads<Rows>, InShared&& Rows <= 4 ? 2 : 1)
    linear_kernel(const __grid_constant__ Compressed c, const T* x, const T* bias, T* y, int64_t batch, int parts, int units) {
  using W = Wide<T>;
  using Part = PartOf<T, Column, Rows>;
  constexpr int kWarps = kThreads<Rows> / kWarpSize;
  __shared__ W partial[kWarps][Rows];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, part = warp % parts;
  const int64_t first = int64_t{blockIdx.x} * (kWarps / parts), stride = int64_t{gridDim.x} * (kWarps / parts);
  for (int64_t b = int64_t{blockIdx.y} * Rows; b < batch; b += int64_t{gridDim.y} * Rows) {
    const int rows = static_cast<int>(min(batch - b, static_cast<int64_t>(Rows)));
    const auto products = [&](const auto& of_x, const auto& ready) {
      for (int64_t base = first; base < c.outputs; base += stride) {
        const int64_t o = base + warp / parts;
        Part weights(c, o, part, parts);
        if (base == first) ready();
        W sum[Rows] = {};
        weights.add_to(sum, of_x);
#pragma unroll
        for (int r = 0; r < Rows; r++) sum[r] = warp_sum(sum[r]);
        if (parts > 1) {
          __syncthreads();  // whoever read the parts of the rows before is done
          if (lane == 0)
#pragma unroll
            for (int r = 0; r < Rows; r++) partial[warp][r] = sum[r];
          __syncthreads();
          if (part == 0)
#pragma unroll 1
            for (int p = 1; p < parts; p++)
#pragma unroll
              for (int r = 0; r < Rows; r++) sum[r] += partial[warp + p][r];
        }
        if (part > 0 || o >= c.outputs) continue;
        if (lane >= rows) continue;
        W mine = sum[0];
#pragma unroll
        for (int r = 1; r < Rows; r++) mine = lane == r ? sum[r] : mine;
        y[(b + lane) * c.outputs + o] = static_cast<T>(bias ? mine + static_cast<W>(bias[o]) : mine);
      }
    };
    if constexpr (InShared) {
      using X = StagedFor<T, Column, Rows>;
      SK_DYNAMIC_SHARED(typename X::Column, memory);
      keep_shared_in_register(memory);
      const X of_x{memory};
      products(of_x, [&] {
        __syncthreads();  // whoever read the rows before is done
        of_x.fill(x + b * c.inputs, rows, c.inputs, units);
        __syncthreads();
      });
    } else {
      products(Unstaged<T>{x + b * c.inputs, c.inputs}, [] {});
    }
  }
}

// The tensors of a compressed weight, and what a kernel reads of them.
struct Checked {
  Tensor values, positions, offsets;
  Compressed c;
};

Checked read_compressed(const Place& place, const Tensor& values, const Tensor& positions, const Tensor& offsets,
                        int64_t inputs) {
  const char* op = place.op();
  place.check("values", values), place.check("positions", positions), place.check("offsets", offsets);
  floating(op, "values", values);
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 && offsets.numel() > 0, op,
                  ": offsets must be int64 (O + 1,)");
  STD_TORCH_CHECK(inputs >= 0 && inputs < std::numeric_limits<int32_t>::max() - kSegment * 4, op,
                  ": a row of the weight must have less than 2^31 - 4096 inputs, got ", inputs);
  const int64_t outputs = offsets.numel() - 1, count = values.numel(), words = ceil_div(inputs, 64);
  if (positions.scalar_type() == ScalarType::Byte) {
    STD_TORCH_CHECK(positions.dim() == 2 && positions.size(0) == outputs && positions.size(1) == words * 8, op,
                    ": a bitmap must have ", words * 8, " bytes for each of ", outputs, " rows");
  } else {
    STD_TORCH_CHECK(positions.scalar_type() == ScalarType::UInt16 || positions.scalar_type() == ScalarType::Int, op,
                    ": positions must be a uint8 bitmap, or uint16 or int32 columns");
    STD_TORCH_CHECK(positions.dim() == 1 && positions.numel() == count, op, ": columns must be one for each of ", count,
                    " values, got ", positions.numel());
  }
  Checked checked{aligned(values), aligned(positions), dense(offsets), {}};
  checked.c = {checked.values.const_data_ptr(),
               checked.positions.const_data_ptr(),
               static_cast<const int64_t*>(checked.offsets.const_data_ptr()),
               outputs,
               count,
               static_cast<int>(inputs),
               static_cast<int>(words * 2)};
  return checked;
}

struct Product {
  const Compressed& c;
  const void *x, *bias;
  void* y;
  int64_t batch;
};

template <class T, class Column, int Rows, bool InShared>
void launch_linear(const Place& place, const Product& p) {
  constexpr int kWarps = kThreads<Rows> / kWarpSize, kBlocks = 1024 / kThreads<Rows>;  // of a multiprocessor
  const int64_t chunks = ceil_div(p.batch, Rows), blocks = int64_t{place.processors()} * kBlocks, warps = blocks * kWarps;
  // Where rows are few, several warps share one, each with a segment of it at least.
  int parts = 1;
  while (parts < 16 && p.c.outputs * chunks * parts * 2 <= warps && p.c.inputs >= kSegment * parts * 2) parts *= 2;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(ceil_div(p.c.outputs, kWarps / parts), blocks)),
                  static_cast<unsigned>(std::min<int64_t>(chunks, 65535)));
  using X = StagedFor<T, Column, Rows>;
  place.launch(linear_kernel<T, Column, Rows, InShared>, grid, kThreads<Rows>, InShared ? X::bytes(p.c.inputs) : 0, p.c,
               static_cast<const T*>(p.x), static_cast<const T*>(p.bias), static_cast<T*>(p.y), p.batch, parts,
               InShared ? X::units(p.c.inputs) : 0);
}

// As many rows of x at a time as there are and as shared memory holds, with room for two blocks where they are not eight.
template <class T, class Column>
void linear_of(const Place& place, const Product& p) {
  const size_t most = place.shared_memory() - 2048;
  if constexpr (sizeof(T) == 2)
    if (p.batch > 4 && StagedFor<T, Column, 8>::bytes(p.c.inputs) <= most) return launch_linear<T, Column, 8, true>(place, p);
  if constexpr (sizeof(T) <= 4) {
    if (p.batch > 2 && StagedFor<T, Column, 4>::bytes(p.c.inputs) <= most / 2) return launch_linear<T, Column, 4, true>(place, p);
    if (p.batch > 1 && StagedFor<T, Column, 2>::bytes(p.c.inputs) <= most / 2) return launch_linear<T, Column, 2, true>(place, p);
  }
  if (StagedFor<T, Column, 1>::bytes(p.c.inputs) <= most) return launch_linear<T, Column, 1, true>(place, p);
  launch_linear<T, Column, 1, false>(place, p);
}

Tensor compressed_linear_cuda(const Tensor& x_, const Tensor& values, const Tensor& positions, const Tensor& offsets,
                              std::optional<Tensor> bias) {
  const char* op = "compressed_linear";
  const Place place(op, x_);
  STD_TORCH_CHECK(x_.dim() > 0, op, ": x must be (..., I)");
  const Checked weight = read_compressed(place, values, positions, offsets, x_.size(x_.dim() - 1));
  STD_TORCH_CHECK(x_.scalar_type() == values.scalar_type(), op, ": x must have the dtype of values");
  const Tensor x = aligned(x_);
  if (bias) {
    place.check("bias", *bias);
    STD_TORCH_CHECK(bias->scalar_type() == values.scalar_type() && bias->numel() == weight.c.outputs, op, ": bias must be (",
                    weight.c.outputs, ",) in the dtype of values, got ", bias->numel());
    bias = dense(*bias);
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.c.outputs;
  Tensor y = place.empty(sizes.data(), x.dim(), dtype_code(x));
  if (y.numel() == 0) return y;
  const Product product{weight.c, x.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(),
                        y.numel() / weight.c.outputs};
  with_float(op, "values", values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (positions.scalar_type() == ScalarType::Byte)
      linear_of<T, void>(place, product);
    else if (positions.scalar_type() == ScalarType::UInt16)
      linear_of<T, uint16_t>(place, product);
    else  // more columns than shared memory holds
      launch_linear<T, int32_t, 1, false>(place, product);
  });
  return y;
}

// ------------------------------------------------------------------------------------------------------------ decompress

constexpr int kDenseThreads = 256;

// A warp writes a segment of a row.
template <class E>
__global__ void __launch_bounds__(kDenseThreads)
    decompress_bitmap_kernel(const __grid_constant__ Compressed c, E* out, int segments) {
  constexpr int kAtOnce = 8;  // words whose values a warp has in flight
  const int lane = threadIdx.x % kWarpSize;
  const int64_t item = int64_t{blockIdx.x} * (kDenseThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int64_t o = item / segments;
  if (o >= c.outputs) return;
  const int first = static_cast<int>(item % segments) * kWarpSize;  // words of the row before
  const auto row = c.row(o);
  const auto* values = static_cast<const E*>(c.values) + row.begin;
  const uint32_t* bits = c.row_bits(o);
  const unsigned word = first + lane < c.row_words ? bits[first + lane] & c.inside(first + lane) : 0;
  const int before = c.ones_before(bits, first);
  const int rank = before + static_cast<int>(sum_to_lane(__popc(word)) - __popc(word));
  E* to = out + o * c.inputs + int64_t{first} * 32 + lane;
#pragma unroll 1
  for (int w = 0; w < kWarpSize; w += kAtOnce) {
    E value[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      const unsigned open = __shfl_sync(kAllLanes, word, w + j);
      const int at = __shfl_sync(kAllLanes, rank, w + j) + __popc(open & ((1u << lane) - 1));
      value[j] = (open >> lane & 1u) && at < row.length ? values[at] : E{};
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; j++)
      if ((first + w + j) * 32 + lane < c.inputs) to[(w + j) * 32] = value[j];
  }
}

// A group of threads a row: the rows of a block are zeroed, then the values go where they belong.
template <class E, class Column>
__global__ void __launch_bounds__(kDenseThreads)
    decompress_index_kernel(const __grid_constant__ Compressed c, E* out, int group) {
  constexpr int kVector = 16 / sizeof(E);
  const int rows = kDenseThreads / group;
  const int64_t first = int64_t{blockIdx.x} * rows, last = min(c.outputs, first + rows);
  const int64_t begin = first * c.inputs, end = last * c.inputs;
  const int64_t vectors = min((begin + kVector - 1) / kVector * kVector, end), rest = max(end / kVector * kVector, vectors);
  if (begin + threadIdx.x < vectors) out[begin + threadIdx.x] = E{};
  for (int64_t i = vectors + threadIdx.x * kVector; i < rest; i += kDenseThreads * kVector)
    *reinterpret_cast<uint4*>(out + i) = make_uint4(0, 0, 0, 0);
  if (rest + threadIdx.x < end) out[rest + threadIdx.x] = E{};
  __syncthreads();
  const int64_t o = first + threadIdx.x / group;
  if (o >= last) return;
  const auto row = c.row(o);
  const auto* values = static_cast<const E*>(c.values) + row.begin;
  const auto* columns = static_cast<const Column*>(c.positions) + row.begin;
  for (int i = threadIdx.x % group; i < row.length; i += group) {
    const auto column = static_cast<unsigned>(columns[i]);
    if (column < static_cast<unsigned>(c.inputs)) out[o * c.inputs + column] = values[i];
  }
}

template <class E>
void decompress_as(const Place& place, const Checked& weight, Tensor& out) {
  const Compressed& c = weight.c;
  auto* to = static_cast<E*>(out.mutable_data_ptr());
  if (weight.positions.scalar_type() == ScalarType::Byte) {
    const int64_t segments = ceil_div(c.inputs, kSegment), warps = kDenseThreads / kWarpSize;
    place.launch(decompress_bitmap_kernel<E>, dim3(static_cast<unsigned>(ceil_div(c.outputs * segments, warps))), kDenseThreads,
                 0, c, to, static_cast<int>(segments));
    return;
  }
  const int group = c.inputs > kDenseThreads ? kDenseThreads : kWarpSize;
  const dim3 grid(static_cast<unsigned>(ceil_div(c.outputs, kDenseThreads / group)));
  const bool narrow = weight.positions.scalar_type() == ScalarType::UInt16;
  place.launch(narrow ? decompress_index_kernel<E, uint16_t> : decompress_index_kernel<E, int32_t>, grid, kDenseThreads, 0, c, to,
               group);
}

Tensor decompress_cuda(const Tensor& values, const Tensor& positions, const Tensor& offsets, int64_t inputs) {
  const Place place("decompress", values);
  const Checked weight = read_compressed(place, values, positions, offsets, inputs);
  Tensor out = place.empty({weight.c.outputs, inputs}, dtype_code(values));
  if (out.numel() == 0) return out;
  if (values.element_size() == 2)
    decompress_as<uint16_t>(place, weight, out);
  else if (values.element_size() == 4)
    decompress_as<uint32_t>(place, weight, out);
  else
    decompress_as<uint64_t>(place, weight, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("compressed_linear", TORCH_BOX(&compressed_linear_cuda));
  m.impl("decompress", TORCH_BOX(&decompress_cuda));
}
