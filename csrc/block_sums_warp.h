// A warp's side of block_sums.h: a lane of a node is a lane of the warp.
#pragma once

#include <type_traits>

#include "block_sums.h"
#include "launch.h"

namespace r1v2_fast {

// What the lane's 8 children are, as they are stored
template <typename T>
__device__ __forceinline__ void load_lane(const T* children, int64_t count, T (&values)[FAN_EACH]) {
  constexpr int WIDTH = 16 / sizeof(T);
  struct alignas(16) Vector {
    T values[WIDTH];
  };
  const int first = static_cast<int>(threadIdx.x % FAN_LANES) * FAN_EACH;
  if (first + FAN_EACH <= count) {
    UNROLLED
    for (int i = 0; i < FAN_EACH; i += WIDTH) {
      const Vector vector = *reinterpret_cast<const Vector*>(children + first + i);
      UNROLLED
      for (int j = 0; j < WIDTH; ++j) values[i + j] = vector.values[j];
    }
  } else {
    UNROLLED
    for (int i = 0; i < FAN_EACH; ++i) values[i] = first + i < count ? children[first + i] : T(0);
  }
}

template <typename Leaf, typename T, typename Weigh>
__device__ __forceinline__ void store_node(const BlockSums<Leaf>& sums, int level, int64_t node,
                                           const T (&values)[FAN_EACH], const Weigh& weigh) {
  const int lane = threadIdx.x % FAN_LANES;
  double sum = weigh(values[0]);
  UNROLLED
  for (int i = 1; i < FAN_EACH; ++i) sum += weigh(values[i]);
  UNROLLED
  for (int i = 1; i < FAN_GROUP; ++i) {
    const double before = __shfl_up_sync(~0u, sum, 1);
    if (lane % FAN_GROUP == i) sum += before;
  }
  UNROLLED
  for (int group = 1; group < FAN_LANES / FAN_GROUP; ++group) {
    const double before = __shfl_sync(~0u, sum, group * FAN_GROUP - 1);
    if (lane / FAN_GROUP == group) sum += before;
  }
  sums.upto(level, node)[lane] = sum;
  if (lane == FAN_LANES - 1) sums.sums[sums.levels.first[level] + node] = sum;
}

template <typename Leaf, typename Weigh>
__device__ __forceinline__ void make_node(const BlockSums<Leaf>& sums, int level, int64_t node, const Weigh& weigh) {
  sums.from_child(level - 1, node * FAN, weigh, [&](auto* children, int64_t count, const auto& weighed) {
    std::decay_t<decltype(*children)> values[FAN_EACH];
    load_lane(children, count, values);
    store_node(sums, level, node, values, weighed);
  });
}

// The leaf of a warp's draw, and what it weighs; the total is positive
template <typename Leaf, typename Weigh>
__device__ __forceinline__ int64_t drawn_leaf(const BlockSums<Leaf>& sums, const Weigh& weigh, double target,
                                              double& weight) {
  const int own = threadIdx.x % FAN_LANES;
  int64_t node = 0;
  for (int level = sums.levels.last; level > 0; --level) {
    const double upto = sums.upto(level, node)[own], sum = __shfl_sync(~0u, upto, FAN_LANES - 1);
    const unsigned before = __ballot_sync(~0u, upto <= target), short_of_sum = __ballot_sync(~0u, upto < sum);
    const int lane = __popc(before) < FAN_LANES ? __popc(before) : __popc(short_of_sum);
    const double taken_off = __shfl_sync(~0u, upto, lane ? lane - 1 : 0);
    target = lane ? target - taken_off : target;
    node = node * FAN + lane * FAN_EACH;
    const double child = sums.from_child(level - 1, node, weigh, [&](auto* children, int64_t count, const auto& weighed) {
      return own % FAN_EACH < count ? weighed(children[own % FAN_EACH]) : 0.0;
    });
    double weights[FAN_EACH];
    UNROLLED
    for (int i = 0; i < FAN_EACH; ++i) weights[i] = __shfl_sync(~0u, child, i);
    const Choice choice = chosen_in_lane(weights, target);
    node += choice.child;
    target = choice.rest;
    weight = __shfl_sync(~0u, child, choice.child);
  }
  return node;
}

}  // namespace r1v2_fast
