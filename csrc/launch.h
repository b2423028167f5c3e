// How our kernels start: one call with clusters, cooperative grids and large shared memory, checked with op and shape.
// A .cu file includes this and nothing of CUDA itself: on a CPU, for tests, tests/native_checks/emulated_cuda.h stands
// in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_check.h"

#ifndef R1V2_FAST_EMULATED

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace r1v2_fast {

struct Launch {
  const char* op;
  int64_t count;  // elements: for the error
  unsigned grid;  // blocks, a multiple of `cluster`
  unsigned block;
  unsigned cluster = 1;
  size_t shared = 0;  // dynamic, bytes
  bool cooperative = false;
  void* stream = nullptr;
};

template <class... P>
void allow_shared(const char* op, int64_t count, void (*kernel)(P...), size_t bytes) {
  if (bytes <= 48 << 10) return;  // more has to be asked for, and a cache that leaves room for several blocks
  const auto ask = [&](cudaFuncAttribute what, int value) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), what, value), op, count);
  };
  ask(cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  ask(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

template <class... P, class... A>
void launch(const Launch& config, void (*kernel)(P...), A... arguments) {
  allow_shared(config.op, config.count, kernel, config.shared);
  cudaLaunchAttribute attributes[2];
  unsigned used = 0;
  if (config.cluster > 1) {
    attributes[used].id = cudaLaunchAttributeClusterDimension;
    attributes[used++].val.clusterDim = {config.cluster, 1, 1};
  }
  if (config.cooperative) {
    attributes[used].id = cudaLaunchAttributeCooperative;
    attributes[used++].val.cooperative = 1;
  }
  cudaLaunchConfig_t settings = {};
  settings.gridDim = dim3(config.grid);
  settings.blockDim = dim3(config.block);
  settings.dynamicSmemBytes = config.shared;
  settings.stream = static_cast<cudaStream_t>(config.stream);
  settings.attrs = attributes;
  settings.numAttrs = used;
  check_cuda(cudaLaunchKernelEx(&settings, kernel, static_cast<P>(arguments)...), config.op, config.count);
}

// Blocks that the current device holds at once: the most that a cooperative grid may have.
template <class... P>
unsigned resident_blocks(void (*kernel)(P...), unsigned block, size_t shared = 0) {
  const char* op = "resident_blocks";
  allow_shared(op, block, kernel, shared);
  int device = 0, processors = 0, each = 0;
  check_cuda(cudaGetDevice(&device), op, block);
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), op, block);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(block), shared), op, block);
  return static_cast<unsigned>(processors * each);
}

#ifdef __CUDACC__

// The block's dynamic shared memory.
template <class T = unsigned char>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// Of every thread of a cooperative grid.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

#endif

}  // namespace r1v2_fast

#endif
