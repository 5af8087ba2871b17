// A bank of masks, as a kernel reads it: a table of its blocks that travels with the launch.
#pragma once
#include "device.h"

struct BankBlock {
  const uint8_t* data;
  int32_t tasks, first;  // in it, and before it
};

// The bits of one task: its 64 bytes of tile t are first[t * step ...].
struct TaskLines {
  const uint8_t* first;
  int64_t step;
};

template <int Most>
struct BankTable {
  static constexpr int kMost = Most;
  BankBlock block[Most];
  int32_t blocks, tasks;

  __host__ __device__ TaskLines task(int index) const {
    int low = 0, high = blocks;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (block[middle].first <= index ? low : high) = middle;
    }
    return {block[low].data + int64_t{index - block[low].first} * kTileBytes, int64_t{block[low].tasks} * kTileBytes};
  }
};

// The blocks of a bank over n weights, checked; lives as long as the op, because it may hold copies.
class Bank {
 public:
  Bank(const Place& place, const std::vector<Tensor>& tensors, int64_t n) {
    for (const Tensor& t : tensors) {
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.dim() == 3 && t.size(0) == tiles(n) && t.size(1) <= kBlockTasks &&
                          t.size(2) == kTileBytes,
                      place.op(), ": a block of the bank must be uint8 (", tiles(n), ", at most ", kBlockTasks, ", ", kTileBytes,
                      ") for ", n, " weights");
      place.check("bank", t);
      if (t.size(1) == 0) continue;
      blocks_.push_back(aligned(t));
      tasks_ += t.size(1);
    }
    STD_TORCH_CHECK(blocks_.size() <= kMostBlocks, place.op(), ": a bank may have at most ", kMostBlocks, " blocks, got ",
                    blocks_.size());
  }

  int64_t tasks() const { return tasks_; }

  // f(table) with the smallest table that holds the bank: what a launch carries costs time.
  template <class F>
  void with_table(const F& f) const {
    if (blocks_.size() <= 4) return f(table<4>());
    if (blocks_.size() <= 48) return f(table<48>());
    f(table<kMostBlocks>());
  }

 private:
  static constexpr size_t kMostBlocks = 1024;  // 16 KB of the 32 that a launch may carry

  template <int Most>
  BankTable<Most> table() const {
    BankTable<Most> result{};
    for (const Tensor& t : blocks_) {
      result.block[result.blocks++] = {static_cast<const uint8_t*>(t.const_data_ptr()), static_cast<int32_t>(t.size(1)),
                                       result.tasks};
      result.tasks += static_cast<int32_t>(t.size(1));
    }
    return result;
  }

  std::vector<Tensor> blocks_;
  int64_t tasks_ = 0;
};
