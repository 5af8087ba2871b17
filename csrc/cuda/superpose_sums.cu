// Adds what the blocks of superpose_grad and alpha_grad leave, each its part of the sums of a row, in order.
#include "superpose.h"

namespace superposition {
namespace {

constexpr int kAddRows = 32, kAddAtOnce = 8;

// Adds the parts: 32 tasks a block, and for each of them 32 threads that take every 32nd part.
__global__ void __launch_bounds__(kWarpSize* kAddRows) add_parts_kernel(const Sums sums) {
  __shared__ double lines[kAddRows][kWarpSize + 1];
  const int chunks = (sums.tasks + kWarpSize - 1) / kWarpSize;
  const int64_t row = blockIdx.x / chunks;
  const int lane = threadIdx.x % kWarpSize, line = threadIdx.x / kWarpSize;
  const int task = static_cast<int>(blockIdx.x % chunks) * kWarpSize + lane;
  double sum = 0;
  if (task < sums.tasks) {
    const double* from = sums.partial + row * sums.parts * sums.tasks + task;
    for (int part = line; part < sums.parts; part += kAddRows * kAddAtOnce) {
      double some[kAddAtOnce];
#pragma unroll
      for (int i = 0; i < kAddAtOnce; i++) {
        const int at = part + i * kAddRows;
        some[i] = at < sums.parts ? from[int64_t{at} * sums.tasks] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAddAtOnce; i++) sum += some[i];
    }
  }
  lines[line][lane] = sum;
  __syncthreads();
  if (line > 0 || task >= sums.tasks) return;
  for (int i = 1; i < kAddRows; i++) sum += lines[i][lane];
  store_one(sums.out, sums.dtype, row * sums.tasks + task, sum);
}

}  // namespace

void add_parts(const Place& place, const Sums& sums, int64_t rows) {
  if (sums.parts == 1) return;
  place.launch(add_parts_kernel, dim3(static_cast<unsigned>(rows * ceil_div(sums.tasks, kWarpSize))), kWarpSize * kAddRows, 0,
               sums);
}

}  // namespace superposition
