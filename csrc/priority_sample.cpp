// The twin for CPUs: chunks of priorities over threads, loops that a compiler turns into vector code.
#include "priority_sample.h"

#include <algorithm>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace r1v2_fast {
namespace {

constexpr int CHUNK = 4096, LANES = 32;
constexpr int64_t SERIAL_BELOW = 1 << 16;  // below it a thread costs more to start than it saves

struct Candidate {
  double key;
  int64_t index;
  bool operator<(const Candidate& other) const {
    return key < other.key || (key == other.key && index < other.index);
  }
};

struct Count {
  Mass mass;
  int32_t positive = 0, bad = 0;
};

// fp32 and alpha 1: the plain sum is far inside a double's range
LANE_CLONES Count count_plain(const float* p, int count) {
  double sums[LANES] = {};
  int32_t positive[LANES] = {}, bad[LANES] = {};
  const auto add = [&](int lane, float value) {
    const bool fits = (value >= 0.0f) & (value < __builtin_huge_valf());
    sums[lane] += fits ? value : 0.0f;
    positive[lane] += fits & (value > 0.0f);
    bad[lane] += !fits;
  };
  int i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) add(lane, p[i + lane]);
  for (; i < count; ++i) add(0, p[i]);
  Count whole;
  for (int lane = 0; lane < LANES; ++lane) {
    whole.mass.scale += sums[lane];
    whole.positive += positive[lane];
    whole.bad += bad[lane];
  }
  return whole;
}

template <typename T>
ALWAYS_INLINE Count count_powers(const T* p, int count, double alpha) {
  int32_t exponents[CHUNK], positive = 0, bad = 0, top = INT32_MIN;
  double scales[CHUNK], sums[LANES] = {};
  const auto weigh = [&](int i, const auto& mass_of) {
    const double value = p[i];
    const bool good = drawable(value);
    const Mass mass = mass_of(good ? value : 1.0);
    exponents[i] = good ? mass.exponent : INT32_MIN / 2;
    scales[i] = good ? mass.scale : 0.0;
    positive += good;
    bad += !((value >= 0.0) & (value < INFINITE_KEY));
  };
  if (alpha == 1.0) {
    for (int i = 0; i < count; ++i) weigh(i, [](double value) { return exactly(value); });
  } else {
    for (int i = 0; i < count; ++i) weigh(i, [=](double value) { return fixed_exp(alpha * fixed_log(value)); });
  }
  for (int i = 0; i < count; ++i) top = std::max(top, exponents[i]);
  for (int i = 0; i < count; ++i) scales[i] = shrunk(scales[i], exponents[i] - top);
  int i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += scales[i + lane];
  for (; i < count; ++i) sums[0] += scales[i];
  Count whole;
  whole.positive = positive;
  whole.bad = bad;
  whole.mass.exponent = positive ? top : 0;
  for (double sum : sums) whole.mass.scale += sum;
  return whole;
}

LANE_CLONES Count count_chunk(const double* p, int count, double alpha) { return count_powers(p, count, alpha); }
LANE_CLONES Count count_other(const float* p, int count, double alpha) { return count_powers(p, count, alpha); }
Count count_chunk(const float* p, int count, double alpha) {
  return alpha == 1.0 ? count_plain(p, count) : count_other(p, count, alpha);
}

// Which of LANES indices from `first` on may be at or below the limit
template <typename T>
ALWAYS_INLINE bool test_lanes(const T* p, uint64_t first, uint64_t seed, const Pretest& test,
                                                      uint8_t* passed) {
  int any = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    passed[lane] = test.passes(philox(first + lane, seed).w[1], p[lane]);
    any |= passed[lane];
  }
  return any;
}

template <typename T>
ALWAYS_INLINE void scan_lanes(const T* p, int64_t first, int count, uint64_t seed, double alpha,
                                                      double limit, std::vector<Candidate>& found) {
  const Pretest test(limit, alpha);
  const auto exact = [&](int i) {
    const double key = race_key(p[i], first + i, seed, alpha);
    if (key <= limit && key < INFINITE_KEY) found.push_back({key, first + i});
  };
  uint8_t passed[LANES];
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    if (!test_lanes(p + i, first + i, seed, test, passed)) continue;
    for (int lane = 0; lane < LANES; ++lane)
      if (passed[lane]) exact(i + lane);
  }
  for (; i < count; ++i) exact(i);
}

LANE_CLONES void scan_chunk(const float* p, int64_t first, int count, uint64_t seed, double alpha, double limit,
                            std::vector<Candidate>& found) {
  scan_lanes(p, first, count, seed, alpha, limit, found);
}
LANE_CLONES void scan_chunk(const double* p, int64_t first, int count, uint64_t seed, double alpha, double limit,
                            std::vector<Candidate>& found) {
  scan_lanes(p, first, count, seed, alpha, limit, found);
}

template <typename T>
struct Race {
  const T* p;
  int64_t count;
  uint64_t seed;
  double alpha;
  int threads;
  int64_t chunks = (count + CHUNK - 1) / CHUNK;
  std::vector<std::vector<Candidate>> found = std::vector<std::vector<Candidate>>(chunks);

  int length(int64_t chunk) const { return static_cast<int>(std::min<int64_t>(CHUNK, count - chunk * CHUNK)); }

  Mass summed(const std::vector<Count>& counts) const {
    Mass sum;
    for (const Count& part : counts) sum += part.mass;
    return sum;
  }

  std::vector<Count> counted() const {
    std::vector<Count> counts(chunks);
    parallel_chunks(chunks, threads, [&](int64_t c) { counts[c] = count_chunk(p + c * CHUNK, length(c), alpha); });
    return counts;
  }

  // the mass of those not found; summed anew, since a difference would lose all its digits where the found hold nearly all
  Mass rest() const {
    std::vector<Count> counts(chunks);
    parallel_chunks(chunks, threads, [&](int64_t c) {
      T others[CHUNK];
      std::copy_n(p + c * CHUNK, length(c), others);
      for (const Candidate& gone : found[c]) others[gone.index - c * CHUNK] = 0;
      counts[c] = count_chunk(others, length(c), alpha);
    });
    return summed(counts);
  }

  int64_t scan(double limit) {
    parallel_chunks(chunks, threads, [&](int64_t c) {
      found[c].clear();
      scan_chunk(p + c * CHUNK, c * CHUNK, length(c), seed, alpha, limit, found[c]);
    });
    int64_t total = 0;
    for (const auto& part : found) total += part.size();
    return total;
  }

  std::vector<Candidate> smallest(int64_t k) const {
    std::vector<Candidate> all;
    for (const auto& part : found) all.insert(all.end(), part.begin(), part.end());
    if (k < static_cast<int64_t>(all.size())) {
      std::nth_element(all.begin(), all.begin() + k, all.end());
      all.resize(k);
    }
    std::sort(all.begin(), all.end());
    return all;
  }
};

}  // namespace

template <typename T>
Drawn priority_sample_cpu(const T* priorities, int64_t count, int64_t k, uint64_t seed, double alpha, int64_t* indices,
                          T* probabilities, int threads) {
  Race<T> race{priorities, count, seed, alpha, count < SERIAL_BELOW ? 1 : threads};
  const std::vector<Count> counts = race.counted();
  Drawn drawn;
  for (int64_t c = 0; c < race.chunks; ++c) {
    drawn.positive += counts[c].positive;
    for (int64_t i = c * CHUNK; counts[c].bad && drawn.first_bad < 0; ++i)
      if (!(priorities[i] >= 0 && priorities[i] < INFINITE_KEY)) drawn.first_bad = i;
  }
  const Mass sum = race.summed(counts);
  const int64_t most = std::min(k, drawn.positive);
  const double want = wanted(most);
  Limit limit{want < drawn.positive ? fixed_log(want) - sum.log() : INFINITE_KEY};
  for (int64_t found = most ? race.scan(limit.now) : 0; found < most; found = race.scan(limit.now)) {
    limit.raise(want - found, race.rest());  // too many through cost no more than their keys here
  }
  const std::vector<Candidate> winners = race.smallest(most);
  for (int64_t i = 0; i < k; ++i) {
    indices[i] = i < most ? winners[i].index : -1;
    probabilities[i] = i < most ? static_cast<T>(power(priorities[indices[i]], alpha).over(sum)) : T(0);
  }
  return drawn;
}

template Drawn priority_sample_cpu(const float*, int64_t, int64_t, uint64_t, double, int64_t*, float*, int);
template Drawn priority_sample_cpu(const double*, int64_t, int64_t, uint64_t, double, int64_t*, double*, int);

template <typename T>
void race_keys_cpu(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha) {
  for (int64_t i = 0; i < count; ++i) keys[i] = race_key(priorities[i], i, seed, alpha);
}

template void race_keys_cpu(const float*, double*, int64_t, uint64_t, double);
template void race_keys_cpu(const double*, double*, int64_t, uint64_t, double);

}  // namespace r1v2_fast
