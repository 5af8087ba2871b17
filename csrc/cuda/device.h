// What every CUDA op shares: the device and stream that it runs on, its tensors, launches, and the floating dtypes.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common.h"
#include "simt.h"

#ifndef SUBNET_KERNELS_EMULATED
#include <dlfcn.h>
#endif

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// N elements that one instruction loads or stores.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// ------------------------------------------------------------------------------------------------------------------- launches

#ifndef SUBNET_KERNELS_EMULATED
inline void cuda_check(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA says ", cudaGetErrorString(error));
}

// PyTorch's current stream. The function lies in a library that a build of PyTorch without CUDA lacks; looked up when it is first
// needed, it does not keep this library from loading there.
inline Stream current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(getter != nullptr, "this build of PyTorch has no CUDA streams");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return static_cast<Stream>(stream);
}
#endif

// Where an op runs: the device of its first tensor is the current one, and its stream the current stream, while this lives.
class Place {
 public:
  Place(const char* op, const Tensor& t) : op_(op), device_(t.get_device_index()) {
#ifndef SUBNET_KERNELS_EMULATED
    STD_TORCH_CHECK(t.is_cuda(), op, ": expected a tensor on a CUDA device");
    guard_.emplace(device_);
    stream_ = current_stream(device_);
#endif
  }

  const char* op() const { return op_; }
  Stream stream() const { return stream_; }

  // A tensor of another device would be a wild pointer here.
  void check(const char* name, const Tensor& t) const {
#ifndef SUBNET_KERNELS_EMULATED
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_, op_, ": ", name, " must be on cuda:", device_,
                    ", as the first tensor is");
#endif
    (void)name, (void)t;
  }

  // An uninitialised contiguous tensor on this device; dtype as the C interface counts them (aoti_torch_dtype_...()).
  Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype) const {
    constexpr int64_t kMaxDim = 64;
    STD_TORCH_CHECK(dim <= kMaxDim, op_, ": a tensor may have at most ", kMaxDim, " dimensions, got ", dim);
    int64_t strides[kMaxDim];
    int64_t stride = 1;
    for (int64_t d = dim; d-- > 0; stride *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = stride;
#ifndef SUBNET_KERNELS_EMULATED
    const int32_t kind = aoti_torch_device_type_cuda();
    const int32_t index = device_;
#else
    const int32_t kind = aoti_torch_device_type_cpu(), index = 0;
#endif
    AtenTensorHandle result;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, kind, index, &result));
    return Tensor(result);
  }
  Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) const {
    return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
  }
  Tensor empty_like(const Tensor& t, int32_t dtype) const {
    const auto sizes = t.sizes();
    return empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
  }
  // Scratch memory from PyTorch's caching allocator, 512-byte aligned; free it in stream order by letting go of the tensor.
  Tensor scratch(int64_t bytes) const { return empty({bytes}, aoti_torch_dtype_uint8()); }

  void zero(void* at, size_t bytes) const {
    if (bytes == 0) return;
#ifndef SUBNET_KERNELS_EMULATED
    cuda_check(op_, cudaMemsetAsync(at, 0, bytes, stream_));
#else
    std::memset(at, 0, bytes);
#endif
  }

  // Multiprocessors of the device: grids that stride over their work are a small multiple of this.
  int processors() const {
#ifndef SUBNET_KERNELS_EMULATED
    static int known[64] = {};
    int& count = known[device_ & 63];
    if (count == 0) cuda_check(op_, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
#else
    return 3;
#endif
  }

  // Whether the device can start a launch before the one ahead of it has ended (compute capability 9.0).
  bool overlaps_launches() const {
#ifndef SUBNET_KERNELS_EMULATED
    static int known[64] = {};
    int& major = known[device_ & 63];
    if (major == 0) cuda_check(op_, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    return major >= 9;
#else
    return false;
#endif
  }

  // Shared memory that a block may ask for, in bytes; a little less where the kernel has some of its own.
  size_t shared_memory() const {
#ifndef SUBNET_KERNELS_EMULATED
    static int known[64] = {};
    int& bytes = known[device_ & 63];
    if (bytes == 0) cuda_check(op_, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    return static_cast<size_t>(bytes);
#else
    return 64 << 10;
#endif
  }

  // Runs a kernel on the stream; nothing is launched for an empty grid.
  template <class... P, class... A>
  void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A&&... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifndef SUBNET_KERNELS_EMULATED
    if (shared > 32 << 10) {  // a kernel gets 48 KB unasked, and what it declares itself counts
      cuda_check(op_, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared)));
    }
    kernel<<<grid, block, shared, stream_>>>(std::forward<A>(arguments)...);
    cuda_check(op_, cudaGetLastError());
#else
    (void)stream_;
    simt::run(grid, block, shared, [&] { kernel(arguments...); });
#endif
  }

  // Runs a kernel behind another one of the same op, whose blocks let it start early (let_next_start): it must wait_for_last
  // before it touches what that one writes, in every block, so that it never ends before that one has. Captured into a graph too.
  template <class... P, class... A>
  void launch_early(void (*kernel)(P...), dim3 grid, dim3 block, A&&... arguments) const {
#ifndef SUBNET_KERNELS_EMULATED
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (overlaps_launches()) {
      cudaLaunchAttribute early = {};
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = grid, config.blockDim = block, config.stream = stream_;
      config.attrs = &early, config.numAttrs = 1;
      cuda_check(op_, cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
      return;
    }
#endif
    launch(kernel, grid, block, 0, std::forward<A>(arguments)...);
  }

 private:
  const char* op_;
  int32_t device_;
  Stream stream_{};
#ifndef SUBNET_KERNELS_EMULATED
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// In a kernel ahead of one that Place::launch_early starts: that one may start once all blocks have come here or ended.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits for the end of the launch ahead and for what it has written; at once where that is past, or this was not started early.
__device__ __forceinline__ void wait_for_last() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------------------------------------- tensors

inline bool is_aligned(const void* at, size_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

// A contiguous tensor whose memory begins at a multiple of 16 bytes: itself, or a copy.
inline Tensor aligned(const Tensor& t) {
  const Tensor d = dense(t);
  return d.numel() == 0 || is_aligned(d.const_data_ptr(), 16) ? d : torch::stable::clone(d);
}

// An aligned stand-in for a tensor that an op writes: the tensor itself, or a copy of it that `flush` copies back.
class Target {
 public:
  explicit Target(const Tensor& t) : outer_(t), inner_(aligned(t)) {}
  const Tensor& tensor() const { return inner_; }
  void flush() {
    if (inner_.const_data_ptr() != outer_.const_data_ptr() || !outer_.is_contiguous()) torch::stable::copy_(outer_, inner_);
  }

 private:
  Tensor outer_, inner_;
};

// The four floating dtypes that the ops compute in. f(T{}) with T the C++ type of the dtype.
template <class F>
auto with_float(const char* op, const char* name, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Double, op, ": ", name, " must be float64, float32, float16 or bfloat16");
      return f(double{});
  }
}

// What a dtype is computed in: float, or double for double.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ----------------------------------------------------------------------------------------------------------- sums over threads

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// The sum over a block of at most 1024 threads, a multiple of 32, in a fixed order; thread 0 has it. `shared`: 32 T.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  value = warp_sum(value);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  __syncthreads();  // whoever used `shared` before is done
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < static_cast<int>(blockDim.x) / kWarpSize ? shared[lane] : T{};
    value = warp_sum(value);
  }
  return value;
}
