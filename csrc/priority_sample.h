// sample_by_priority: the k smallest keys of the exponential race (race.h), found without making every key.
// A limit lets about k + 6 sqrt(k) indices through; only their keys are made, in fp64, and ordered. With S the sum of masses
// p^alpha, the time T = want / S lets at most `want` through in the mean; fewer where a few indices hold most of S. The race
// has no memory: with R the mass of those not through, T then grows by what is missing over R.
#pragma once

#include <cmath>
#include <cstdint>

#include "race.h"

namespace r1v2_fast {

// How many a limit should let through, so that fewer than k come once in 10^9
HOST_DEVICE double wanted(int64_t k) { return k + 6.0 * sqrt(static_cast<double>(k)) + 16.0; }

// log(e^limit + missing / rest)
HOST_DEVICE double raised(double limit, double missing, const Mass& rest) {
  const double step = fixed_log(missing) - rest.log();
  const double high = limit > step ? limit : step, low = limit > step ? step : limit;
  if (!(low > high - 700.0)) return high;
  const Mass ratio = fixed_exp(low - high);
  return high + fixed_log(1.0 + shrunk(ratio.scale, ratio.exponent));
}

// The limits tried: what let too few through is raised, what let too many through is lowered, between the two it is halved.
struct Limit {
  double now, low = -INFINITE_KEY, high = INFINITE_KEY;
  int raises = 0;
  double stride = 0.5;

  HOST_DEVICE void raise(double missing, const Mass& rest) {
    low = now;
    now = raised(low, missing, rest);
    // masses decades apart come one a round: from the third on go further, and lower it again if that was too far
    if (++raises > 2) now += stride *= 2.0;
    if (!(now > low)) now = low + 1.0;
    if (!(now < high)) now = 0.5 * (low + high);
  }
  HOST_DEVICE void lower() {
    high = now;
    now = low > -INFINITE_KEY ? 0.5 * (low + high) : high - (stride *= 2.0);
  }
};

struct Drawn {
  int64_t positive = 0;    // priorities that can be drawn
  int64_t first_bad = -1;  // index of the first that is NaN, infinite or negative
};

// indices [k], -1 behind the last that can be drawn; probabilities [k] of a single draw, p^alpha / S
template <typename T>
Drawn priority_sample_cpu(const T* priorities, int64_t count, int64_t k, uint64_t seed, double alpha, int64_t* indices,
                          T* probabilities, int threads);

// What the GPU needs beside its results. Candidates that overflow `capacity` cost a round with a lower limit.
struct SampleSpace {
  void* head;           // [SAMPLE_HEAD_BYTES]
  int64_t capacity;     // of the rest: sample_capacity(count, k)
  double* keys;         // [capacity]
  int64_t* candidates;  // [capacity]
  void* shares;         // [capacity] T where the caller sorts by (key, index): probabilities in the candidates' order;
                        // null: the kernel ranks them itself, in time quadratic in k, up to RANKED_MOST
};

constexpr int SAMPLE_BLOCKS = 2048;
constexpr int64_t SAMPLE_HEAD_BYTES = 32 + 32 * SAMPLE_BLOCKS, RANKED_MOST = 8192;

inline int64_t sample_capacity(int64_t count, int64_t k) {
  const double most = wanted(k) + 6.0 * std::sqrt(wanted(k)) + 64.0;
  return most < static_cast<double>(count) ? static_cast<int64_t>(most) : count;
}

// One launch, no sync. priorities: 16-byte aligned; status [3] on the device: positive, first_bad, 1 where no limit was found
template <typename T>
void priority_sample_cuda(const T* priorities, int64_t count, int64_t k, uint64_t seed, double alpha,
                          const SampleSpace& space, int64_t* indices, T* probabilities, int64_t* status, int device,
                          void* stream);

// All N keys: what the samplers are tested against
template <typename T>
void race_keys_cpu(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha);
template <typename T>
void race_keys_cuda(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha, int device,
                    void* stream);

}  // namespace r1v2_fast
