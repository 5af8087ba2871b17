// Which instruction set the kernels use, decided once and readable from Python.
#include <cstdlib>
#include <cstring>

#include "../common.h"

static Isa best() {
  __builtin_cpu_init();
#define HAS(feature) __builtin_cpu_supports(feature)
  if (HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq") && HAS("avx512vbmi") && HAS("avx512vbmi2") &&
      HAS("avx512vpopcntdq") && HAS("avx512bitalg") && HAS("gfni") && HAS("fma"))
    return Isa::avx512;
  if (HAS("avx2") && HAS("fma") && HAS("bmi") && HAS("bmi2") && HAS("popcnt")) return Isa::avx2;
#undef HAS
  return Isa::portable;
}

static const char* const kNames[] = {"portable", "avx2", "avx512"};

static Isa from_name(const char* name, Isa otherwise) {
  for (int i = 0; i < 3; i++)
    if (name && std::strcmp(name, kNames[i]) == 0) return static_cast<Isa>(i);
  return otherwise;
}

static Isa least(Isa a, Isa b) { return a < b ? a : b; }
static Isa current = least(best(), from_name(std::getenv("SUBNET_KERNELS_CPU"), Isa::avx512));

Isa isa() { return current; }

// The name of the instruction set in use, after switching to the named one if that is given and this processor has it.
extern "C" __attribute__((visibility("default"))) const char* subnet_kernels_isa(const char* request) {
  if (request) current = least(best(), from_name(request, current));
  return kNames[static_cast<int>(current)];
}
