// What a warp has of a row of a compressed weight: the values behind a part of its bitmap, or a part of its columns.
#pragma once
#include "compressed_weight.h"

namespace {

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

}  // namespace
