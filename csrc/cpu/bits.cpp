// pack, unpack, count, union_, stats, overlap: masks as bits, and what is counted on them.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../tensors.h"

namespace {

constexpr int64_t kPackGrain = 8 * kGrain / kTile;  // tiles a thread packs or unpacks: one byte a weight is quick
constexpr int64_t kCountGrain = 256 * 1024;         // bytes of bits a thread counts
constexpr int64_t kOverlapTasks = 4;                // a step of overlap compares so many tasks with as many others

// ---------------------------------------------------------------------------------------------------------------- pack
// n bools to mask_bytes(n) bytes of bits.

// Eight bytes of 0 or 1 to eight bits; any other value counts as 1.
static inline uint8_t pack_eight(uint64_t x) {
  x |= x >> 4, x |= x >> 2, x |= x >> 1;
  return static_cast<uint8_t>(((x & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
}

static void pack_portable(const uint8_t* mask, uint8_t* bits, int64_t n) {
  for (int64_t i = 0; i < n / 8; i++) bits[i] = pack_eight(load_word(mask + i * 8));
  std::memset(bits + n / 8, 0, mask_bytes(n) - n / 8);
  for (int64_t i = n / 8 * 8; i < n; i++) bits[i >> 3] |= static_cast<uint8_t>((mask[i] != 0) << (i & 7));
}

SK_AVX2 static void pack_avx2(const uint8_t* mask, uint8_t* bits, int64_t n) {
  const __m256i zero = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + i + 32));
    const uint32_t low = ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, zero)),
                   high = ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(b, zero));
    store_word(bits + i / 8, low | uint64_t{high} << 32);
  }
  std::memset(bits + i / 8, 0, mask_bytes(n) - i / 8);
  for (; i < n; i++) bits[i >> 3] |= static_cast<uint8_t>((mask[i] != 0) << (i & 7));
}

SK_AVX512 static void pack_avx512(const uint8_t* mask, uint8_t* bits, int64_t n) {
  for (int64_t i = 0; i < mask_bytes(n) * 8; i += 64) {
    const uint64_t here = i < n ? low_bits(n - i) : 0;
    const __m512i v = _mm512_maskz_loadu_epi8(here, mask + i);
    store_word(bits + i / 8, _mm512_test_epi8_mask(v, v));
  }
}

// -------------------------------------------------------------------------------------------------------------- unpack
// Bits to n bools.

static void unpack_portable(const uint8_t* bits, uint8_t* mask, int64_t n) {
  for (int64_t i = 0; i < n / 8; i++) {
    const uint64_t x = bits[i] * 0x0101010101010101u & 0x8040201008040201u;
    store_word(mask + i * 8, (x + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u);
  }
  for (int64_t i = n / 8 * 8; i < n; i++) mask[i] = is_open(bits, i);
}

SK_AVX2 static void unpack_avx2(const uint8_t* bits, uint8_t* mask, int64_t n) {
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i select = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    int32_t word;
    std::memcpy(&word, bits + i / 8, 4);
    const __m256i x = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), spread), select);
    const __m256i open = _mm256_and_si256(_mm256_cmpeq_epi8(x, select), _mm256_set1_epi8(1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + i), open);
  }
  for (; i < n; i++) mask[i] = is_open(bits, i);
}

SK_AVX512 static void unpack_avx512(const uint8_t* bits, uint8_t* mask, int64_t n) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) _mm512_storeu_si512(mask + i, _mm512_maskz_set1_epi8(load_word(bits + i / 8), 1));
  if (i < n) _mm512_mask_storeu_epi8(mask + i, low_bits(n - i), _mm512_maskz_set1_epi8(load_word(bits + i / 8), 1));
}

// -------------------------------------------------------------------------------------------------------------- counts
// What is set in a, and in a & b, over n bytes of bits.

struct Counts {
  int64_t all, both;  // bits set in a; in a & b
};

static inline int64_t ones_portable(uint64_t x) {
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  return static_cast<int64_t>(((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
}

// The last n < 8 bytes as a word.
static inline uint64_t last_word(const uint8_t* p, int64_t n) {
  uint64_t word = 0;
  std::memcpy(&word, p, n);
  return word;
}

static Counts count_portable(const uint8_t* a, const uint8_t* b, int64_t n) {
  Counts c{0, 0};
  for (int64_t i = 0; i < n; i += 8) {
    const uint64_t x = i + 8 <= n ? load_word(a + i) : last_word(a + i, n - i);
    const uint64_t y = i + 8 <= n ? load_word(b + i) : last_word(b + i, n - i);
    c.all += ones_portable(x), c.both += ones_portable(x & y);
  }
  return c;
}

SK_AVX2 static Counts count_avx2(const uint8_t* a, const uint8_t* b, int64_t n) {
  Counts c{0, 0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint64_t x = load_word(a + i);
    c.all += _mm_popcnt_u64(x), c.both += _mm_popcnt_u64(x & load_word(b + i));
  }
  if (i < n) {
    const uint64_t x = last_word(a + i, n - i);
    c.all += _mm_popcnt_u64(x), c.both += _mm_popcnt_u64(x & last_word(b + i, n - i));
  }
  return c;
}

SK_AVX512 static Counts count_avx512(const uint8_t* a, const uint8_t* b, int64_t n) {
  __m512i all = _mm512_setzero_si512(), both = all;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i x = _mm512_loadu_si512(a + i), y = _mm512_loadu_si512(b + i);
    all = _mm512_add_epi64(all, _mm512_popcnt_epi64(x));
    both = _mm512_add_epi64(both, _mm512_popcnt_epi64(_mm512_and_si512(x, y)));
  }
  if (i < n) {
    const __m512i x = _mm512_maskz_loadu_epi8(low_bits(n - i), a + i), y = _mm512_maskz_loadu_epi8(low_bits(n - i), b + i);
    all = _mm512_add_epi64(all, _mm512_popcnt_epi64(x));
    both = _mm512_add_epi64(both, _mm512_popcnt_epi64(_mm512_and_si512(x, y)));
  }
  return {_mm512_reduce_add_epi64(all), _mm512_reduce_add_epi64(both)};
}

// -------------------------------------------------------------------------------------------------------------- union_
// to |= from over n bytes of bits.

static inline __attribute__((always_inline)) void unite(const uint8_t* from, uint8_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] |= from[i];
}
static void union_portable(const uint8_t* from, uint8_t* to, int64_t n) { unite(from, to, n); }
SK_AVX2 static void union_avx2(const uint8_t* from, uint8_t* to, int64_t n) { unite(from, to, n); }
SK_AVX512 static void union_avx512(const uint8_t* from, uint8_t* to, int64_t n) { unite(from, to, n); }

// ------------------------------------------------------------------------------------------------------------- overlap
// Up to four tasks with four others, over every tile of their blocks: both[i * 4 + j] += open in task i and in task j.

// Where the bits of a task lie in its block: the first tile, and the bytes from one tile to the next.
struct Rows {
  const uint8_t* first;
  int64_t step, tasks;
};

static void overlap_portable(Rows a, Rows b, int64_t tiles, int64_t* both) {
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t i = 0; i < a.tasks; i++)
      for (int64_t j = 0; j < b.tasks; j++) {
        const uint8_t *x = a.first + t * a.step + i * kTileBytes, *y = b.first + t * b.step + j * kTileBytes;
        for (int64_t w = 0; w < kTileBytes; w += 8)
          both[i * kOverlapTasks + j] += ones_portable(load_word(x + w) & load_word(y + w));
      }
}

SK_AVX2 static void overlap_avx2(Rows a, Rows b, int64_t tiles, int64_t* both) {
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t i = 0; i < a.tasks; i++)
      for (int64_t j = 0; j < b.tasks; j++) {
        const uint8_t *x = a.first + t * a.step + i * kTileBytes, *y = b.first + t * b.step + j * kTileBytes;
        int64_t sum = 0;
        for (int64_t w = 0; w < kTileBytes; w += 8) sum += _mm_popcnt_u64(load_word(x + w) & load_word(y + w));
        both[i * kOverlapTasks + j] += sum;
      }
}

SK_AVX512 static void overlap_avx512(Rows a, Rows b, int64_t tiles, int64_t* both) {
  __m512i sums[kOverlapTasks][kOverlapTasks];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_si512();
  // Tasks beyond the last one read the last one again, so that the loop below is unrolled; their sums are dropped.
  const int64_t last_a = a.tasks - 1, last_b = b.tasks - 1;
  for (int64_t t = 0; t < tiles; t++) {
    __m512i x[kOverlapTasks], y[kOverlapTasks];
    for (int64_t i = 0; i < kOverlapTasks; i++) {
      x[i] = _mm512_loadu_si512(a.first + t * a.step + (i < last_a ? i : last_a) * kTileBytes);
      y[i] = _mm512_loadu_si512(b.first + t * b.step + (i < last_b ? i : last_b) * kTileBytes);
    }
    for (int64_t i = 0; i < kOverlapTasks; i++)
      for (int64_t j = 0; j < kOverlapTasks; j++)
        sums[i][j] = _mm512_add_epi64(sums[i][j], _mm512_popcnt_epi64(_mm512_and_si512(x[i], y[j])));
  }
  for (int64_t i = 0; i < a.tasks; i++)
    for (int64_t j = 0; j < b.tasks; j++) both[i * kOverlapTasks + j] += _mm512_reduce_add_epi64(sums[i][j]);
}

// ----------------------------------------------------------------------------------------------------------------- ops

static Tensor pack_cpu(const Tensor& mask_) {
  const Tensor mask = dense(mask_);
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "pack: mask must be bool");
  const int64_t n = mask.numel();
  Tensor bits = new_vector(mask_bytes(n), aoti_torch_dtype_uint8());
  if (n == 0) return bits;
  const auto* from = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const auto kernel = for_isa(pack_portable, pack_avx2, pack_avx512);
  parallel(tiles(n), kPackGrain, [&](int64_t begin, int64_t end) {
    kernel(from + begin * kTile, to + begin * kTileBytes, std::min(n, end * kTile) - begin * kTile);
  });
  return bits;
}

static Tensor unpack_cpu(const Tensor& bits_, std::vector<int64_t> shape) {
  const Tensor bits = dense(bits_);
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  check_bits("unpack", bits, n);
  Tensor mask = new_dense(shape.data(), static_cast<int64_t>(shape.size()), aoti_torch_dtype_bool());
  if (n == 0) return mask;
  const auto* from = static_cast<const uint8_t*>(bits.const_data_ptr());
  auto* to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const auto kernel = for_isa(unpack_portable, unpack_avx2, unpack_avx512);
  parallel(tiles(n), kPackGrain, [&](int64_t begin, int64_t end) {
    kernel(from + begin * kTileBytes, to + begin * kTile, std::min(n, end * kTile) - begin * kTile);
  });
  return mask;
}

static Counts count_bytes(const uint8_t* a, const uint8_t* b, int64_t n) {
  const auto kernel = for_isa(count_portable, count_avx2, count_avx512);
  std::atomic<int64_t> all{0}, both{0};  // whole numbers: the order of the threads does not show
  parallel(n, kCountGrain, [&](int64_t begin, int64_t end) {
    const Counts c = kernel(a + begin, b + begin, end - begin);
    all += c.all, both += c.both;
  });
  return {all, both};
}

static Tensor count_cpu(const Tensor& bits_) {
  const Tensor bits = dense(bits_);
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte, "count: bits must be uint8");
  const auto* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  Tensor result = new_dense(nullptr, 0, aoti_torch_dtype_int64());
  *static_cast<int64_t*>(result.mutable_data_ptr()) = count_bytes(data, data, bits.numel()).all;
  return result;
}

static void union_cpu(Tensor owned, const Tensor& bits_) {
  const Tensor bits = dense(bits_), target = dense(owned);
  STD_TORCH_CHECK(owned.scalar_type() == ScalarType::Byte && bits.scalar_type() == ScalarType::Byte,
                  "union_: owned and bits must be uint8");
  STD_TORCH_CHECK(owned.numel() == bits.numel(), "union_: owned has ", owned.numel(), " bytes, bits ", bits.numel());
  auto* to = static_cast<uint8_t*>(target.mutable_data_ptr());
  const auto* from = static_cast<const uint8_t*>(bits.const_data_ptr());
  const auto kernel = for_isa(union_portable, union_avx2, union_avx512);
  parallel(bits.numel(), kCountGrain, [&](int64_t begin, int64_t end) { kernel(from + begin, to + begin, end - begin); });
  if (!owned.is_contiguous()) torch::stable::copy_(owned, target);
}

static Tensor stats_cpu(const Tensor& bits_, const Tensor& owned_) {
  const Tensor bits = dense(bits_), owned = dense(owned_);
  STD_TORCH_CHECK(owned.scalar_type() == ScalarType::Byte && bits.scalar_type() == ScalarType::Byte,
                  "stats: bits and owned must be uint8");
  STD_TORCH_CHECK(owned.numel() == bits.numel(), "stats: bits have ", bits.numel(), " bytes, owned ", owned.numel());
  const Counts c = count_bytes(static_cast<const uint8_t*>(bits.const_data_ptr()),
                               static_cast<const uint8_t*>(owned.const_data_ptr()), bits.numel());
  Tensor result = new_vector(3, aoti_torch_dtype_int64());
  auto* out = static_cast<int64_t*>(result.mutable_data_ptr());
  out[0] = c.all, out[1] = c.all - c.both, out[2] = c.both;
  return result;
}

static Tensor overlap_cpu(std::vector<Tensor> bank) {
  struct Group {
    Rows rows;
    int64_t task;  // the first of the group, counted over the bank
  };
  std::vector<Group> groups;
  int64_t tasks = 0, tiles = -1;
  for (Tensor& block : bank) {
    block = dense(block);
    STD_TORCH_CHECK(block.scalar_type() == ScalarType::Byte && block.dim() == 3 && block.size(2) == kTileBytes,
                    "overlap: a block of a bank must be uint8 (tiles, tasks, ", kTileBytes, ")");
    if (tiles < 0) tiles = block.size(0);
    STD_TORCH_CHECK(block.size(0) == tiles, "overlap: blocks must have as many tiles as the first, ", tiles, ", got ",
                    block.size(0));
    const int64_t k = block.size(1);
    const auto* data = static_cast<const uint8_t*>(block.const_data_ptr());
    for (int64_t i = 0; i < k; i += kOverlapTasks)
      groups.push_back({{data + i * kTileBytes, k * kTileBytes, std::min(k - i, kOverlapTasks)}, tasks + i});
    tasks += k;
  }
  const int64_t sizes[] = {tasks, tasks};
  Tensor result = new_dense(sizes, 2, aoti_torch_dtype_int64());
  auto* out = static_cast<int64_t*>(result.mutable_data_ptr());
  const auto kernel = for_isa(overlap_portable, overlap_avx2, overlap_avx512);
  const auto count = static_cast<int64_t>(groups.size());
  const int64_t words = std::max<int64_t>(1, std::max<int64_t>(tiles, 0) * 8 * kOverlapTasks * kOverlapTasks);
  parallel(count * count, 1 + 2 * kGrain / words, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; pair++) {
      const Group &a = groups[pair / count], &b = groups[pair % count];
      if (b.task < a.task) continue;  // symmetric
      int64_t both[kOverlapTasks * kOverlapTasks] = {};
      kernel(a.rows, b.rows, tiles, both);
      for (int64_t i = 0; i < a.rows.tasks; i++)
        for (int64_t j = 0; j < b.rows.tasks; j++) {
          const int64_t p = a.task + i, q = b.task + j;
          out[p * tasks + q] = out[q * tasks + p] = both[i * kOverlapTasks + j];
        }
    }
  });
  return result;
}

}  // namespace

int64_t ones(const uint8_t* bits, int64_t n) { return for_isa(count_portable, count_avx2, count_avx512)(bits, bits, n).all; }

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_cpu));
  m.impl("unpack", TORCH_BOX(&unpack_cpu));
  m.impl("count", TORCH_BOX(&count_cpu));
  m.impl("union_", TORCH_BOX(&union_cpu));
  m.impl("stats", TORCH_BOX(&stats_cpu));
  m.impl("overlap", TORCH_BOX(&overlap_cpu));
}
