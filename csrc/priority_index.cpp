// The twin for CPUs. A thread owns a range of nodes and passes over all indices, so that no two write the same leaf.
#include "priority_index.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "block_sums_cpu.h"

namespace r1v2_fast {
namespace {

constexpr int64_t SERIAL_BELOW = 1 << 14;  // a few milliseconds: on a busy machine a thread may start later than that
constexpr int64_t AHEAD = 16;           // updates whose blocks are on their way from memory

int threads_for(int64_t count, int threads) { return count < SERIAL_BELOW ? 1 : threads; }

// run(sums, weights): weights is what the sums are over
template <typename Run>
auto with_weights(const PriorityIndex& index, const Run& run) {
  const auto given = [&](auto* weights) {
    return run(BlockSums<std::decay_t<decltype(*weights)>>{weights, index.sums, SumLevels(index.capacity)}, weights);
  };
  return index.powers ? given(index.powers) : given(index.leaves);
}

// The nodes of a level in [first, end) that are above one of the indices; all of them where that is no more work
template <typename Sums>
void remake(const Sums& sums, int level, const int64_t* indices, int64_t count, int64_t first, int64_t end) {
  const int64_t capacity = sums.levels.size[0];
  const auto in_range = [&](int64_t i) { return i < count && indices[i] >= 0 && indices[i] < capacity; };
  if (count >= sums.levels.size[level]) {
    for (int64_t node = first; node < end; ++node) make_node(sums, level, node, Plain());
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (level == 1 && in_range(i + AHEAD)) {
      const int64_t ahead = indices[i + AHEAD] >> FAN_BITS;
      fetch(sums.leaves + ahead * FAN, FAN * sizeof(*sums.leaves));
      fetch(sums.upto(1, ahead), FAN_LANES * sizeof(double));
    }
    const int64_t node = in_range(i) ? indices[i] >> FAN_BITS * level : -1;
    if (node >= first && node < end) make_node(sums, level, node, Plain());
  }
}

template <typename Sums>
void remake_above(const Sums& sums, int from, const int64_t* indices, int64_t count, int threads) {
  for (int level = from; level <= sums.levels.last; ++level) {
    const int workers = threads_for(std::min(count, sums.levels.size[level]), threads);
    over_nodes(sums.levels.size[level], workers, workers,
               [&](int64_t first, int64_t end) { remake(sums, level, indices, count, first, end); });
  }
}

// Indices seen before, among up to `most`
class Seen {
 public:
  explicit Seen(int64_t most) {
    while ((int64_t{1} << bits_) < 2 * most) ++bits_;
    slots_.resize(int64_t{1} << bits_);
  }
  void clear() { std::fill(slots_.begin(), slots_.end(), -1); }
  bool add(int64_t index) {
    const uint64_t mask = slots_.size() - 1;
    uint64_t slot = hashed(index) & mask;
    for (; slots_[slot] >= 0; slot = (slot + 1) & mask)
      if (slots_[slot] == index) return false;
    slots_[slot] = index;
    return true;
  }

 private:
  uint64_t hashed(int64_t index) const { return static_cast<uint64_t>(index) * 0x9E3779B97F4A7C15u >> (64 - bits_); }
  int bits_ = 1;
  std::vector<int64_t> slots_;
};

// distinct indices and what they weigh, [most]; how many were found
template <typename Sums, typename Leaf>
int64_t drawn_once(const Sums& sums, Leaf* weights, int64_t most, uint64_t seed, int64_t* indices, double* masses,
                   int threads) {
  const int64_t room = draws_of_round(most);
  std::vector<int64_t> drawn(room);
  std::vector<double> mass(room);
  Seen seen(room);
  int64_t found = 0, dropped = 0;
  for (uint64_t number = 0; found < most && sums.total() > 0.0;) {
    const int64_t draws = draws_of_round(most - found);
    draw_leaves(sums, Plain(), number, draws, seed, drawn.data(), mass.data(), threads_for(draws, threads));
    number += draws;
    seen.clear();
    for (int64_t i = 0; i < draws && found < most; ++i) {
      if (!seen.add(drawn[i])) continue;
      indices[found] = drawn[i];
      masses[found++] = mass[i];
    }
    if (found == most) break;
    for (int64_t i = dropped; i < found; ++i) weights[indices[i]] = 0;
    remake_above(sums, 1, indices + dropped, found - dropped, threads);
    dropped = found;
  }
  for (int64_t i = 0; i < dropped; ++i) weights[indices[i]] = static_cast<Leaf>(masses[i]);
  if (dropped) remake_above(sums, 1, indices, dropped, threads);
  return found;
}

}  // namespace

void priority_index_build_cpu(const PriorityIndex& index, int threads) {
  const Power weigh{index.alpha, 0};
  with_weights(index, [&](const auto& sums, auto*) {
    over_nodes(index.powers ? sums.levels.size[1] : 0, threads, threads, [&](int64_t first, int64_t end) {
      const int64_t leaf = first * FAN;
      powers(index.powers + leaf, index.leaves + leaf, std::min(index.capacity, end * FAN) - leaf, weigh);
    });
    for (int level = 1; level <= sums.levels.last; ++level) make_level(sums, level, Plain(), threads);
  });
}

void priority_index_update_cpu(const PriorityIndex& index, const int64_t* indices, const float* priorities,
                               int64_t count, int threads) {
  const Power weigh{index.alpha, 0};
  const int workers = threads_for(count, threads);
  with_weights(index, [&](const auto& sums, auto*) {
    over_nodes(sums.levels.size[1], workers, workers, [&](int64_t first, int64_t end) {
      const int64_t first_leaf = first * FAN, end_leaf = std::min(index.capacity, end * FAN);
      for (int64_t i = 0; i < count; ++i) {
        const float p = priorities[i];
        if (indices[i] < first_leaf || indices[i] >= end_leaf || !(p >= 0.0f && p < INFINITE_KEY)) continue;
        index.leaves[indices[i]] = p > 0.0f ? p : 0.0f;  // no -0
        if (index.powers) index.powers[indices[i]] = weigh(p);
      }
      remake(sums, 1, indices, count, first, end);
    });
    remake_above(sums, 2, indices, count, threads);
  });
}

int64_t priority_index_sample_cpu(const PriorityIndex& index, int64_t k, uint64_t seed, bool replacement,
                                  int64_t* indices, float* probabilities, int threads) {
  std::vector<double> masses(k);
  return with_weights(index, [&](const auto& sums, auto* weights) {
    const double total = sums.total();
    int64_t found = 0;
    if (!replacement) {
      found = drawn_once(sums, weights, std::min(k, index.capacity), seed, indices, masses.data(), threads);
    } else if (total > 0.0) {
      draw_leaves(sums, Plain(), 0, k, seed, indices, masses.data(), threads_for(k, threads));
      found = k;
    }
    for (int64_t i = 0; i < k; ++i) {
      indices[i] = i < found ? indices[i] : -1;
      probabilities[i] = i < found ? static_cast<float>(masses[i] / total) : 0.0f;
    }
    return found;
  });
}

}  // namespace r1v2_fast
