// pack, unpack, count, union_, stats, overlap: masks of one bit a weight, and what is counted on them.
//
// All but overlap move bytes and nothing else, 16 a thread and load; counts are sums of whole numbers, which no order changes.
#include "bank.h"

namespace {

constexpr int kThreads = 256;

dim3 blocks_for(int64_t items) { return dim3(static_cast<unsigned>(ceil_div(items, kThreads))); }

__device__ int64_t item() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

// ---------------------------------------------------------------------------------------------------------------- pack, unpack

// The lowest bit of each byte of x that is not zero, gathered in 4 bits.
__device__ unsigned true_bytes(unsigned x) {
  unsigned set = (((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) >> 7 & 0x01010101u;
  set |= set >> 7;
  return (set | set >> 14) & 0xfu;
}

// A thread packs 16 weights; those from n on are padding.
__global__ void __launch_bounds__(kThreads) pack_kernel(const uint8_t* mask, uint16_t* bits, int64_t n, int64_t pieces) {
  const int64_t piece = item();
  if (piece >= pieces) return;
  const int64_t first = piece * 16;
  unsigned packed = 0;
  if (first + 16 <= n) {
    const uint4 x = *reinterpret_cast<const uint4*>(mask + first);
    packed = true_bytes(x.x) | true_bytes(x.y) << 4 | true_bytes(x.z) << 8 | true_bytes(x.w) << 12;
  } else {
    for (int i = 0; i < 16; i++)
      if (first + i < n && mask[first + i] != 0) packed |= 1u << i;
  }
  bits[piece] = static_cast<uint16_t>(packed);
}

// Four bits to four bytes of 0 or 1.
__device__ unsigned spread_bits(unsigned bits) { return (bits & 1u) | (bits & 2u) << 7 | (bits & 4u) << 14 | (bits & 8u) << 21; }

__global__ void __launch_bounds__(kThreads) unpack_kernel(const uint16_t* bits, uint8_t* mask, int64_t n) {
  const int64_t first = item() * 16;
  if (first >= n) return;
  const unsigned packed = bits[first / 16];
  if (first + 16 <= n) {
    *reinterpret_cast<uint4*>(mask + first) =
        make_uint4(spread_bits(packed), spread_bits(packed >> 4), spread_bits(packed >> 8), spread_bits(packed >> 12));
  } else {
    for (int i = 0; first + i < n; i++) mask[first + i] = packed >> i & 1u;
  }
}

Tensor pack_cuda(const Tensor& mask_) {
  const Place place("pack", mask_);
  STD_TORCH_CHECK(mask_.scalar_type() == ScalarType::Bool, "pack: mask must be bool");
  const Tensor mask = aligned(mask_);
  const int64_t n = mask.numel(), pieces = mask_bytes(n) / 2;
  Tensor bits = place.empty({mask_bytes(n)}, aoti_torch_dtype_uint8());
  place.launch(pack_kernel, blocks_for(pieces), kThreads, 0, static_cast<const uint8_t*>(mask.const_data_ptr()),
               static_cast<uint16_t*>(bits.mutable_data_ptr()), n, pieces);
  return bits;
}

Tensor unpack_cuda(const Tensor& bits_, std::vector<int64_t> shape) {
  const Place place("unpack", bits_);
  const Tensor bits = aligned(bits_);
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  check_bits("unpack", bits, n);
  Tensor mask = place.empty(shape.data(), static_cast<int64_t>(shape.size()), aoti_torch_dtype_bool());
  place.launch(unpack_kernel, blocks_for(ceil_div(n, 16)), kThreads, 0, static_cast<const uint16_t*>(bits.const_data_ptr()),
               static_cast<uint8_t*>(mask.mutable_data_ptr()), n);
  return mask;
}

// --------------------------------------------------------------------------------------------------------------------- counting

// out[0] += ones of a; with Both also out[2] += ones of a & b, and out[1] += the rest of a.
template <bool Both>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const uint8_t* a, const uint8_t* b, int64_t bytes, unsigned long long* out) {
  __shared__ long long shared[kWarpSize];
  long long all = 0, both = 0;
  const int64_t quads = bytes / 16, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = item(); i < quads; i += stride) {
    const uint4 x = reinterpret_cast<const uint4*>(a)[i];
    all += __popc(x.x) + __popc(x.y) + __popc(x.z) + __popc(x.w);
    if constexpr (Both) {
      const uint4 y = reinterpret_cast<const uint4*>(b)[i];
      both += __popc(x.x & y.x) + __popc(x.y & y.y) + __popc(x.z & y.z) + __popc(x.w & y.w);
    }
  }
  const int64_t rest = quads * 16 + item();
  if (rest < bytes) {
    all += __popc(a[rest]);
    if constexpr (Both) both += __popc(unsigned{a[rest]} & b[rest]);
  }
  all = block_sum(all, shared);
  if constexpr (Both) both = block_sum(both, shared);
  if (threadIdx.x == 0) {
    atomicAdd(out, static_cast<unsigned long long>(all));
    if constexpr (Both) {
      atomicAdd(out + 1, static_cast<unsigned long long>(all - both));
      atomicAdd(out + 2, static_cast<unsigned long long>(both));
    }
  }
}

// Enough blocks to keep the memory busy, few enough that their sums cost nothing.
dim3 counting_grid(const Place& place, int64_t bytes) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(ceil_div(bytes, kThreads * 64), 1, place.processors() * 8)));
}

Tensor count_cuda(const Tensor& bits_) {
  const Place place("count", bits_);
  STD_TORCH_CHECK(bits_.scalar_type() == ScalarType::Byte, "count: bits must be uint8");
  const Tensor bits = aligned(bits_);
  Tensor result = place.empty(nullptr, 0, aoti_torch_dtype_int64());
  place.zero(result.mutable_data_ptr(), 8);
  const auto* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  place.launch(count_kernel<false>, counting_grid(place, bits.numel()), kThreads, 0, data, data, bits.numel(),
               static_cast<unsigned long long*>(result.mutable_data_ptr()));
  return result;
}

Tensor stats_cuda(const Tensor& bits_, const Tensor& owned_) {
  const Place place("stats", bits_);
  place.check("owned", owned_);
  STD_TORCH_CHECK(owned_.scalar_type() == ScalarType::Byte && bits_.scalar_type() == ScalarType::Byte,
                  "stats: bits and owned must be uint8");
  STD_TORCH_CHECK(owned_.numel() == bits_.numel(), "stats: bits have ", bits_.numel(), " bytes, owned ", owned_.numel());
  const Tensor bits = aligned(bits_), owned = aligned(owned_);
  Tensor result = place.empty({3}, aoti_torch_dtype_int64());
  place.zero(result.mutable_data_ptr(), 24);
  place.launch(count_kernel<true>, counting_grid(place, bits.numel()), kThreads, 0,
               static_cast<const uint8_t*>(bits.const_data_ptr()), static_cast<const uint8_t*>(owned.const_data_ptr()),
               bits.numel(), static_cast<unsigned long long*>(result.mutable_data_ptr()));
  return result;
}

// ------------------------------------------------------------------------------------------------------------------------ union

__global__ void __launch_bounds__(kThreads) union_kernel(uint8_t* owned, const uint8_t* bits, int64_t bytes) {
  const int64_t first = item() * 16;
  if (first + 16 <= bytes) {
    uint4 x = *reinterpret_cast<const uint4*>(owned + first);
    const uint4 y = *reinterpret_cast<const uint4*>(bits + first);
    x.x |= y.x, x.y |= y.y, x.z |= y.z, x.w |= y.w;
    *reinterpret_cast<uint4*>(owned + first) = x;
  } else {
    for (int64_t i = first; i < bytes; i++) owned[i] |= bits[i];
  }
}

void union_cuda(Tensor owned, const Tensor& bits_) {
  const Place place("union_", owned);
  place.check("bits", bits_);
  STD_TORCH_CHECK(owned.scalar_type() == ScalarType::Byte && bits_.scalar_type() == ScalarType::Byte,
                  "union_: owned and bits must be uint8");
  STD_TORCH_CHECK(owned.numel() == bits_.numel(), "union_: owned has ", owned.numel(), " bytes, bits ", bits_.numel());
  const Tensor bits = aligned(bits_);
  Target target(owned);
  place.launch(union_kernel, blocks_for(ceil_div(bits.numel(), 16)), kThreads, 0,
               static_cast<uint8_t*>(target.tensor().mutable_data_ptr()), static_cast<const uint8_t*>(bits.const_data_ptr()),
               bits.numel());
  target.flush();
}

// ---------------------------------------------------------------------------------------------------------------------- overlap

constexpr int kPairs = 16;  // tasks of either side of a block of pairs; a thread a pair
constexpr int kStage = 4;   // tiles in shared memory at a time
constexpr int kRow =
    kStage * kTileBytes / 16 + 1;  // 16-byte words of a task's row there; the odd one keeps rows off each other's banks

// Pairs of 16 tasks (blockIdx.y) with 16 not before them (blockIdx.z), over a range of tiles (blockIdx.x); sums into out.
template <class Table>
__global__ void __launch_bounds__(kPairs* kPairs)
    overlap_kernel(const __grid_constant__ Table bank, int64_t tiles, int64_t tiles_a_block, unsigned long long* out) {
  if (blockIdx.z < blockIdx.y) return;  // symmetric
  __shared__ uint4 rows[2][kPairs][kRow];
  const int i = threadIdx.x / kPairs, j = threadIdx.x % kPairs;
  const int a = blockIdx.y * kPairs, b = blockIdx.z * kPairs;
  const int64_t begin = blockIdx.x * tiles_a_block, end = min(tiles, begin + tiles_a_block);
  // Eight threads fill a row: each always the same one.
  const int side = threadIdx.x / 128, row = threadIdx.x / 8 % kPairs, task = (side ? b : a) + row;
  const TaskLines lines = bank.task(min(task, bank.tasks - 1));
  long long both = 0;
  for (int64_t tile = begin; tile < end; tile += kStage) {
    for (int w = threadIdx.x % 8; w < kStage * 4; w += 8) {
      const int64_t t = tile + w / 4;
      rows[side][row][w] =
          t < end && task < bank.tasks ? *reinterpret_cast<const uint4*>(lines.first + t * lines.step + w % 4 * 16) : uint4{};
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kStage * 4; w++) {
      const uint4 x = rows[0][i][w], y = rows[1][j][w];
      both += __popc(x.x & y.x) + __popc(x.y & y.y) + __popc(x.z & y.z) + __popc(x.w & y.w);
    }
    __syncthreads();
  }
  const int64_t p = a + i, q = b + j, tasks = bank.tasks;
  if (p < tasks && q < tasks && p <= q) {
    atomicAdd(out + p * tasks + q, static_cast<unsigned long long>(both));
    if (p != q) atomicAdd(out + q * tasks + p, static_cast<unsigned long long>(both));
  }
}

Tensor overlap_cuda(std::vector<Tensor> bank) {
  STD_TORCH_CHECK(!bank.empty(), "overlap: bank must hold at least one block");
  const Place place("overlap", bank[0]);
  STD_TORCH_CHECK(bank[0].dim() == 3, "overlap: a block of a bank must be uint8 (tiles, tasks, ", kTileBytes, ")");
  const int64_t tiles = bank[0].size(0);
  const Bank checked(place, bank, tiles * kTile);
  const int64_t tasks = checked.tasks(), groups = ceil_div(tasks, kPairs);
  Tensor result = place.empty({tasks, tasks}, aoti_torch_dtype_int64());
  place.zero(result.mutable_data_ptr(), tasks * tasks * 8);
  if (tasks == 0 || tiles == 0) return result;
  // Ranges of tiles short enough that small banks fill the device too.
  const int64_t wanted = std::max<int64_t>(1, ceil_div(place.processors() * 8, groups * groups));
  const int64_t each = std::max<int64_t>(kStage, ceil_div(tiles, wanted));
  checked.with_table([&](const auto& table) {
    place.launch(overlap_kernel<std::decay_t<decltype(table)>>,
                 dim3(static_cast<unsigned>(ceil_div(tiles, each)), static_cast<unsigned>(groups), static_cast<unsigned>(groups)),
                 kPairs * kPairs, 0, table, tiles, each, static_cast<unsigned long long*>(result.mutable_data_ptr()));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("pack", TORCH_BOX(&pack_cuda));
  m.impl("unpack", TORCH_BOX(&unpack_cuda));
  m.impl("count", TORCH_BOX(&count_cuda));
  m.impl("union_", TORCH_BOX(&union_cuda));
  m.impl("stats", TORCH_BOX(&stats_cuda));
  m.impl("overlap", TORCH_BOX(&overlap_cuda));
}
