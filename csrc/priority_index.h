// PriorityIndex: priorities that change a few at a time, and draws from them at a cost that does not grow with their
// number. Draws without replacement are draws with it whose repeats are skipped. A round makes some; where they brought too
// few, what they brought weighs nothing in the next, and has its weight back in the end: sequential weighted sampling,
// however skew.
#pragma once

#include <cstdint>

#include "block_sums.h"

namespace r1v2_fast {

struct PriorityIndex {
  int64_t capacity;
  double alpha;    // [0, PLAIN_POWER]
  float* leaves;   // [capacity] p
  double* powers;  // [capacity] p^alpha; null where alpha is 1, since it would be p
  double* sums;    // [SumLevels(capacity).doubles()] over p^alpha
};

// Powers and sums of the leaves that are there
void priority_index_build_cpu(const PriorityIndex& index, int threads);

// The last of several priorities for an index counts; an index out of range, or a priority that is NaN, infinite or
// negative, changes nothing
void priority_index_update_cpu(const PriorityIndex& index, const int64_t* indices, const float* priorities,
                               int64_t count, int threads);

// How many were drawn. indices [k], -1 behind those; probabilities [k] of a single draw, 0 behind. Leaves and sums
// change meanwhile, and have their bits again in the end
int64_t priority_index_sample_cpu(const PriorityIndex& index, int64_t k, uint64_t seed, bool replacement,
                                  int64_t* indices, float* probabilities, int threads);

// The same on the GPU, without a sync. Workspaces: 16-byte aligned, of so many bytes
int64_t priority_index_update_bytes(int64_t count);
int64_t priority_index_sample_bytes(int64_t capacity, int64_t k, bool replacement);

void priority_index_build_cuda(const PriorityIndex& index, int device, void* stream);
void priority_index_update_cuda(const PriorityIndex& index, const int64_t* indices, const float* priorities,
                                int64_t count, void* workspace, int64_t workspace_bytes, int device, void* stream);
// drawn [1], on the device
void priority_index_sample_cuda(const PriorityIndex& index, int64_t k, uint64_t seed, bool replacement,
                                int64_t* indices, float* probabilities, int64_t* drawn, void* workspace,
                                int64_t workspace_bytes, int device, void* stream);

}  // namespace r1v2_fast
