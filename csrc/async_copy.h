// Bulk copies into shared memory, the mbarriers that tell when they have arrived, and clusters: PTX of sm_90 and newer.
// Below sm_90 the functions are empty, so that a file compiles for every architecture; its host side must not launch
// there. On a CPU, for tests, tests/native_checks/emulated_cuda.h stands in.
#pragma once

#include "launch.h"

#if !defined(R1V2_FAST_EMULATED) && defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define R1V2_FAST_ASYNC(...) asm volatile(__VA_ARGS__)
#else
#define R1V2_FAST_ASYNC(...)
#endif

namespace r1v2_fast {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// By one thread; then mbarrier_init_fence(), and a barrier of the block, before others use it.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  R1V2_FAST_ASYNC("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes it known to the copy engine, too.
__device__ __forceinline__ void mbarrier_init_fence() {
  R1V2_FAST_ASYNC("fence.mbarrier_init.release.cluster;" :: : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  R1V2_FAST_ASYNC("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// An arrival that also announces the bytes of copies to come, a multiple of 16 below 2^19.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  R1V2_FAST_ASYNC("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                  "r"(bytes) : "memory");
}

// Until the phase of this parity is over: 0 for the first, 1 for the second, ...
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  R1V2_FAST_ASYNC(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity) : "memory");
}

// global -> this block's shared memory; both and `bytes` are multiples of 16
__device__ __forceinline__ void bulk_load(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  R1V2_FAST_ASYNC("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                      shared_address(to)),
                  "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// Between a thread's own accesses to shared memory and a bulk copy over it.
__device__ __forceinline__ void fence_proxy_async() { R1V2_FAST_ASYNC("fence.proxy.async.shared::cta;" :: : "memory"); }

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
  R1V2_FAST_ASYNC("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
  R1V2_FAST_ASYNC("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The cluster's barrier in two halves; all threads of all its blocks call both. What was stored before the first is
// seen after the second. A block must not leave while another may still reach into its shared memory.
__device__ __forceinline__ void cluster_arrive() { R1V2_FAST_ASYNC("barrier.cluster.arrive.release;" :: : "memory"); }

__device__ __forceinline__ void cluster_wait() { R1V2_FAST_ASYNC("barrier.cluster.wait.acquire;" :: : "memory"); }

// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* of_rank(T* mine, unsigned rank) {
  uint64_t there = 0;
  R1V2_FAST_ASYNC("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(there);
}

}  // namespace r1v2_fast

#undef R1V2_FAST_ASYNC

#endif
