// Rows of x as the products with compressed weights read them: from shared memory, or where they are.
#pragma once
#include "compressed_weight.h"

namespace {

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
  static constexpr int kVector = (Rows > 4 ? 8 : 16) / sizeof(T);  // columns that a thread loads at once

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
      const T* from = x + column;
#pragma unroll
      for (int r = 0; r < Rows; r++, from += inputs) {
        if constexpr (Rows > 4) keep_in_register(from);  // not an address for each row of x
        if (r < rows && column < inputs)
          part[r] = *reinterpret_cast<const Pack<T, kVector>*>(from);
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

}  // namespace
