// The twin for CPUs.
#include "priority_draw.h"

#include <algorithm>
#include <vector>

#include "block_sums_cpu.h"
#include "lanes.h"

namespace r1v2_fast {
namespace {

constexpr int64_t SERIAL_BELOW = 1 << 14;  // leaves or draws, below which a thread costs more to start than it saves
constexpr int64_t CHUNK = 64;              // blocks

struct Seen {
  double largest = 0.0;
  int32_t positive = 0, bad = 0;
};

template <typename T>
ALWAYS_INLINE Seen seen(const T* p, int64_t count) {
  T largest = 0;
  int32_t positive = 0, bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool good = (p[i] > 0) & (p[i] < INFINITE_KEY);
    largest = std::max(largest, good ? p[i] : T(0));
    positive += good;
    bad += !good & !(p[i] == 0);
  }
  return {largest, positive, bad};
}
LANE_CLONES Seen look(const float* p, int64_t count) { return seen(p, count); }
LANE_CLONES Seen look(const double* p, int64_t count) { return seen(p, count); }

// What each chunk holds, and then chunk_done(first block, end) while it lies in the cache
template <typename T, typename Done>
Drawn look_over(const T* p, int64_t count, int threads, double& largest, const Done& chunk_done) {
  const int64_t each = CHUNK * FAN, chunks = (count + each - 1) / each, blocks = SumLevels(count).size[1];
  std::vector<Seen> parts(chunks);
  parallel_chunks(chunks, threads, [&](int64_t c) {
    parts[c] = look(p + c * each, std::min(each, count - c * each));
    chunk_done(c * CHUNK, std::min(blocks, (c + 1) * CHUNK));
  });
  Drawn drawn;
  for (int64_t c = 0; c < chunks; ++c) {
    largest = std::max(largest, parts[c].largest);
    drawn.positive += parts[c].positive;
    for (int64_t i = c * each; parts[c].bad && drawn.first_bad < 0; ++i)
      if (!(p[i] >= 0 && p[i] < INFINITE_KEY)) drawn.first_bad = i;
  }
  return drawn;
}

template <typename T, typename Weigh>
Drawn make_and_draw(const T* p, int64_t count, int64_t k, uint64_t seed, Weigh weigh, int64_t* indices,
                    T* probabilities, int threads) {
  const int workers = count < SERIAL_BELOW ? 1 : threads;
  const SumLevels levels(count);
  std::vector<double> sums(levels.doubles()), masses(k);
  const BlockSums<T> blocks{p, sums.data(), levels};
  const auto make_blocks = [&](int64_t first, int64_t end) {
    for (int64_t node = first; node < end; ++node) make_node(blocks, 1, node, weigh);
  };
  double largest = 0.0;
  Drawn drawn;
  if (weigh.template in_range<T>()) {
    drawn = look_over(p, count, workers, largest, make_blocks);
  } else {
    drawn = look_over(p, count, workers, largest, [](int64_t, int64_t) {});
    if (drawn.positive) weigh.refer_to(largest);
    make_level(blocks, 1, weigh, workers);
  }
  for (int level = 2; level <= levels.last; ++level) make_level(blocks, level, weigh, workers);
  const int64_t made = drawn.positive ? k : 0;
  draw_leaves(blocks, weigh, 0, made, seed, indices, masses.data(), k < SERIAL_BELOW ? 1 : threads);
  for (int64_t i = 0; i < k; ++i) {
    indices[i] = i < made ? indices[i] : -1;
    probabilities[i] = i < made ? static_cast<T>(masses[i] / blocks.total()) : T(0);
  }
  return drawn;
}

}  // namespace

template <typename T>
Drawn priority_draw_cpu(const T* priorities, int64_t count, int64_t k, uint64_t seed, double alpha, int64_t* indices,
                        T* probabilities, int threads) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (alpha == 1.0) return make_and_draw(priorities, count, k, seed, Plain(), indices, probabilities, threads);
  }
  return make_and_draw(priorities, count, k, seed, Power{alpha}, indices, probabilities, threads);
}

template Drawn priority_draw_cpu(const float*, int64_t, int64_t, uint64_t, double, int64_t*, float*, int);
template Drawn priority_draw_cpu(const double*, int64_t, int64_t, uint64_t, double, int64_t*, double*, int);

}  // namespace r1v2_fast
