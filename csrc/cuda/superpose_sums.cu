// Adds what the blocks of superpose_grad and alpha_grad leave, each its part of the sums of a row, in order.
#include "superpose.h"

namespace superposition {
namespace {

constexpr int kAddTasks = 8, kAddLines = 64;  // of a block
constexpr int kAddThreads = kAddTasks * kAddLines;
constexpr int kAddAtOnce = 8;

// A block takes eight tasks, and for each of them 64 threads that take every 64th part.
__global__ void __launch_bounds__(kAddThreads) add_parts_kernel(const Sums sums) {
  __shared__ double lines[kAddThreads / kWarpSize][kAddTasks];
  const int chunks = (sums.tasks + kAddTasks - 1) / kAddTasks;
  const int64_t row = blockIdx.x / chunks;
  const int column = threadIdx.x % kAddTasks, line = threadIdx.x / kAddTasks;
  const int task = static_cast<int>(blockIdx.x % chunks) * kAddTasks + column;
  wait_for_last();
  double sum = 0;
  if (task < sums.tasks) {
    const double* from = sums.partial + row * sums.parts * sums.tasks + task;
    for (int part = line; part < sums.parts; part += kAddLines * kAddAtOnce) {
      double some[kAddAtOnce];
#pragma unroll
      for (int i = 0; i < kAddAtOnce; i++) {
        const int at = part + i * kAddLines;
        some[i] = at < sums.parts ? from[int64_t{at} * sums.tasks] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAddAtOnce; i++) sum += some[i];
    }
  }
#pragma unroll
  for (int lanes = kAddTasks; lanes < kWarpSize; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (threadIdx.x % kWarpSize < kAddTasks) lines[threadIdx.x / kWarpSize][column] = sum;
  __syncthreads();
  if (line > 0 || task >= sums.tasks) return;
#pragma unroll
  for (int i = 1; i < kAddThreads / kWarpSize; i++) sum += lines[i][column];
  store_one(sums.out, sums.dtype, row * sums.tasks + task, sum);
}

}  // namespace

void add_parts(const Place& place, const Sums& sums, int64_t rows) {
  if (sums.parts == 1) return;
  place.launch_early(add_parts_kernel, dim3(static_cast<unsigned>(rows * ceil_div(sums.tasks, kAddTasks))), kAddThreads, sums);
}

}  // namespace superposition
