// The processor as a machine of CUDA threads, for tests (simt.h): fibres, barriers and the exchanges of warps.
#include "simt.h"

#include <sys/mman.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifndef __x86_64__
#error "the emulation switches stacks by hand, on x86-64 only"
#endif

namespace simt {

dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 128 << 10;  // bytes of a fibre's stack
constexpr int kWarp = 32;

// What the processor's calling convention keeps over a call goes to the stack; then the stacks are swapped.
__attribute__((naked, noinline)) void swap_stacks(void** /*from*/, void* /*to*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

struct Fibre {
  void* stack_pointer;
  dim3 index;
  int number;
  bool ended, blocked;
  unsigned mask;               // of the exchange that it waits in, else 0
  uint64_t given, got[kWarp];  // its value, and what the exchange gave
};

std::mutex busy;  // autograd calls kernels from threads of its own
std::vector<Fibre> fibres;
std::vector<void*> stacks;
std::vector<unsigned char> shared_memory;
void* scheduler;
Fibre* current;
const std::function<void()>* kernel;
int alive, waiting, said_yes, last_yes;  // of the block and its barrier
const char* error = nullptr;
uint64_t chance = 0x9e3779b97f4a7c15;

unsigned draw(unsigned below) {
  chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
  return static_cast<unsigned>(chance >> 33) % below;
}

// Ends the kernel with an error: only the scheduler's stack can be unwound.
[[noreturn]] void fail(const char* why) {
  error = why;
  for (;;) swap_stacks(&current->stack_pointer, scheduler);
}

void yield() {
  current->blocked = true;
  while (current->blocked) swap_stacks(&current->stack_pointer, scheduler);
}

void open_barrier() {
  last_yes = said_yes;
  waiting = said_yes = 0;
  for (Fibre& f : fibres)
    if (!f.mask) f.blocked = false;
}

// Completes the exchange of a mask within a warp if every lane of it that still runs has come.
bool complete(int warp, unsigned mask) {
  const int first = warp * kWarp, end = std::min(first + kWarp, static_cast<int>(fibres.size()));
  uint64_t all[kWarp] = {};
  for (int i = first; i < end; i++)
    if (mask >> (i - first) & 1 && !fibres[i].ended) {
      if (fibres[i].mask != mask) return false;
      all[i - first] = fibres[i].given;
    }
  for (int i = first; i < end; i++)
    if (mask >> (i - first) & 1 && !fibres[i].ended) {
      std::memcpy(fibres[i].got, all, sizeof all);
      fibres[i].mask = 0;
      fibres[i].blocked = false;
    }
  return true;
}

void enter() {
  (*kernel)();
  current->ended = true;
  alive--;
  if (alive && waiting == alive) open_barrier();
  const int warp = current->number / kWarp;
  for (int i = warp * kWarp; i < std::min((warp + 1) * kWarp, static_cast<int>(fibres.size())); i++)
    if (fibres[i].mask) complete(warp, fibres[i].mask);
  for (;;) swap_stacks(&current->stack_pointer, scheduler);
}

void run_block(unsigned threads) {
  fibres.resize(threads);
  while (stacks.size() < threads) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("emulated kernel: no memory for the stack of a thread");
    stacks.push_back(stack);
  }
  std::vector<Fibre*> order(threads);
  for (unsigned i = 0; i < threads; i++) {
    Fibre& f = fibres[i];
    f = {};
    f.number = static_cast<int>(i);
    f.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    auto* top = reinterpret_cast<void**>(static_cast<char*>(stacks[i]) + kStack) - 2;
    top[0] = reinterpret_cast<void*>(&enter);  // where the first switch returns to, with the stack aligned as after a call
    top[1] = nullptr;
    f.stack_pointer = top - 6;
    order[i] = &f;
  }
  for (unsigned i = threads; i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
  alive = static_cast<int>(threads), waiting = said_yes = 0;
  while (alive) {
    bool moved = false;
    for (Fibre* f : order) {
      if (f->ended || f->blocked) continue;
      moved = true;
      current = f;
      thread_index = f->index;
      swap_stacks(&scheduler, f->stack_pointer);
      if (error) throw std::runtime_error(std::string("emulated kernel: ") + std::exchange(error, nullptr));
    }
    if (!moved) throw std::runtime_error("emulated kernel: its threads wait for each other at different barriers");
  }
}

}  // namespace

int lane() { return current->number % kWarp; }

void* dynamic_shared() { return shared_memory.data(); }

int barrier(bool yes) {
  said_yes += yes;
  if (++waiting == alive)
    open_barrier();
  else
    yield();
  return last_yes;
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  if (!(mask >> lane() & 1)) fail("a lane calls a warp function without being in its mask");
  current->mask = mask;
  current->given = value;
  if (!complete(current->number / kWarp, mask)) yield();
  return current->got;
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(busy);
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("emulated kernel: a block must have 1 to 1024 threads");
  if (shared > 227 << 10) throw std::runtime_error("emulated kernel: more shared memory than a GPU has");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("emulated kernel: a grid's y and z end at 65535");
  grid_size = grid, block_size = block;
  shared_memory.assign(shared + 16, 0xa5);  // what nobody wrote shows
  kernel = &body;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        block_index = dim3(x, y, z);
        run_block(threads);
      }
}

}  // namespace simt

// The tests ask the CPU library which instruction set it uses; this one has one only.
extern "C" __attribute__((visibility("default"))) const char* subnet_kernels_isa(const char*) { return "portable"; }
