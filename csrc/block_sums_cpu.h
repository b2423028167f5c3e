// A CPU's side of block_sums.h.
#pragma once

#include <algorithm>

#include "block_sums.h"
#include "parallel.h"

namespace r1v2_fast {

// The sums of up to 256 children up to each of 32 lanes
void sums_upto(double* upto, const float* children, int count, Plain weigh);
void sums_upto(double* upto, const double* children, int count, Plain weigh);
void sums_upto(double* upto, const float* children, int count, Power weigh);
void sums_upto(double* upto, const double* children, int count, Power weigh);

void powers(double* to, const float* priorities, int64_t count, Power power);

template <typename Leaf, typename Weigh>
void make_node(const BlockSums<Leaf>& sums, int level, int64_t node, const Weigh& weigh) {
  double* upto = sums.upto(level, node);
  sums.from_child(level - 1, node * FAN, weigh, [&](auto* children, int64_t count, const auto& weighed) {
    sums_upto(upto, children, static_cast<int>(std::min<int64_t>(count, FAN)), weighed);
  });
  sums.sums[sums.levels.first[level] + node] = upto[FAN_LANES - 1];
}

// run(first, end) on ranges of a level's nodes
template <typename Run>
void over_nodes(int64_t nodes, int64_t ranges, int threads, const Run& run) {
  const int64_t each = std::max<int64_t>((nodes + ranges - 1) / ranges, 1);
  parallel_chunks((nodes + each - 1) / each, threads, [&](int64_t r) { run(r * each, std::min(nodes, (r + 1) * each)); });
}

template <typename Leaf, typename Weigh>
void make_level(const BlockSums<Leaf>& sums, int level, const Weigh& weigh, int threads) {
  const int64_t size = sums.levels.size[level];
  over_nodes(size, (size + 255) / 256, threads, [&](int64_t first, int64_t end) {
    for (int64_t node = first; node < end; ++node) make_node(sums, level, node, weigh);
  });
}

inline void fetch(const void* from, int64_t bytes) {  // on its way from memory
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// first child of the lane that holds the target, with the rest of it
inline Choice chosen_lane(const double* upto, double target) {
  const double sum = upto[FAN_LANES - 1];
  int before = 0, short_of_sum = 0;
  for (int i = 0; i < FAN_LANES; ++i) {
    before += upto[i] <= target;
    short_of_sum += upto[i] < sum;
  }
  const int lane = before < FAN_LANES ? before : short_of_sum;
  return {lane * FAN_EACH, lane ? target - upto[lane - 1] : target};
}

template <typename Leaf, typename Weigh>
Choice chosen_child(const BlockSums<Leaf>& sums, int level, int64_t first, const Weigh& weigh, double target,
                    double* weight) {
  return sums.from_child(level, first, weigh, [&](auto* children, int64_t count, const auto& weighed) {
    double weights[FAN_EACH];
    for (int i = 0; i < FAN_EACH; ++i) weights[i] = i < count ? weighed(children[i]) : 0.0;
    const Choice choice = chosen_in_lane(weights, target);
    *weight = weights[choice.child];
    return choice;
  });
}

// Draws first, first + 1, ...: their leaves and what those weigh; the total is positive
template <typename Leaf, typename Weigh>
void draw_leaves(const BlockSums<Leaf>& sums, const Weigh& weigh, uint64_t first, int64_t count, uint64_t seed,
                 int64_t* indices, double* weights, int threads) {
  constexpr int64_t CHUNK = 256, BATCH = 16;  // draws whose blocks are on their way from memory at once
  const SumLevels& levels = sums.levels;
  const auto draw_batch = [&](uint64_t number, int64_t length, int64_t* nodes, double* weight) {
    double targets[BATCH];
    for (int i = 0; i < length; ++i) {
      targets[i] = target_of_draw(number + i, seed, sums.total());
      nodes[i] = 0;
      for (int level = levels.last; level > 1; --level) {
        const Choice lane = chosen_lane(sums.upto(level, nodes[i]), targets[i]);
        const Choice choice = chosen_child(sums, level - 1, nodes[i] * FAN + lane.child, weigh, lane.rest, weight + i);
        nodes[i] = nodes[i] * FAN + lane.child + choice.child;
        targets[i] = choice.rest;
      }
      fetch(sums.upto(1, nodes[i]), FAN_LANES * sizeof(double));
    }
    for (int i = 0; i < length; ++i) {
      const Choice lane = chosen_lane(sums.upto(1, nodes[i]), targets[i]);
      nodes[i] = nodes[i] * FAN + lane.child;
      targets[i] = lane.rest;
      fetch(sums.leaves + nodes[i], 1);
    }
    for (int i = 0; i < length; ++i) nodes[i] += chosen_child(sums, 0, nodes[i], weigh, targets[i], weight + i).child;
  };
  parallel_chunks((count + CHUNK - 1) / CHUNK, threads, [&](int64_t chunk) {
    const int64_t end = std::min(count, (chunk + 1) * CHUNK);
    for (int64_t i = chunk * CHUNK; i < end; i += BATCH)
      draw_batch(first + i, std::min<int64_t>(BATCH, end - i), indices + i, weights + i);
  });
}

}  // namespace r1v2_fast
