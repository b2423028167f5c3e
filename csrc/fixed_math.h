// log and exp whose bits are the same on every CPU and GPU: +, -, *, / and fma, each rounded once, in this order. A libm's own
// differ in the last bit, and then so would the order of two keys. Every multiply-add here is an explicit fma, so that no
// compiler has one to contract.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace r1v2_fast {

template <typename To, typename From>
HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps every bit");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ln 2 = LN2_HIGH + LN2_LOW; the first has 32 bits, so that its product with an exponent is exact
constexpr double LN2_HIGH = 0x1.62e42feep-1, LN2_LOW = 0x1.a39ef35793c76p-33;

HOST_DEVICE double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// log(1 + f), f in [-1/4, sqrt(2) - 1], within 1 ulp: 2 artanh(s), s = f / (2 + f), with 2 s = f - s f, f being exact
HOST_DEVICE double log1p_near_zero(double f) {
  const double s = f / (2.0 + f), z = s * s;
  double p = 2.0 / 21;  // |s| <= 0.1716: the next term is below 2^-57 of the first
  p = fused(p, z, 2.0 / 19);
  p = fused(p, z, 2.0 / 17);
  p = fused(p, z, 2.0 / 15);
  p = fused(p, z, 2.0 / 13);
  p = fused(p, z, 2.0 / 11);
  p = fused(p, z, 2.0 / 9);
  p = fused(p, z, 2.0 / 7);
  p = fused(p, z, 2.0 / 5);
  p = fused(p, z, 2.0 / 3);
  return fused(-s, fused(-p, z, f), f);
}

// log(x) of a positive finite x, subnormals included, within 1 ulp
HOST_DEVICE double fixed_log(double x) {
  const bool tiny = x < 0x1p-1022;
  x = tiny ? x * 0x1p54 : x;
  const uint64_t shifted = bits_as<uint64_t>(x) + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);  // m from sqrt(1/2) on
  const int32_t exponent = static_cast<int32_t>(shifted >> 52) - (tiny ? 1023 + 54 : 1023);
  const double m = bits_as<double>((shifted & 0xfffffffffffffu) + 0x3fe6a09e667f3bcdu);
  const double e = exponent, log_m = log1p_near_zero(m - 1.0);
  return fused(e, LN2_HIGH, fused(e, LN2_LOW, log_m));
}

// x 2^e, e <= 0: exact, or 0 far below
HOST_DEVICE double shrunk(double x, int32_t e) {
  return e < -1022 ? 0.0 : x * bits_as<double>(static_cast<uint64_t>(e + 1023) << 52);
}

// A positive number of any size, scale 2^exponent, and sums of such numbers: no power of a priority leaves its range
struct Mass {
  int32_t exponent = 0;
  double scale = 0.0;

  HOST_DEVICE Mass& operator+=(const Mass& other) {
    if (!(other.scale > 0.0)) return *this;
    if (!(scale > 0.0)) return *this = other;
    if (other.exponent > exponent) {
      scale = shrunk(scale, exponent - other.exponent) + other.scale;
      exponent = other.exponent;
    } else {
      scale += shrunk(other.scale, other.exponent - exponent);
    }
    return *this;
  }
  HOST_DEVICE double over(const Mass& whole) const {
    const int32_t up = exponent - whole.exponent;  // a whole may be smaller than its scale's share says, never by much
    return up > 0 ? scale / shrunk(whole.scale, -up) : shrunk(scale, up) / whole.scale;
  }
  HOST_DEVICE double log() const {
    const double e = exponent;
    return scale > 0.0 ? fused(e, LN2_HIGH, fused(e, LN2_LOW, fixed_log(scale))) : -__builtin_huge_val();
  }
};

// e^y, |y| < 10^9
HOST_DEVICE Mass fixed_exp(double y) {
  const double shift = 0x1.8p52, k = fused(y, 1.4426950408889634, shift) - shift;
  const double r = fused(-k, LN2_LOW, fused(-k, LN2_HIGH, y));
  double p = 1.0 / 6227020800;  // 1 / 13!, |r| <= 0.347
  p = fused(p, r, 1.0 / 479001600);
  p = fused(p, r, 1.0 / 39916800);
  p = fused(p, r, 1.0 / 3628800);
  p = fused(p, r, 1.0 / 362880);
  p = fused(p, r, 1.0 / 40320);
  p = fused(p, r, 1.0 / 5040);
  p = fused(p, r, 1.0 / 720);
  p = fused(p, r, 1.0 / 120);
  p = fused(p, r, 1.0 / 24);
  p = fused(p, r, 1.0 / 6);
  p = fused(p, r, 0.5);
  p = fused(p, r, 1.0);
  return {static_cast<int32_t>(k), fused(p, r, 1.0)};
}

// a positive p as it is
HOST_DEVICE Mass exactly(double p) {
  const bool tiny = p < 0x1p-1022;
  const uint64_t bits = bits_as<uint64_t>(tiny ? p * 0x1p54 : p);
  return {static_cast<int32_t>(bits >> 52) - (tiny ? 1023 + 54 : 1023),
          bits_as<double>((bits & 0xfffffffffffffu) | 0x3ff0000000000000u)};
}

// p^alpha of a positive p
HOST_DEVICE Mass power(double p, double alpha) {
  return alpha == 1.0 ? exactly(p) : fixed_exp(alpha * fixed_log(p));
}

}  // namespace r1v2_fast
