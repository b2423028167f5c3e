// The race's arithmetic, and the CPU sampler and the emulated kernel against every key, sorted. Run by test_priority_sample_native.py.
#include "check.h"
#include "priority_sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

using namespace r1v2_fast;

namespace {

bool brief = false;  // sanitizers make fibers twenty times slower

double ulps(double ours, long double exact) {
  const double nearest = static_cast<double>(exact);
  const double ulp = std::nextafter(std::abs(nearest), INFINITY) - std::abs(nearest);
  return static_cast<double>(std::abs(ours - exact) / ulp);
}

void check_log_and_exp() {
  Random random(1);
  double log_error = 0, exp_error = 0;
  for (int i = 0; i < 400000; ++i) {
    const double spread = std::exp((uniform(random) * 2 - 1) * 700), near = 1 + (uniform(random) - 0.5) * std::exp(-40 * uniform(random));
    for (double x : {spread, near, spread * 1e-12}) {
      if (x <= 0 || x == 1.0) continue;
      log_error = std::max(log_error, ulps(fixed_log(x), logl(x)));
    }
    const double y = (uniform(random) * 2 - 1) * 700;
    const Mass e = fixed_exp(y);
    exp_error = std::max(exp_error, ulps(std::ldexp(e.scale, e.exponent), expl(y)));
  }
  CHECK(fixed_log(1.0) == 0.0, "log 1");
  CHECK(log_error < 1.0, "log errs by %g ulp", log_error);
  CHECK(exp_error < 1.0, "exp errs by %g ulp", exp_error);
  for (double x : {5e-324, 1e-310, 0x1p-1022, 1.7976931348623157e308}) {
    CHECK(ulps(fixed_log(x), logl(x)) < 1.0, "log %g = %.17g", x, fixed_log(x));
    const Mass same = exactly(x);
    CHECK(std::ldexp(same.scale, same.exponent) == x, "%g is not kept", x);
  }
}

void check_exponentials() {
  Random random(2);
  for (int i = 0; i < 200000; ++i) {
    const uint64_t word = i < 1000 ? static_cast<uint64_t>(i) : i < 2000 ? ~static_cast<uint64_t>(i - 1000) : random();
    const Words words = {{static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32), 0, 0}};
    const long double u = (static_cast<long double>(word) + 1) * 0x1p-64L;  // 64 bits fit
    // u itself is rounded to 53 bits where it is above 2^-11: an ulp of it is up to three of E
    const long double exact = word == ~0ull ? 0x1p-65L : u < 0.5L ? -logl(u) : -log1pl(-static_cast<long double>(~word) * 0x1p-64L);
    CHECK(ulps(exponential(words), exact) < 4.0, "word %llx: %.17g", static_cast<unsigned long long>(word), exponential(words));
  }
}

// No key at or below the limit fails the pretest, and it lets few others through.
template <typename T>
void check_pretest() {
  Random random(3);
  for (double alpha : {0.0, 0.5, 1.0, 2.0, 6.0, 1000.0}) {
    int64_t through = 0, right = 0;
    for (int i = 0; i < 300000; ++i) {
      const int decades = sizeof(T) == 4 ? 38 : 300;
      T p = static_cast<T>(std::pow(10.0, (uniform(random) * 2 - 1) * (i % 3 ? 2 : decades)));
      if (i % 101 == 0) p = std::numeric_limits<T>::denorm_min() * (1 + i % 7);
      const uint64_t index = random() >> 20, seed = random();
      const double key = race_key(p, index, seed, alpha);
      const double gap = uniform(random) * 12 - 4;  // limits around the key
      for (double limit : {key, key + std::max(gap, 0.0), key + gap}) {
        const bool passes = Pretest(limit, alpha).passes(philox(index, seed).w[1], p);
        CHECK(passes || key > limit, "alpha %g p %g key %.17g limit %.17g", alpha, double(p), key, limit);
      }
      const double limit = key + gap;
      through += Pretest(limit, alpha).passes(philox(index, seed).w[1], p);
      right += key <= limit;
    }
    CHECK(alpha > 2 || through < 1.25 * right, "alpha %g: %lld for %lld", alpha, (long long)through, (long long)right);
  }
  CHECK(!Pretest(INFINITY, 1.0).passes(7, T(0)) && !Pretest(INFINITY, 1.0).passes(7, T(NAN)), "nothing to draw");
  CHECK(!Pretest(INFINITY, 1.0).passes(7, T(-1)) && !Pretest(INFINITY, 1.0).passes(7, T(INFINITY)), "nothing to draw");
}

template <typename T>
std::vector<T> made(const char* kind, int64_t count, Random& random) {
  std::vector<T> p(count);
  for (int64_t i = 0; i < count; ++i) {
    const double u = uniform(random);
    switch (kind[0]) {
      case 'u': p[i] = static_cast<T>(u); break;                                    // uniform
      case 'z': p[i] = static_cast<T>(1.0 / (1 + random() % count)); break;          // Zipf
      case 'e': p[i] = static_cast<T>(std::pow(10.0, u * 60 - 30)); break;           // extreme ratios
      case 's': p[i] = u < 0.9 ? T(0) : static_cast<T>(u); break;                    // sparse
      case 'h': p[i] = i == count / 2 ? T(1e30) : static_cast<T>(u * 1e-20); break;  // one heavy
      case 'o': p[i] = i == count / 3 ? T(2) : T(0); break;                          // one positive
      case 't': p[i] = T(3); break;                                                  // all the same
      case 'b': p[i] = i % 5 == 3 ? T(NAN) : i % 5 == 4 ? T(-1) : static_cast<T>(u); break;
      default: std::abort();
    }
  }
  return p;
}

template <typename T>
struct Result {
  std::vector<int64_t> indices;
  std::vector<T> probabilities;
  Drawn drawn;
};

template <typename T>
Result<T> by_every_key(const std::vector<T>& p, int64_t k, uint64_t seed, double alpha) {
  const int64_t count = p.size();
  std::vector<std::pair<double, int64_t>> keys;
  Drawn drawn;
  long double whole = 0, largest = 0;
  for (T value : p)
    if (drawable(value)) largest = std::max<long double>(largest, value);
  const auto mass = [&](T value) { return powl(static_cast<long double>(value) / largest, alpha); };
  for (int64_t i = 0; i < count; ++i) {
    if (!(p[i] >= 0 && p[i] < INFINITE_KEY) && drawn.first_bad < 0) drawn.first_bad = i;
    if (!drawable(p[i])) continue;
    ++drawn.positive;
    keys.push_back({race_key(p[i], i, seed, alpha), i});
    whole += mass(p[i]);
  }
  std::sort(keys.begin(), keys.end());
  Result<T> result{std::vector<int64_t>(k, -1), std::vector<T>(k), drawn};
  for (int64_t i = 0; i < std::min(k, drawn.positive); ++i) {
    result.indices[i] = keys[i].second;
    result.probabilities[i] = static_cast<T>(mass(p[keys[i].second]) / whole);
  }
  return result;
}

template <typename T>
void compare(const Result<T>& ours, const Result<T>& truth, const char* what) {
  CHECK(ours.drawn.positive == truth.drawn.positive && ours.drawn.first_bad == truth.drawn.first_bad, "%s: %lld, %lld", what,
        (long long)ours.drawn.positive, (long long)ours.drawn.first_bad);
  for (size_t i = 0; i < truth.indices.size(); ++i) {
    CHECK(ours.indices[i] == truth.indices[i], "%s: place %zu is %lld, expected %lld", what, i, (long long)ours.indices[i],
          (long long)truth.indices[i]);
    const double error = std::abs(ours.probabilities[i] - truth.probabilities[i]);
    const double allowed = (sizeof(T) == 4 ? 1.2e-7 : 2e-12) * truth.probabilities[i] + std::numeric_limits<T>::denorm_min();
    CHECK(error <= allowed, "%s: probability %zu is %.17g, expected %.17g", what, i, double(ours.probabilities[i]),
          double(truth.probabilities[i]));
  }
}

template <typename T>
Result<T> on_cpu(const std::vector<T>& p, int64_t k, uint64_t seed, double alpha, int threads) {
  Result<T> result{std::vector<int64_t>(k), std::vector<T>(k), {}};
  result.drawn = priority_sample_cpu(p.data(), static_cast<int64_t>(p.size()), k, seed, alpha, result.indices.data(),
                                     result.probabilities.data(), threads);
  return result;
}

#ifdef R1V2_FAST_EMULATED
template <typename T>
Result<T> on_gpu(const std::vector<T>& p, int64_t k, uint64_t seed, double alpha, bool sort, int64_t capacity) {
  Result<T> result{std::vector<int64_t>(k), std::vector<T>(k), {}};
  const int64_t count = p.size();
  std::vector<double> keys(capacity, NAN), head(SAMPLE_HEAD_BYTES / 8, NAN);
  std::vector<int64_t> candidates(capacity, -7);
  std::vector<T> shares(capacity);
  int64_t status[3] = {-9, -9, -9};
  std::vector<T> aligned(count + 20, T(1e30));  // what lies beyond the end must not come
  T* start = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(aligned.data()) + 15) / 16 * 16);
  std::copy(p.begin(), p.end(), start);
  const SampleSpace space{head.data(), capacity, keys.data(), candidates.data(), sort ? shares.data() : nullptr};
  priority_sample_cuda(start, count, k, seed, alpha, space, result.indices.data(), result.probabilities.data(), status, 0,
                       nullptr);
  CHECK(status[2] == 0, "no limit was found: N=%lld k=%lld alpha=%g capacity=%lld positive=%lld", (long long)count, (long long)k, alpha, (long long)capacity, (long long)status[0]);
  result.drawn = {status[0], status[1]};
  if (sort) {  // as the caller does
    std::vector<int64_t> order(capacity);
    for (int64_t i = 0; i < capacity; ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return keys[a] < keys[b] || (keys[a] == keys[b] && candidates[a] < candidates[b]);
    });
    for (int64_t i = 0; i < std::min(k, status[0]); ++i) {
      result.indices[i] = candidates[order[i]];
      result.probabilities[i] = shares[order[i]];
    }
  }
  return result;
}
#endif

template <typename T>
void check_samplers() {
  Random random(4);
  for (const char* kind : {"uniform", "zipf", "extreme", "sparse", "heavy", "one", "ties", "bad"}) {
    for (double alpha : {1.0, 0.5, 2.0, 0.0, 40.0}) {
      if (kind[0] == 'e' && sizeof(T) == 8 && alpha == 40.0) continue;  // long double cannot tell its truth
      for (int64_t count : {1, 3, 31, 700, 9001}) {
        for (int64_t k : {int64_t(1), count / 7, count / 2 + 1, count, count + 2}) {
#ifdef R1V2_FAST_EMULATED
          const bool lengthy = count > 31;  // fibers are slow: of the longer ones those that differ in what they do
          if (lengthy && ((alpha != 1.0 && alpha != 40.0) || k > 2000 || k == count || k == count / 2 + 1)) continue;
          if (count == 9001 && ((kind[0] != 'u' && kind[0] != 'z') || sizeof(T) == 8)) continue;
          if (brief && (count == 9001 || kind[0] == 't' || kind[0] == 's' || (lengthy && alpha == 40.0))) continue;
#endif
          const uint64_t seed = random() >> 1;
          const std::vector<T> p = made<T>(kind, count, random);
          const Result<T> truth = by_every_key(p, k, seed, alpha);
          char what[100];
          std::snprintf(what, sizeof(what), "%s N=%lld k=%lld alpha=%g bytes=%zu", kind, (long long)count, (long long)k, alpha,
                        sizeof(T));
          compare(on_cpu(p, k, seed, alpha, 1), truth, what);
#ifdef R1V2_FAST_EMULATED
          emulated_seed(seed & 1 ? seed : 0);
          for (bool sort : {false, true})
            if (count == 9001 || sort == ((seed & 2) != 0))
              compare(on_gpu(p, k, seed, alpha, sort, sample_capacity(count, k)), truth, what);
#endif
        }
      }
    }
  }
}

// Enough for threads, and the same with any number of them.
void check_threads() {
  Random random(5);
  for (const char* kind : {"uniform", "zipf", "sparse"}) {
    for (double alpha : {1.0, 0.7}) {
      const std::vector<float> p = made<float>(kind, 300001, random);
      const Result<float> truth = by_every_key(p, 5000, 9, alpha);
      for (int threads : {1, 2, 3, 7}) {
        const Result<float> ours = on_cpu(p, 5000, 9, alpha, threads);
        compare(ours, truth, kind);
        CHECK(ours.probabilities == on_cpu(p, 5000, 9, alpha, 1).probabilities, "%s: %d threads", kind, threads);
      }
    }
  }
}

#ifdef R1V2_FAST_EMULATED
// Limits that let too many through are lowered: with room for few more than k, most rounds overflow.
void check_overflow() {
  Random random(6);
  for (const char* kind : {"uniform", "ties", "zipf"}) {
    const std::vector<float> p = made<float>(kind, 900, random);
    for (int64_t k : {1, 40}) {
      compare(on_gpu(p, k, 11, 1.0, false, k), by_every_key(p, k, 11, 1.0), kind);  // exactly k have to come through
    }
  }
}
#endif

// Equal keys come in the order of their indices: so large an alpha rounds keys to 1.2e-7.
void check_ties() {
  const std::vector<float> p(9001, 3.0f);
  const int64_t count = p.size();
  const double alpha = 8e8;
  uint64_t seed = 0;
  for (bool tied = false; !tied; ++seed) {
    std::vector<double> keys(count);
    race_keys_cpu(p.data(), keys.data(), count, seed, alpha);
    std::sort(keys.begin(), keys.end());
    tied = std::adjacent_find(keys.begin(), keys.end()) != keys.end();
    if (tied) break;
  }
  const Result<float> truth = by_every_key(p, count, seed, alpha);
  compare(on_cpu(p, count, seed, alpha, 2), truth, "ties");
#ifdef R1V2_FAST_EMULATED
  compare(on_gpu(p, count, seed, alpha, false, count), truth, "ties");
#endif
}

// Masses decades apart: the limit rises in few rounds, though each lets hardly one through.
void check_tiers() {
  Random random(8);
  const std::vector<float> p = made<float>("extreme", 700, random);
  const Result<float> truth = by_every_key(p, 351, 1, 40.0);
  compare(on_cpu(p, 351, 1, 40.0, 1), truth, "tiers");
#ifdef R1V2_FAST_EMULATED
  compare(on_gpu(p, 351, 1, 40.0, false, sample_capacity(700, 351)), truth, "tiers");
#endif
}

// z of a chi-square statistic, by Wilson and Hilferty
double z_score(double chi_square, double cells) {
  const double v = 2.0 / (9.0 * (cells - 1));
  return (std::cbrt(chi_square / (cells - 1)) - (1.0 - v)) / std::sqrt(v);
}

// Every ordered draw of 3 of 5 against its probability, 10^6 draws.
void check_sequences() {
  const std::vector<float> p = {0.1f, 1.0f, 0.7f, 3.0f, 0.0f, 2.0f};
  constexpr int N = 6, DRAWS = 1000000;
  for (double alpha : {0.5, 1.0, 2.0}) {
    std::vector<int64_t> counts(N * N * N), indices(3);
    std::vector<float> probabilities(3);
    for (int seed = 0; seed < DRAWS; ++seed) {
      priority_sample_cpu(p.data(), N, 3, seed, alpha, indices.data(), probabilities.data(), 1);
      ++counts[(indices[0] * N + indices[1]) * N + indices[2]];
    }
    double mass[N], sum = 0, chi_square = 0, whole = 0;
    for (int i = 0; i < N; ++i) sum += mass[i] = p[i] > 0 ? std::pow(p[i], alpha) : 0;
    int cells = 0;
    for (int a = 0; a < N; ++a)
      for (int b = 0; b < N; ++b)
        for (int c = 0; c < N; ++c) {
          const int64_t count = counts[(a * N + b) * N + c];
          const bool possible = a != b && b != c && a != c && p[a] > 0 && p[b] > 0 && p[c] > 0;
          CHECK(possible || count == 0, "%d %d %d was drawn", a, b, c);
          if (!possible) continue;
          const double share = mass[a] / sum * mass[b] / (sum - mass[a]) * mass[c] / (sum - mass[a] - mass[b]);
          chi_square += (count - DRAWS * share) * (count - DRAWS * share) / (DRAWS * share);
          whole += share, ++cells;
        }
    CHECK(cells == 60 && std::abs(whole - 1) < 1e-12, "%d cells, %g", cells, whole);
    CHECK(z_score(chi_square, cells) < 4, "alpha %g: chi-square %g over %d", alpha, chi_square, cells);
  }
}

// One draw of 300, 10^6 times, against p^alpha / sum.
void check_single_draws() {
  Random random(7);
  constexpr int N = 300, DRAWS = 1000000;
  const std::vector<float> p = made<float>("uniform", N, random);
  for (double alpha : {0.5, 1.0, 2.0}) {
    std::vector<int64_t> counts(N), index(1);
    float probability;
    for (int seed = 0; seed < DRAWS; ++seed) {
      priority_sample_cpu(p.data(), N, 1, seed, alpha, index.data(), &probability, 1);
      ++counts[index[0]];
    }
    double sum = 0, chi_square = 0, rare = 0, rare_count = 0, cells = 1;
    for (float value : p) sum += std::pow(value, alpha);
    for (int i = 0; i < N; ++i) {
      const double expected = DRAWS * std::pow(p[i], alpha) / sum;
      if (expected < 10) {
        rare += expected, rare_count += counts[i];
      } else {
        chi_square += (counts[i] - expected) * (counts[i] - expected) / expected, ++cells;
      }
    }
    if (rare > 0) chi_square += (rare_count - rare) * (rare_count - rare) / rare;
    CHECK(z_score(chi_square, cells) < 4, "alpha %g: chi-square %g over %g", alpha, chi_square, cells);
  }
}

}  // namespace

int main(int count, char**) {
  brief = count > 1;
#ifndef R1V2_FAST_EMULATED
  if (count > 1) {
    check_sequences();
    check_single_draws();
    std::printf("distributed as they should be\n");
    return 0;
  }
  check_log_and_exp();
  check_exponentials();
  check_pretest<float>();
  check_pretest<double>();
  check_threads();
#else
  emulated::resident = 2;
  check_overflow();
#endif
  if (!brief) check_ties();
  check_tiers();
  check_samplers<float>();
  if (!brief) check_samplers<double>();
  std::printf("all as every key says\n");
}
