// What superpose.cu, which chooses, asks of the files that compute.
#pragma once
#include "bank.h"
#include "superpose_numbers.h"

namespace superposition {

// ---------------------------------------------------------------------------------------------------------------- superpose

struct Mix {
  Floats weight, alphas;  // no alphas: all one, and their sum divided by the number of tasks
  void* out;
  int64_t n, rows;
  int32_t log_slices;  // of the tasks, by tables
  double one_of_all;   // tasks, for equal alphas by products

  // Four alphas from a task on, in the dtype of weight, as the reference has them; zero for those from `left` on.
  template <class W>
  __device__ __forceinline__ void load_alphas(int64_t at, int64_t left, W (&to)[4]) const {
    if (!alphas.data) {
#pragma unroll
      for (int t = 0; t < 4; t++) to[t] = t < left ? 1 : 0;
      return;
    }
    load<4>(alphas, at, left, to);
    if (alphas.dtype != weight.dtype) {
#pragma unroll
      for (int t = 0; t < 4; t++)
        to[t] = by_dtype(weight.dtype, [&](auto zero) { return widen<W>(narrow<decltype(zero)>(to[t])); });
    }
  }
};

// superpose, sums looked up in tables: any dtype, any number of tasks.
void mix_by_tables(const Place& place, const Bank& bank, Mix mix);
// superpose of floats and smaller by products of matrices, whole tiles a block: any number of tasks.
void mix_by_products(const Place& place, const Bank& bank, Mix mix);
// The same by equal shares, of a bank whose digits fit.
void mix_rows_by_products(const Place& place, const Bank& bank, Mix mix);
bool digits_fit(const Place& place, const Bank& bank);

// How many teams share a tile by tables: depends on sizes alone.
int log_of_slices(const Place& place, int64_t all_tiles, int64_t tasks);

// ------------------------------------------------------------------------------------------------------------ sums for alphas

// Where a block leaves its part of the sums of a row: in the result if it has all, else with the other parts.
struct Sums {
  double* partial;  // [row][part][task]
  void* out;        // [row][task]
  ScalarType dtype;
  int32_t parts, tasks;

  __device__ void put(int64_t row, int part, int task, double value) const {
    if (parts == 1)
      store_one(out, dtype, row * tasks + task, value);
    else
      partial[(row * parts + part) * tasks + task] = value;
  }
};

// Adds the parts of so many rows.
void add_parts(const Place& place, const Sums& sums, int64_t rows);

// --------------------------------------------------------------------------------------------------------------- superpose_grad

struct Dot {
  Floats left, grad_y, weight;  // left: G, rows of n; or x, rows of `inputs`
  int64_t n, tiles, inputs, outputs, tiles_a_part;
  Sums sums;
};

// A step from one row to the next, in bytes.
struct Strides {
  int64_t left, grad_y, out;
};

// superpose_grad by tables of float64.
void dot_by_tables(const Place& place, const Bank& bank, const Dot& dot, int64_t rows, const Strides& strides);
// superpose_grad of floats and smaller by products of matrices.
void dot_by_products(const Place& place, const Bank& bank, const Dot& dot, int64_t rows, const Strides& strides);

// ------------------------------------------------------------------------------------------------------------------- alpha_grad

struct Products {
  Floats x, grad_y, weight;
  int64_t rows, inputs, outputs, tiles;
  int64_t units, units_a_part, input_ranges, inputs_a_range;  // a range: whole folds
  Sums sums;
};

// alpha_grad by tables, a row at a time; of float64 if `wide`.
void alpha_grad_by_tables(const Place& place, const Bank& bank, const Dot& dot, int64_t rows, const Strides& strides, bool wide);
// alpha_grad of floats and smaller by a product of matrices a task.
void alpha_grad_by_products(const Place& place, const Bank& bank, const Products& products);

}  // namespace superposition
