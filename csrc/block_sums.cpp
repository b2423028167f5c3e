#include "block_sums_cpu.h"
#include "lanes.h"

namespace r1v2_fast {
namespace {

template <typename T, typename Weigh>
ALWAYS_INLINE void summed(double* upto, const T* children, int count, const Weigh& weigh) {
  double weights[FAN], lanes[FAN_LANES];
  for (int i = 0; i < count; ++i) weights[i] = weigh(children[i]);
  for (int i = count; i < FAN; ++i) weights[i] = 0.0;
  for (int lane = 0; lane < FAN_LANES; ++lane) lanes[lane] = weights[lane * FAN_EACH];
  for (int i = 1; i < FAN_EACH; ++i)
    for (int lane = 0; lane < FAN_LANES; ++lane) lanes[lane] += weights[lane * FAN_EACH + i];
  for (int i = 1; i < FAN_GROUP; ++i)
    for (int group = 0; group < FAN_LANES; group += FAN_GROUP) lanes[group + i] += lanes[group + i - 1];
  for (int group = FAN_GROUP; group < FAN_LANES; group += FAN_GROUP)
    for (int i = 0; i < FAN_GROUP; ++i) lanes[group + i] += lanes[group - 1];
  for (int lane = 0; lane < FAN_LANES; ++lane) upto[lane] = lanes[lane];
}

}  // namespace

LANE_CLONES void sums_upto(double* upto, const float* p, int count, Plain weigh) { summed(upto, p, count, weigh); }
LANE_CLONES void sums_upto(double* upto, const double* p, int count, Plain weigh) { summed(upto, p, count, weigh); }
LANE_CLONES void sums_upto(double* upto, const float* p, int count, Power weigh) { summed(upto, p, count, weigh); }
LANE_CLONES void sums_upto(double* upto, const double* p, int count, Power weigh) { summed(upto, p, count, weigh); }

LANE_CLONES void powers(double* to, const float* p, int64_t count, Power power) {
  for (int64_t i = 0; i < count; ++i) to[i] = power(p[i]);
}

}  // namespace r1v2_fast
