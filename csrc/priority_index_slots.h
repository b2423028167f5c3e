// Who comes first, or last, of those with the same index: a hash table in a workspace, at most half full, that a cooperative
// grid fills.
#pragma once

#include <cstdint>

#include "launch.h"

namespace r1v2_fast {

constexpr unsigned THREADS = 256;
constexpr unsigned long long NOBODY = ~0ull;

__device__ __forceinline__ int64_t grid_thread() { return static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * THREADS; }
__device__ __forceinline__ int64_t grid_warp() { return grid_thread() / 32; }
__device__ __forceinline__ int64_t grid_warps() { return grid_threads() / 32; }

using Position = unsigned long long;  // as atomics take it

struct Slot {
  unsigned long long index, position;
};

struct Slots {
  Slot* slots;
  int bits;

  static int bits_for(int64_t most) {
    int bits = 1;
    while (int64_t{1} << bits < 2 * most) ++bits;
    return bits;
  }
  __device__ void clear(unsigned long long position) const {
    for (int64_t i = grid_thread(); i < int64_t{1} << bits; i += grid_threads()) slots[i] = {NOBODY, position};
  }
  __device__ int64_t hashed(uint64_t index) const {
    return static_cast<int64_t>(index * 0x9E3779B97F4A7C15u >> (64 - bits));
  }
  __device__ Slot* claim(int64_t index) const {
    const int64_t mask = (int64_t{1} << bits) - 1;
    const auto key = static_cast<unsigned long long>(index);
    for (int64_t slot = hashed(key);; slot = (slot + 1) & mask) {
      const unsigned long long there = atomicCAS(&slots[slot].index, NOBODY, key);
      if (there == NOBODY || there == key) return slots + slot;
    }
  }
  __device__ const Slot* find(int64_t index) const {
    const int64_t mask = (int64_t{1} << bits) - 1;
    int64_t slot = hashed(index);
    while (slots[slot].index != static_cast<unsigned long long>(index)) slot = (slot + 1) & mask;
    return slots + slot;
  }
};

}  // namespace r1v2_fast
