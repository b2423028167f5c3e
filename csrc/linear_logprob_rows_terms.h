// From a matmul's logits to z and f, and from fp32 to what D is stored as: four at a time.
#pragma once

#include "launch.h"
#include "linear_logprob_rows.h"

namespace r1v2_fast {

// tanh(s / softcap)
__device__ __forceinline__ float capped(const LogprobRows& rows, float x) {
  return tanhf(__fdiv_rn(x * rows.logit_scale, rows.softcap));
}

// Four of `from` at `id`, `fill` beyond V; `from` starts at a multiple of their size.
template <class Four, class T>
__device__ __forceinline__ void load(const T* from, int64_t id, int64_t V, T fill, T (&four)[4]) {
  if (id + 4 <= V) {
    const Four all = __ldg(reinterpret_cast<const Four*>(from + id));
    four[0] = all.x, four[1] = all.y, four[2] = all.z, four[3] = all.w;
  } else {
    for (int j = 0; j < 4; ++j) four[j] = id + j < V ? from[id + j] : fill;
  }
}

// What shared memory keeps of the matmul's x of four ids: z, or with a softcap tanh(s / softcap), from which z and f
// follow; -inf where an id is forbidden.
__device__ __forceinline__ void shape(const LogprobRows& rows, float temperature, int64_t id, float (&x)[4]) {
  float bias[4] = {};
  unsigned char blocked[4] = {};
  if (rows.bias != nullptr) load<float4>(rows.bias, id, rows.vocabulary, 0.0f, bias);
  if (rows.blocked != nullptr) load<uchar4>(rows.blocked, id, rows.vocabulary, uint8_t{0}, blocked);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[j] += bias[j];
    if (rows.softcap > 0) {
      x[j] = capped(rows, x[j]);
    } else {
      x[j] *= rows.logit_scale;
      if (temperature != 1.0f) x[j] = __fdiv_rn(x[j], temperature);
    }
    if (blocked[j] != 0) x[j] = -INFINITY;
  }
}

// z of what shared memory keeps: the same bits in every pass, hence no product that is contracted with what follows
template <bool SHAPED>
__device__ __forceinline__ float z_of(const LogprobRows& rows, float temperature, float kept) {
  if (!SHAPED || !(rows.softcap > 0)) return kept;
  const float s = __fmul_rn(kept, rows.softcap);
  return temperature != 1.0f ? __fdiv_rn(s, temperature) : s;
}

__device__ __forceinline__ void store(float* to, const float (&d)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(d[0], d[1], d[2], d[3]);
}

template <class Pair>  // two 16-bit numbers
__device__ __forceinline__ unsigned bits(Pair pair) {
  return *reinterpret_cast<unsigned*>(&pair);
}

__device__ __forceinline__ void store(__nv_bfloat16* to, const float (&d)[4]) {
  *reinterpret_cast<uint2*>(to) =
      make_uint2(bits(__floats2bfloat162_rn(d[0], d[1])), bits(__floats2bfloat162_rn(d[2], d[3])));
}

__device__ __forceinline__ void store(__half* to, const float (&d)[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(bits(__floats2half2_rn(d[0], d[1])), bits(__floats2half2_rn(d[2], d[3])));
}

__device__ __forceinline__ void store_one(float* to, float d) { *to = d; }
__device__ __forceinline__ void store_one(__nv_bfloat16* to, float d) { *to = __float2bfloat16_rn(d); }

}  // namespace r1v2_fast
