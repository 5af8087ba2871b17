// A bank of masks, as the CPU ops read it.
#pragma once
#include <algorithm>
#include <vector>

#include "tensors.h"

struct Block {
  const uint8_t* data;
  int64_t k, first;  // tasks in it, and before it
};

struct Bank {
  std::vector<Tensor> tensors;  // keeps the memory of the blocks
  std::vector<Block> blocks;
  int64_t tasks = 0;

  // The bits of one task: its 64 bytes of the first tile, and how many bytes on those of the next tile are.
  struct Lines {
    const uint8_t* first;
    int64_t step;
  };
  Lines task(int64_t index) const {
    auto block = std::upper_bound(blocks.begin(), blocks.end(), index, [](int64_t i, const Block& b) { return i < b.first; }) - 1;
    return {block->data + (index - block->first) * kTileBytes, block->k * kTileBytes};
  }
};

inline Bank read_bank(const char* op, const std::vector<Tensor>& tensors, int64_t n) {
  Bank bank;
  for (const Tensor& t : tensors) {
    const Tensor block = dense(t);
    STD_TORCH_CHECK(block.scalar_type() == ScalarType::Byte && block.dim() == 3 && block.size(0) == tiles(n) &&
                        block.size(1) <= kBlockTasks && block.size(2) == kTileBytes,
                    op, ": a block of the bank must be uint8 (", tiles(n), ", at most ", kBlockTasks, ", ", kTileBytes, ") for ",
                    n, " weights");
    bank.tensors.push_back(block);
    bank.blocks.push_back({static_cast<const uint8_t*>(block.const_data_ptr()), block.size(1), bank.tasks});
    bank.tasks += block.size(1);
  }
  return bank;
}
