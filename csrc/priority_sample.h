// The exponential race of sample_by_priority, shared by the CPU and the GPU: what is tested on one holds on the other.
// Philox 4x32-10: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ inline
#else
#define HOST_DEVICE inline
#endif

namespace r1v2_fast {

struct Words {
  uint32_t w[4];
};

// key = seed, counter = index; the upper half of the counter is zero
HOST_DEVICE Words philox(uint64_t index, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// -log(u), u = (w1 2^32 + w0 + 1) 2^-64 in (0, 1]; near u = 1 from the complement, whose low bits a double keeps
HOST_DEVICE double exponential(uint64_t index, uint64_t seed) {
  const Words words = philox(index, seed);
  const double low = words.w[0], high = words.w[1];
  const double u = (high * 4294967296.0 + low + 1.0) * 0x1p-64;
  double e;
  if (u < 0.5) {
    e = -std::log(u);
  } else {
    const double high_c = 0xFFFFFFFFu - words.w[1], low_c = 0xFFFFFFFFu - words.w[0];
    e = -std::log1p(-(high_c * 4294967296.0 + low_c) * 0x1p-64);
  }
  return e < 0x1p-65 ? 0x1p-65 : e;
}

// log(E_i) - alpha log(p_i): the k smallest keys are a draw without replacement in proportion to p^alpha
HOST_DEVICE double race_key(double priority, uint64_t index, uint64_t seed, double alpha) {
  if (!(priority > 0.0)) return INFINITY;
  return std::log(exponential(index, seed)) - alpha * std::log(priority);
}

template <typename T>
void race_keys_cpu(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha);

template <typename T>
void race_keys_cuda(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha, int device,
                    void* stream);

}  // namespace r1v2_fast
