// The row pass of linear_logprobs in one read of the logits, on sm_90 and newer: kernels/linear_logprob.py tells what
// it makes, docs/kernels.md how.
#pragma once

#include <cstdint>

namespace r1v2_fast {

enum class Stored : int { none = 0, fp32 = 1, bf16 = 2, fp16 = 3 };

// n rows of V logits, m a row's maximum. Rows of logits and of the matrix start at multiples of 16 bytes; columns from
// V to the next multiple of 4 are read, and written in the matrix.
struct LogprobRows {
  const float* logits;        // [n, V] rows `stride` apart
  const int64_t* targets;     // [n]; an id outside [0, V) is another shard's, or ignored
  const float* temperatures;  // [n], or null: `temperature` for all
  const float* bias;          // [V], 16-byte aligned, or null
  const uint8_t* blocked;     // [V], 4-byte aligned, not 0 where an id is forbidden, or null
  float* raw;                 // [10, n] rows `raw_stride` apart, out: Raw of r1v2_fast/ops/_linear_logprob_rows.py
  void* matrix;  // D [n, V] of dtype `stored`, rows `matrix_stride` apart, out; fp32 may lie over the logits
  int64_t rows, vocabulary, stride, raw_stride, matrix_stride;
  float logit_scale;
  float softcap;  // 0: none
  float temperature;
  Stored stored;  // D's dtype; none: no gradient
  bool own;       // D holds the target's entry, else 0 there
  bool entropy, top1, mean, squares;
  unsigned cluster = 0;  // blocks a row, up to 8; 0: the fewest that leave room for three on an SM
};

// Throws where the device is older than sm_90, or V beyond linear_logprob_rows_limit or what `cluster` blocks hold.
void linear_logprob_rows(const LogprobRows& rows, int device, void* stream);

// The longest V that the device takes; 0 below sm_90.
int64_t linear_logprob_rows_limit(int device);

}  // namespace r1v2_fast
