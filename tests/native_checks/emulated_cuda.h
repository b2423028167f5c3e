// Runs our CUDA kernels on the CPU, for tests: g++ compiles the .cu file as C++, and every thread is a fiber.
//
//   g++ -x c++ -std=c++17 -fno-strict-aliasing -DR1V2_FAST_EMULATED -include tests/native_checks/emulated_cuda.h
//       -Itests/native_checks -Icsrc csrc/op.cu ...
//
// What a .cu file has to keep to:
//   * it includes "launch.h" (and "async_copy.h"), nothing of CUDA itself: launch.h brings the runtime, bf16, fp16;
//   * kernels start through launch(Launch{...}, kernel, arguments...), never <<<>>>, in one dimension;
//   * shared memory is dynamic: a struct S, a launch with .shared = sizeof(S), and shared_memory<S>() in the kernel.
//     __shared__ does not compile here: blocks of a cluster or of a cooperative grid live at once;
//   * a loop that waits for another thread's store calls __nanosleep(): nothing else lets that thread run;
//   * asynchronous copies, mbarriers, clusters through async_copy.h; the grid's barrier through grid_barrier().
//
// What a test may set:
//   * emulated::seed(s), from ctypes emulated_seed(s): 0 runs threads and blocks in order; any other value shuffles
//     them, lets blocks begin late, and makes a bulk copy happen at once or as late as possible;
//   * emulated::resident: what resident_blocks() answers.
//
// What aborts, with a message: a deadlock (threads at different barriers or gone before one, an mbarrier that never
// completes), lanes of a warp at different operations, a lane outside its own mask, misaligned bulk copies and
// mbarriers, copies out of shared memory's bounds, arrivals or bytes that an mbarrier does not expect, shared memory of
// a block that has not begun or has left. Misaligned vectors need -fsanitize=undefined -fno-sanitize-recover=undefined,
// wild accesses -fsanitize=address: shared memory is a heap block of just its size.
// Not modelled: memory order (a __threadfence does nothing), contraction of a * b + c (write fmaf), a thread overtaken
// between barriers, the error of approximate intrinsics.
#pragma once

#include <array>
#include <cmath>
#include <tuple>

#include "emulated_fibers.h"
#include "emulated_half.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
inline uint3 threadIdx, blockIdx, blockDim{1, 1, 1}, gridDim{1, 1, 1};
inline constexpr int warpSize = 32;

#define R1V2_FAST_VECTOR(name, type, align2, align4)               \
  struct alignas(align2) name##2 { type x, y; };                   \
  struct alignas(align4) name##4 { type x, y, z, w; };             \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
R1V2_FAST_VECTOR(float, float, 8, 16)
R1V2_FAST_VECTOR(int, int, 8, 16)
R1V2_FAST_VECTOR(uint, unsigned, 8, 16)
R1V2_FAST_VECTOR(ushort, unsigned short, 4, 8)
R1V2_FAST_VECTOR(uchar, unsigned char, 2, 4)
R1V2_FAST_VECTOR(double, double, 16, 16)
R1V2_FAST_VECTOR(longlong, long long, 16, 16)
R1V2_FAST_VECTOR(ulonglong, unsigned long long, 16, 16)
#undef R1V2_FAST_VECTOR

// the host side of the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {  // an H100's
  return *value = std::array{132, 9, 227 << 10}[which], cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  return std::memset(to, value, bytes), cudaSuccess;
}

// intrinsics

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}

template <class To, class From>
To r1v2_fast_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float x) { return r1v2_fast_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return r1v2_fast_bits<unsigned>(x); }
inline float __int_as_float(int x) { return r1v2_fast_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return r1v2_fast_bits<float>(x); }
inline long long __double_as_longlong(double x) { return r1v2_fast_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return r1v2_fast_bits<double>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
template <class T, class U>
constexpr auto min(T a, U b) {
  return b < a ? b : a;
}
template <class T, class U>
constexpr auto max(T a, U b) {
  return a < b ? b : a;
}

// atomics: fibers do not interrupt each other
template <class T, class U>
T atomicExch(T* at, U value) {
  return std::exchange(*at, static_cast<T>(value));
}
template <class T, class U>
T atomicAdd(T* at, U value) {
  return atomicExch(at, static_cast<T>(*at + static_cast<T>(value)));
}
template <class T, class U>
T atomicMax(T* at, U value) {
  return atomicExch(at, std::max(*at, static_cast<T>(value)));
}
template <class T, class U>
T atomicMin(T* at, U value) {
  return atomicExch(at, std::min(*at, static_cast<T>(value)));
}
template <class T, class U>
T atomicOr(T* at, U value) {
  return atomicExch(at, static_cast<T>(*at | static_cast<T>(value)));
}
template <class T, class U>
T atomicAnd(T* at, U value) {
  return atomicExch(at, static_cast<T>(*at & static_cast<T>(value)));
}
template <class T, class U, class W>
T atomicCAS(T* at, U expected, W value) {
  return *at == static_cast<T>(expected) ? atomicExch(at, value) : *at;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {
  ++r1v2_fast::emulated::spins;
  r1v2_fast::emulated::leave();
}

// the block's barrier

inline void __syncthreads() {
  r1v2_fast::emulated::meet(r1v2_fast::emulated::current->block->barrier, "__syncthreads");
}
inline int r1v2_fast_votes(bool vote, const char* what) {
  auto& barrier = r1v2_fast::emulated::current->block->barrier;
  const uint32_t generation = r1v2_fast::emulated::meet(barrier, what, vote);
  return static_cast<int>(barrier.votes[generation & 1]);
}
inline int __syncthreads_count(int p) { return r1v2_fast_votes(p != 0, "__syncthreads_count"); }
inline int __syncthreads_or(int p) { return r1v2_fast_votes(p != 0, "__syncthreads_or") > 0; }
inline int __syncthreads_and(int p) { return r1v2_fast_votes(p == 0, "__syncthreads_and") == 0; }

// the warp's

namespace r1v2_fast::emulated {

struct Lanes {  // what the lanes of `mask` brought
  Barrier* barrier;
  uint32_t generation, mask;
  template <class T>
  T at(uint32_t lane) const {
    T value;
    std::memcpy(&value, &barrier->slot[generation & 1][lane], sizeof value);
    return value;
  }
};

template <class T>
Lanes exchange(uint32_t mask, T value, const char* what) {
  static_assert(sizeof(T) <= 8, "a warp exchanges up to 8 bytes a lane");
  Fiber& self = *current;
  const uint32_t lane = self.thread % 32, threads = blockDim.x - self.thread / 32 * 32;
  if (threads < 32) mask &= (1u << threads) - 1;
  if (!(mask >> lane & 1)) fail("%s: lane %u is not in its mask %08x", what, lane, mask);
  Barrier& barrier = self.block->warps[self.thread / 32][mask];
  barrier.expected = static_cast<uint32_t>(__builtin_popcount(mask));
  std::memcpy(&barrier.slot[barrier.generation & 1][lane], &value, sizeof value);
  return {&barrier, meet(barrier, what), mask};
}

// The value of lane `from`, one's own where it lies outside the segment of `width` lanes.
template <class T>
T shuffled_value(uint32_t mask, T value, int from, int width, const char* what) {
  const int lane = static_cast<int>(current->thread % 32);
  const Lanes lanes = exchange(mask, value, what);
  if (from / width != lane / width || from < 0) return value;
  if (!(lanes.mask >> from & 1)) fail("%s reads lane %d, which is not in its mask %08x", what, from, lanes.mask);
  return lanes.at<T>(static_cast<uint32_t>(from));
}

template <class T, class F>
T reduced(uint32_t mask, T value, const char* what, F combine) {
  const Lanes lanes = exchange(mask, value, what);
  const auto first = static_cast<uint32_t>(__builtin_ctz(lanes.mask));
  T result = lanes.at<T>(first);
  for (uint32_t lane = first + 1; lane < 32; ++lane) {
    if (lanes.mask >> lane & 1) result = combine(result, lanes.at<T>(lane));
  }
  return result;
}

}  // namespace r1v2_fast::emulated

inline void __syncwarp(unsigned mask = ~0u) { r1v2_fast::emulated::exchange(mask, 0, "__syncwarp"); }
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return r1v2_fast::emulated::shuffled_value(mask, value, lane / width * width + from % width, width, "__shfl_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int from = static_cast<int>(threadIdx.x % 32) - static_cast<int>(by);
  return r1v2_fast::emulated::shuffled_value(mask, value, from, width, "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int from = static_cast<int>(threadIdx.x % 32 + by);
  return r1v2_fast::emulated::shuffled_value(mask, value, from, width, "__shfl_down_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
  const int from = static_cast<int>(threadIdx.x % 32) ^ by;
  return r1v2_fast::emulated::shuffled_value(mask, value, from, width, "__shfl_xor_sync");
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  const uint32_t bit = p != 0 ? 1u << threadIdx.x % 32 : 0;
  return r1v2_fast::emulated::reduced(mask, bit, "__ballot_sync", [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __any_sync(unsigned mask, int p) {
  return r1v2_fast::emulated::reduced(mask, int{p != 0}, "__any_sync", [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int p) {
  return r1v2_fast::emulated::reduced(mask, int{p != 0}, "__all_sync", [](int a, int b) { return a & b; });
}
template <class T>
T __reduce_add_sync(unsigned mask, T v) {
  return r1v2_fast::emulated::reduced(mask, v, "__reduce_add_sync", [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T v) {
  return r1v2_fast::emulated::reduced(mask, v, "__reduce_max_sync", [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T v) {
  return r1v2_fast::emulated::reduced(mask, v, "__reduce_min_sync", [](T a, T b) { return std::min(a, b); });
}

#include "emulated_launch.h"
