// The exponential race: index i arrives at E_i / p_i^alpha, E_i exponential, and the k first are a draw without replacement in
// proportion to p^alpha (Efraimidis and Spirakis, 2006). Keys are the times' logarithms, so that no ratio of priorities
// leaves a double.
#pragma once

#include <cmath>
#include <cstdint>

#include "fixed_math.h"
#include "philox.h"

namespace r1v2_fast {

constexpr double INFINITE_KEY = __builtin_huge_val();

HOST_DEVICE bool drawable(double priority) { return (priority > 0.0) & (priority < INFINITE_KEY); }

// -log(u), u = (w1 2^32 + w0 + 1) 2^-64 in (0, 1]; near u = 1 from the complement, whose low bits a double keeps
HOST_DEVICE double exponential(const Words& words) {
  const double low = words.w[0], high = words.w[1];
  const double u = fused(high, 0x1p32, low + 1.0) * 0x1p-64;
  if (u < 0.75) return -fixed_log(u);
  const double high_c = 0xFFFFFFFFu - words.w[1], low_c = 0xFFFFFFFFu - words.w[0];
  const double e = -log1p_near_zero(fused(high_c, 0x1p32, low_c) * -0x1p-64);
  return e < 0x1p-65 ? 0x1p-65 : e;
}

// log(E_i) - alpha log(p_i)
HOST_DEVICE double race_key(double priority, uint64_t index, uint64_t seed, double alpha) {
  if (!drawable(priority)) return INFINITE_KEY;
  return fused(-alpha, fixed_log(priority), fixed_log(exponential(philox(index, seed))));
}

// A test of 32 bits and no logarithm that every key at or below `limit` passes, and few others. With c = 1 - u, key <= limit
// means c <= E <= e^limit p^alpha, so log2 c <= limit / ln 2 + alpha log2 p. A float's own bits, as an integer, are 2^23 times
// such a logarithm, up to 0.0861 too low: no harm in c's, and added to p's.
struct Pretest {
  float alpha, offset;

  HOST_DEVICE Pretest(double limit, double alpha_) : alpha(static_cast<float>(alpha_)) {
    constexpr double unit = 8388608.0;  // 2^23
    const double slack = 0.0871 * alpha_ + 0.001;  // and what float roundings lose: below 1e-3 (1 + alpha)
    const double in_bits = unit * (126.0 - 127.0 * alpha_ + slack + limit * 1.4426950408889634 + 32.0);
    offset = static_cast<float>(in_bits);
  }

  // word: the upper one of u
  HOST_DEVICE bool passes(uint32_t word, float priority) const {
    const float half_c = static_cast<float>(static_cast<int32_t>(~word >> 1));
    const float bound = priority_bits(priority) * alpha + offset;
    return (static_cast<float>(bits_as<int32_t>(half_c)) <= bound) & (priority > 0.0f) & (priority < __builtin_huge_valf());
  }

  HOST_DEVICE bool passes(uint32_t word, double priority) const {
    const float half_c = static_cast<float>(static_cast<int32_t>(~word >> 1));
    const float bound = priority_bits(priority) * alpha + offset;
    return (static_cast<float>(bits_as<int32_t>(half_c)) <= bound) & drawable(priority);
  }

 private:
  HOST_DEVICE static float priority_bits(float p) { return static_cast<float>(bits_as<int32_t>(p)); }
  // a double's upper half in a float's units: 11 bits of exponent, 20 of mantissa, and the bias moved
  HOST_DEVICE static float priority_bits(double p) {
    const auto high = static_cast<int32_t>(bits_as<uint64_t>(p) >> 32);
    return static_cast<float>(high) * 8.0f - 896.0f * 8388608.0f;
  }
};

}  // namespace r1v2_fast
