// Functions that the CPU and the GPU share: what is tested on one holds on the other.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#if defined(__CUDA_ARCH__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED
#endif
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")
#endif
