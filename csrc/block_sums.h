// Sums over weights and draws from them: a tree, 256 children to a node, whose leaves are the weights and whose root is the
// total. A node keeps its sum and, for 32 lanes of 8 children, the sum up to each lane: a draw reads those and one lane.
// Every addition has its place, on a CPU as in a warp: a lane's children one by one, 8 lanes one by one, 4 such groups one by
// one. So sums are a function of the weights alone, and the same draws fall on the same leaves, bit for bit, everywhere. In
// that order sums never fall, and a lane that weighs nothing adds nothing: it is never drawn.
#pragma once

#include <cstdint>

#include "philox.h"
#include "race.h"

namespace r1v2_fast {

constexpr int FAN = 256, FAN_BITS = 8, FAN_LANES = 32, FAN_EACH = FAN / FAN_LANES, FAN_GROUP = 8;

// Level 0 are the leaves; a node of level l is above 256 of level l - 1; the last level is the root
struct SumLevels {
  static constexpr int MOST = 6;  // 2^48 leaves
  int last = 0;
  int64_t size[MOST + 1] = {};   // nodes of a level
  int64_t first[MOST + 1] = {};  // of a level's nodes among all nodes; leaves lie elsewhere

  explicit SumLevels(int64_t leaves) {
    size[0] = leaves;
    do {
      first[last + 1] = nodes();
      size[last + 1] = size[last] > FAN ? (size[last] + FAN - 1) / FAN : 1;
      ++last;
    } while (size[last] > 1);
  }
  HOST_DEVICE int64_t root() const { return first[last]; }
  HOST_DEVICE int64_t nodes() const { return last ? (first[last] + size[last] + 15) / 16 * 16 : 0; }  // full cache lines
  HOST_DEVICE int64_t doubles() const { return nodes() * (1 + FAN_LANES); }  // that they need
};

// Up to here the power of a float, and the sum of 2^48 such, is a normal double as it is; else powers are relative to the
// largest
constexpr double PLAIN_POWER = 6.0;

// p^alpha; 0 for what cannot be drawn
struct Plain {  // alpha = 1
  template <typename T>
  HOST_DEVICE double operator()(T p) const {
    return drawable(p) ? static_cast<double>(p) : 0.0;
  }
  template <typename T>
  HOST_DEVICE bool in_range() const {
    return true;
  }
  HOST_DEVICE void refer_to(double) {}
};

struct Power {  // times 2^-reference
  double alpha;
  int32_t reference = 0;
  HOST_DEVICE double operator()(double p) const {
    const bool good = drawable(p);
    const Mass mass = power(good ? p : 1.0, alpha);
    return good ? shrunk(mass.scale, mass.exponent - reference) : 0.0;
  }
  template <typename T>
  HOST_DEVICE bool in_range() const {
    return sizeof(T) == sizeof(float) && alpha <= PLAIN_POWER;
  }
  HOST_DEVICE void refer_to(double largest) { reference = power(largest, alpha).exponent; }
};

template <typename Leaf>
struct BlockSums {
  const Leaf* leaves;  // 16-byte aligned
  double* sums;        // [levels.doubles()], 16-byte aligned: sums of all nodes, then 32 sums up to a lane of each
  SumLevels levels;

  HOST_DEVICE double total() const { return sums[levels.root()]; }
  HOST_DEVICE double* upto(int level, int64_t node) const {
    return sums + levels.nodes() + (levels.first[level] + node) * FAN_LANES;
  }
  // run(children, how many there are, what weighs them): of `level`, from a node's or a lane's first one on
  template <typename Weigh, typename Run>
  HOST_DEVICE auto from_child(int level, int64_t child, const Weigh& weigh, const Run& run) const {
    const int64_t count = levels.size[level] - child;
    if (level == 0) return run(leaves + child, count, weigh);
    return run(static_cast<const double*>(sums + levels.first[level] + child), count, Plain());
  }
};

struct Choice {
  int child;
  double rest;  // of the target, with what lies before the child taken off
};

// The child of a lane whose span holds the target. Rounding may push it past the end: then the last that weighs something
HOST_DEVICE Choice chosen_in_lane(const double (&weights)[FAN_EACH], double target) {
  Choice choice{0, 0.0};
  double sum = 0.0;
  bool found = false;
UNROLLED
  for (int i = 0; i < FAN_EACH; ++i) {
    const bool candidate = !found & (weights[i] > 0.0);
    choice = candidate ? Choice{i, target - sum} : choice;
    sum += weights[i];
    found |= candidate & (target < sum);
  }
  return choice;
}

// Draw `number` of a seed's: [0, total]
HOST_DEVICE double target_of_draw(uint64_t number, uint64_t seed, double total) {
  return uniform53(philox(number, seed)) * total;
}

// Draws that a round makes for so many more distinct indices: few too many where repeats are rare, and no end of rounds else
HOST_DEVICE int64_t draws_of_round(int64_t needed) { return needed + needed / 4 + 32; }

}  // namespace r1v2_fast
