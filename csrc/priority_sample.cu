#include <algorithm>

#include "cuda_check.h"
#include "priority_sample.h"

namespace r1v2_fast {
namespace {

template <typename T>
__global__ void race_keys_kernel(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    keys[i] = race_key(priorities[i], i, seed, alpha);
  }
}

}  // namespace

template <typename T>
void race_keys_cuda(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha, int device,
                    void* stream) {
  if (count == 0) return;
  const char* op = "priority_sample";
  const DeviceGuard guard(device, op, count);
  constexpr int threads = 256;
  const int64_t blocks = std::min<int64_t>((count + threads - 1) / threads, 1 << 20);
  race_keys_kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      priorities, keys, count, seed, alpha);
  check_cuda(cudaGetLastError(), op, count);
}

template void race_keys_cuda(const float*, double*, int64_t, uint64_t, double, int, void*);
template void race_keys_cuda(const double*, double*, int64_t, uint64_t, double, int, void*);

}  // namespace r1v2_fast
