// superpose by tables: where the numbers are float64, or the tasks few and the weights many.
#include "superpose_tables.h"

namespace superposition {
namespace {

// On sm_80 one register spills, outside the loops over tasks and weights of mix_by_tables_kernel.
template <class W, class Table>
__global__ void __launch_bounds__(kMixThreads, sizeof(W) == 4 ? 4 : 2)
    mix_by_tables_kernel(const __grid_constant__ Table bank, const Mix a) {
  SK_DYNAMIC_SHARED(W, memory);
  __shared__ uint32_t opened_words[kTeams][kTeam];
  // rows are neighbours: the bits come from the L2 cache
  mix_by_tables<W>(bank, a, blockIdx.x % a.rows, blockIdx.x / a.rows * int64_t{kTeams >> a.log_slices}, a.n, memory,
                   opened_words);
}

}  // namespace

// How many teams share a tile by tables, 1, 4 or 16: enough that every processor has work and that no team adds long sums of
// floats, and no more than there are groups of tasks.
int log_of_slices(const Place& place, int64_t all_tiles, int64_t tasks) {
  int log = tasks > 1024 ? 4 : tasks > 128 ? 2 : 0;
  while (log < 4 && (all_tiles << log) < place.processors() * 64 && (int64_t{8} << log) <= tasks) log += 2;
  return log;
}

void mix_by_tables(const Place& place, const Bank& bank, Mix mix) {
  mix.log_slices = log_of_slices(place, tiles(mix.n), bank.tasks());
  const int64_t blocks = ceil_div(tiles(mix.n), kTeams >> mix.log_slices) * mix.rows;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "superpose: ", mix.rows, " rows of ", mix.n, " weights are too many");
  bank.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const dim3 grid(static_cast<unsigned>(blocks));
    if (mix.weight.dtype == ScalarType::Double)
      place.launch(mix_by_tables_kernel<double, Table>, grid, kMixThreads, kTeams * kTile * sizeof(double), table, mix);
    else
      place.launch(mix_by_tables_kernel<float, Table>, grid, kMixThreads, kTeams * kTile * sizeof(float), table, mix);
  });
}

}  // namespace superposition
