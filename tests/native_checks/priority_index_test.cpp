// Block sums and what is drawn from them against sums made one by one, threads against one thread, and the emulated kernels
// against the CPU, bit for bit. Run by test_priority_index.py.
#include "check.h"
#include "priority_draw.h"
#include "priority_index.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <utility>
#include <vector>

using namespace r1v2_fast;

namespace {

template <typename T>
T made(const char* kind, int64_t i, int64_t count, Random& random) {
  const double u = uniform(random);
  switch (kind[0]) {
    case 'u': return static_cast<T>(u);                                    // uniform
    case 'e': return static_cast<T>(std::pow(10.0, u * 60 - 30));          // extreme ratios
    case 's': return u < 0.9 ? T(0) : static_cast<T>(u);                   // sparse
    case 'h': return i == count / 2 ? T(1e30) : static_cast<T>(u * 1e-20); // one heavy
    case 'o': return i == count / 3 ? T(2) : T(0);                         // one positive
    case 'z': return T(0);                                                 // none
    case 't': return i % 2 ? std::numeric_limits<T>::denorm_min() : std::numeric_limits<T>::max();
    case 'b': return i % 5 == 3 ? T(NAN) : i % 5 == 4 ? T(-1) : static_cast<T>(u);
    default: std::abort();
  }
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

struct Device {
  bool emulated;
  int threads;
};

struct Owned {  // an index, and what has been drawn from it
  std::vector<float> leaves;
  std::vector<double> powers, sums;
  PriorityIndex index;
  std::vector<int64_t> drawn;
  std::vector<float> probabilities;
  int64_t found = -1;

  Owned(int64_t capacity, double alpha)
      : leaves(capacity), powers(alpha == 1.0 ? 0 : capacity), sums(SumLevels(capacity).doubles()) {
    index = {capacity, alpha, leaves.data(), alpha == 1.0 ? nullptr : powers.data(), sums.data()};
  }
  double total() const { return sums[SumLevels(index.capacity).root()]; }
  bool operator==(const Owned& other) const {
    return same_bits(leaves, other.leaves) && same_bits(powers, other.powers) && same_bits(sums, other.sums) &&
           drawn == other.drawn && same_bits(probabilities, other.probabilities) && found == other.found;
  }

  void build(Device on) {
#ifdef R1V2_FAST_EMULATED
    if (on.emulated) return priority_index_build_cuda(index, 0, nullptr);
#endif
    priority_index_build_cpu(index, on.threads);
  }
  void update(const std::vector<int64_t>& indices, const std::vector<float>& p, Device on) {
    const int64_t count = indices.size();
#ifdef R1V2_FAST_EMULATED
    if (on.emulated) {
      std::vector<double> workspace(priority_index_update_bytes(count) / 8, NAN);
      return priority_index_update_cuda(index, indices.data(), p.data(), count, workspace.data(), workspace.size() * 8, 0,
                                        nullptr);
    }
#endif
    priority_index_update_cpu(index, indices.data(), p.data(), count, on.threads);
  }
  void sample(int64_t k, uint64_t seed, bool replacement, Device on) {
    drawn.assign(k, -7), probabilities.assign(k, NAN);
#ifdef R1V2_FAST_EMULATED
    if (on.emulated) {
      std::vector<double> workspace(priority_index_sample_bytes(index.capacity, k, replacement) / 8, NAN);
      return priority_index_sample_cuda(index, k, seed, replacement, drawn.data(), probabilities.data(), &found,
                                        workspace.data(), workspace.size() * 8, 0, nullptr);
    }
#endif
    found = priority_index_sample_cpu(index, k, seed, replacement, drawn.data(), probabilities.data(), on.threads);
  }
};

// The sums that the index keeps are those that a build makes, and about those of the weights one by one
void check_sums(const Owned& owned) {
  Owned fresh(owned.index.capacity, owned.index.alpha);
  fresh.leaves = owned.leaves;
  fresh.build({false, 1});
  CHECK(same_bits(fresh.sums, owned.sums) && same_bits(fresh.powers, owned.powers), "%lld leaves are not what a build makes",
        (long long)owned.index.capacity);
  long double total = 0;
  for (float p : owned.leaves) total += p > 0 ? powl(p, owned.index.alpha) : 0;
  CHECK(std::abs(owned.total() - total) <= 1e-12L * total, "total %.17g, %.17Lg expected", owned.total(), total);
}

// Each draw lies where its target does among sums made one by one, and weighs what its leaf does
void check_spans(const Owned& owned, uint64_t seed) {
  std::vector<long double> upto(1, 0);
  for (float p : owned.leaves) upto.push_back(upto.back() + (p > 0 ? powl(p, owned.index.alpha) : 0));
  const long double total = upto.back(), slack = 1e-12L * total;
  for (size_t i = 0; i < owned.drawn.size(); ++i) {
    const int64_t leaf = owned.drawn[i];
    const long double target = uniform53(philox(i, seed)) * total;
    CHECK(leaf >= 0 && leaf < owned.index.capacity && owned.leaves[leaf] > 0, "draw %zu is leaf %lld", i, (long long)leaf);
    CHECK(upto[leaf] <= target + slack && target <= upto[leaf + 1] + slack, "draw %zu: leaf %lld", i, (long long)leaf);
    const double share = static_cast<double>(powl(owned.leaves[leaf], owned.index.alpha) / total);
    CHECK(std::abs(owned.probabilities[i] - share) <= 1e-7 * share + 1e-45, "draw %zu: probability %g, %g expected", i,
          owned.probabilities[i], share);
  }
}

void check_distinct(const Owned& owned, int64_t k) {
  const int64_t positive = std::count_if(owned.leaves.begin(), owned.leaves.end(), [](float p) { return p > 0; });
  const std::set<int64_t> once(owned.drawn.begin(), owned.drawn.begin() + owned.found);
  CHECK(owned.found == std::min(k, positive), "%lld of %lld positive, k = %lld", (long long)owned.found, (long long)positive,
        (long long)k);
  CHECK(static_cast<int64_t>(once.size()) == owned.found, "an index was drawn twice");
  for (int64_t i = 0; i < k; ++i) {
    if (i < owned.found) CHECK(owned.leaves[owned.drawn[i]] > 0, "index %lld weighs nothing", (long long)owned.drawn[i]);
    if (i >= owned.found) CHECK(owned.drawn[i] == -1 && owned.probabilities[i] == 0, "nothing is left to draw");
  }
}

// A sequence of updates and samples on `others`, each the same, bit for bit, as on one thread
void check_index(const char* kind, int64_t capacity, double alpha, uint64_t seed, const std::vector<Device>& others) {
  Random random(seed);
  Owned truth(capacity, alpha);
  for (int64_t i = 0; i < capacity; ++i) truth.leaves[i] = drawable(truth.leaves[i] = made<float>(kind, i, capacity, random)) ? truth.leaves[i] : 0;
  std::vector<Owned> owned(others.size(), truth);
  for (Owned& one : owned) {
    one.index.leaves = one.leaves.data(), one.index.sums = one.sums.data();
    if (one.index.powers) one.index.powers = one.powers.data();
  }
  const auto everywhere = [&](const char* what, const auto& run) {
    run(truth, Device{false, 1});
    for (size_t i = 0; i < owned.size(); ++i) {
      run(owned[i], others[i]);
      CHECK(owned[i] == truth, "%s of %lld %s, alpha %g: %s with %d threads is not what one thread makes", what,
            (long long)capacity, kind, alpha, others[i].emulated ? "the kernel" : "the CPU", others[i].threads);
    }
  };
  everywhere("build", [](Owned& one, Device on) { one.build(on); });
  check_sums(truth);
  for (int64_t count : {int64_t(0), int64_t(1), int64_t(37), capacity / 2 + 1, 2 * capacity}) {
    if (others[0].emulated && (count == 0 || count > 1500)) continue;  // fibers are slow
    std::vector<int64_t> indices(count);
    std::vector<float> p(count);
    for (int64_t i = 0; i < count; ++i) {
      indices[i] = i % 11 == 10 ? -1 - i : i % 13 == 12 ? capacity + i : random() % capacity;
      p[i] = i % 7 == 6 ? made<float>("bad", i, count, random) : made<float>(kind, indices[i], capacity, random);
    }
    std::vector<float> last = truth.leaves;
    for (int64_t i = 0; i < count; ++i)
      if (indices[i] >= 0 && indices[i] < capacity && p[i] >= 0 && p[i] < INFINITE_KEY) last[indices[i]] = p[i];
    everywhere("update", [&](Owned& one, Device on) { one.update(indices, p, on); });
    CHECK(last == truth.leaves, "the last writer does not win");
    check_sums(truth);
    const int64_t many = others[0].emulated ? 40 : 400;
    for (int64_t k : {int64_t(0), int64_t(1), std::min(count, many), capacity > many ? many : capacity + 2}) {
      if (others[0].emulated && k == std::min(count, many)) continue;
      if (count > 100000 && k == many) k = 30000;  // enough for threads
      const Owned before = truth;
      everywhere("sample", [&](Owned& one, Device on) { one.sample(k, seed + count, false, on); });
      CHECK(same_bits(before.leaves, truth.leaves) && same_bits(before.sums, truth.sums) &&
                same_bits(before.powers, truth.powers),
            "a sample changes its index");
      check_distinct(truth, k);
      everywhere("draw", [&](Owned& one, Device on) { one.sample(k, seed + count, true, on); });
      if (truth.found) check_spans(truth, seed + count);
      CHECK(truth.found == (truth.total() > 0 ? k : 0), "%lld of %lld draws", (long long)truth.found, (long long)k);
    }
  }
}

template <typename T>
struct Draws {
  std::vector<int64_t> indices;
  std::vector<T> probabilities;
  int64_t status[2] = {-9, -9};
  bool operator==(const Draws& other) const {
    return indices == other.indices && same_bits(probabilities, other.probabilities) && status[0] == other.status[0] &&
           status[1] == other.status[1];
  }
};

template <typename T>
Draws<T> drawn_from(const std::vector<T>& p, int64_t k, uint64_t seed, double alpha, Device on) {
  Draws<T> draws{std::vector<int64_t>(k, -7), std::vector<T>(k, NAN)};
#ifdef R1V2_FAST_EMULATED
  if (on.emulated) {
    std::vector<double> workspace(priority_draw_bytes(p.size()) / 8, NAN);
    priority_draw_cuda(p.data(), p.size(), k, seed, alpha, draws.indices.data(), draws.probabilities.data(), draws.status,
                       workspace.data(), workspace.size() * 8, 0, nullptr);
    return draws;
  }
#endif
  const Drawn seen = priority_draw_cpu(p.data(), p.size(), k, seed, alpha, draws.indices.data(), draws.probabilities.data(),
                                       on.threads);
  draws.status[0] = seen.positive, draws.status[1] = seen.first_bad;
  return draws;
}

template <typename T>
void check_draw(const char* kind, int64_t count, double alpha, uint64_t seed, const std::vector<Device>& others) {
  Random random(seed);
  const int64_t k = others[0].emulated ? 50 : count > 60000 ? 20000 : 200;
  std::vector<T> p(count);
  for (int64_t i = 0; i < count; ++i) p[i] = made<T>(kind, i, count, random);
  const Draws<T> truth = drawn_from(p, k, seed, alpha, {false, 1});
  for (Device on : others)
    CHECK(drawn_from(p, k, seed, alpha, on) == truth, "%lld %s, %zu bytes, alpha %g: %s with %d threads", (long long)count,
          kind, sizeof(T), alpha, on.emulated ? "the kernel" : "the CPU", on.threads);
  int64_t positive = 0, first_bad = -1;
  long double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (drawable(p[i])) ++positive, largest = std::max<long double>(largest, p[i]);
    if (!(p[i] >= 0 && p[i] < INFINITE_KEY) && first_bad < 0) first_bad = i;
  }
  CHECK(truth.status[0] == positive && truth.status[1] == first_bad, "%lld positive, bad at %lld", (long long)truth.status[0],
        (long long)truth.status[1]);
  std::vector<long double> upto(1, 0);
  for (T value : p) upto.push_back(upto.back() + (drawable(value) ? powl(value / largest, alpha) : 0));
  const long double total = upto.back(), slack = 1e-10L * total;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t leaf = truth.indices[i];
    if (positive == 0) {
      CHECK(leaf == -1 && truth.probabilities[i] == 0, "nothing can be drawn");
      continue;
    }
    const long double target = uniform53(philox(i, seed)) * total;
    CHECK(leaf >= 0 && leaf < count && drawable(p[leaf]), "draw %lld is %lld", (long long)i, (long long)leaf);
    CHECK(upto[leaf] <= target + slack && target <= upto[leaf + 1] + slack, "draw %lld: leaf %lld", (long long)i,
          (long long)leaf);
    const double share = static_cast<double>((upto[leaf + 1] - upto[leaf]) / total);
    CHECK(std::abs(truth.probabilities[i] - share) <= (sizeof(T) == 4 ? 1e-7 : 1e-9) * share + 1e-45, "probability %g, %g",
          double(truth.probabilities[i]), share);
  }
}

// Below it a chi-square of so many cells lies with probability 1 - 10^-4 (Wilson and Hilferty)
double quantile(double cells) {
  const double degrees = cells - 1, spread = 2 / (9 * degrees), root = 1 - spread + 3.72 * std::sqrt(spread);
  return degrees * root * root * root;
}

// Ordered draws of k against the probabilities of drawing one after the other. Where one index is heavy, the first round
// mostly brings nothing else
void check_distribution(const std::vector<float>& leaves, double alpha, int k) {
  const int64_t capacity = leaves.size(), samples = 120000;
  Owned owned(capacity, alpha);
  owned.leaves = leaves;
  owned.index.leaves = owned.leaves.data();
  owned.build({false, 1});
  std::vector<double> weights;
  for (float p : leaves) weights.push_back(p > 0 ? std::pow(p, alpha) : 0);
  int64_t cells = 1;
  for (int i = 0; i < k; ++i) cells *= capacity;
  std::vector<int64_t> counts(cells);
  for (int64_t seed = 0; seed < samples; ++seed) {
    owned.sample(k, seed, false, {false, 1});
    int64_t cell = 0;
    for (int64_t index : owned.drawn) cell = cell * capacity + index;
    ++counts[cell];
  }
  double chi_square = 0, kept = 0, rare = 0;
  int64_t rare_count = 0;
  for (int64_t cell = 0; cell < cells; ++cell) {
    std::vector<double> left = weights;
    double probability = 1;
    for (int64_t rest = cell, place = cells / capacity; place; rest %= place, place /= capacity) {
      double total = 0;
      for (double w : left) total += w;
      probability *= std::exchange(left[rest / place], 0.0) / total;
    }
    const double expected = probability * samples;
    CHECK(expected > 0 || counts[cell] == 0, "cell %lld cannot be drawn", (long long)cell);
    if (expected < 10) {
      rare += expected, rare_count += counts[cell];
      continue;
    }
    chi_square += (counts[cell] - expected) * (counts[cell] - expected) / expected, ++kept;
  }
  if (rare >= 10) chi_square += (rare_count - rare) * (rare_count - rare) / rare, ++kept;
  CHECK(kept > 3 && chi_square < quantile(kept), "alpha %g, k = %d: chi-square %g in %g cells", alpha, k, chi_square, kept);
}

// The same number from every build on every machine
uint64_t checksum() {
  uint64_t sum = 0xcbf29ce484222325u;
  const auto add = [&](uint64_t word) { sum = (sum ^ word) * 0x100000001b3u; };
  for (double alpha : {1.0, 0.6}) {
    Random random(7);
    Owned owned(70000, alpha);
    for (float& p : owned.leaves) p = made<float>("extreme", 0, 1, random);
    owned.build({false, 1});
    for (double value : owned.sums) add(bits_as<uint64_t>(value));
    owned.sample(500, 3, false, {false, 1});
    for (int i = 0; i < 500; ++i) add(owned.drawn[i]), add(bits_as<uint32_t>(owned.probabilities[i]));
    const std::vector<double> p(owned.leaves.begin(), owned.leaves.end());
    const Draws<double> draws = drawn_from(p, 500, 5, alpha, {false, 1});
    for (int i = 0; i < 500; ++i) add(draws.indices[i]), add(bits_as<uint64_t>(draws.probabilities[i]));
  }
  return sum;
}

}  // namespace

int main(int arguments, char** values) {
  const uint64_t seed = arguments > 1 ? std::strtoull(values[1], nullptr, 10) : 1;
#ifdef R1V2_FAST_EMULATED
  emulated::resident = 2;
  emulated::seed(seed);  // 0 runs threads in order
  const std::vector<Device> others = {{true, 0}};
  const std::vector<int64_t> capacities = {1, 300, 65537};
#else
  const std::vector<Device> others = {{false, 2}, {false, 7}};
  const std::vector<int64_t> capacities = {1, 7, 8, 255, 256, 257, 4099, 65536, 65537, 200003};
#endif
  for (const char* kind : {"uniform", "extreme", "sparse", "heavy", "one", "zero", "tiny", "bad"}) {
    const bool plain = kind[0] == 'u';
    for (double alpha : {1.0, 0.5, 2.0, 0.0, 6.0}) {
      for (int64_t capacity : capacities) {
        if (capacity > 5000 && !(plain && alpha < 2.0 && alpha > 0.0)) continue;
        check_index(kind, capacity, alpha, seed, others);
      }
    }
    for (double alpha : {1.0, 0.5, 6.0, 40.0}) {
      for (int64_t count : {1, 600, plain ? 70001 : 300}) {
        check_draw<float>(kind, count, alpha, seed, others);
        check_draw<double>(kind, count, alpha, seed, others);
      }
    }
  }
#ifndef R1V2_FAST_EMULATED
  for (double alpha : {0.5, 1.0, 2.0}) {
    for (int k : {1, 2, 3}) {
      check_distribution({1, 2, 0, 3, 4, 0.5f}, alpha, k);
      check_distribution({1, 60, 0, 3, 5}, alpha, k);
    }
  }
#endif
  std::printf("drawn as the sums say, %016llx\n", static_cast<unsigned long long>(checksum()));
}
