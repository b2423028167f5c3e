#include "priority_sample.h"

namespace r1v2_fast {

template <typename T>
void race_keys_cpu(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha) {
  for (int64_t i = 0; i < count; ++i) keys[i] = race_key(priorities[i], i, seed, alpha);
}

template void race_keys_cpu(const float*, double*, int64_t, uint64_t, double);
template void race_keys_cpu(const double*, double*, int64_t, uint64_t, double);

}  // namespace r1v2_fast
