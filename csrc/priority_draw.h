// sample_by_priority with replacement: block sums of p^alpha made in one pass, then k draws, each on its own.
#pragma once

#include <cstdint>

#include "block_sums.h"
#include "priority_sample.h"

namespace r1v2_fast {

// indices [k], all -1 where nothing can be drawn; probabilities [k], p^alpha / sum
template <typename T>
Drawn priority_draw_cpu(const T* priorities, int64_t count, int64_t k, uint64_t seed, double alpha, int64_t* indices,
                        T* probabilities, int threads);

// The same on the GPU, without a sync. priorities and workspace: 16-byte aligned; status [2] there: positive, first_bad
int64_t priority_draw_bytes(int64_t count);
template <typename T>
void priority_draw_cuda(const T* priorities, int64_t count, int64_t k, uint64_t seed, double alpha, int64_t* indices,
                        T* probabilities, int64_t* status, void* workspace, int64_t workspace_bytes, int device,
                        void* stream);

}  // namespace r1v2_fast
