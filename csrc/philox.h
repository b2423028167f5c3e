// Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): random words as a pure function of
// (seed, index), so that any thread of any machine can make its own.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace r1v2_fast {

struct Words {
  uint32_t w[4];
};

// one round on the counter's words, then the keys' step
HOST_DEVICE void philox_round(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c[0], b = static_cast<uint64_t>(0xCD9E8D57u) * c[2];
  c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0;
  c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1;
  c[1] = static_cast<uint32_t>(b);
  c[3] = static_cast<uint32_t>(a);
}

// key = seed, counter = index; the upper half of the counter is zero
HOST_DEVICE Words philox(uint64_t index, uint64_t seed) {
  Words c = {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0}};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
UNROLLED
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) philox_round(c.w, k0, k1);
  return c;
}

// [0, 1) on the grid of 2^-53
HOST_DEVICE double uniform53(const Words& words) {
  return (words.w[1] * 0x1p21 + (words.w[0] >> 11)) * 0x1p-53;
}

}  // namespace r1v2_fast
