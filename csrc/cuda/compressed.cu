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

#include "compressed_parts.h"
#include "compressed_rows.h"

namespace {

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
// Two instantiations spill where x is staged and where a row of the weight begins, beside the sums: linear_kernel of eight
// bfloat16 rows with a bitmap on sm_90, which is not slower for it (columns serve there below density .5), and of four float rows
// on sm_100.
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
