// A cluster of blocks holds one row of logits in its shared memory, fed by bulk copies: m is known before D is written,
// so in any dtype every logit is read from memory once, and D has no factor to correct: 4 bytes read, 2 (bf16) written.
//
// n rows, V vocabulary, m a row's maximum, D = exp(z - m) f. Not persistent: up to V = 152,064 three blocks share an SM,
// so copies of one row overlap the arithmetic of another without a second buffer in any. Sums run in an order that V
// alone fixes: a row gives the same bits in a batch of any size.
#include "linear_logprob_rows.h"

#include <algorithm>
#include <string>
#include <type_traits>

#include "async_copy.h"
#include "launch.h"
#include "linear_logprob_rows_terms.h"

namespace r1v2_fast {
namespace {

constexpr int kThreads = 384, kWarps = kThreads / 32;  // three blocks an SM leave 56 registers a thread
constexpr int kMaxCluster = 8;                         // what every device has room for
constexpr int kMaxSlice = 32768;                       // logits a block holds
constexpr int kChunk = 3 * kThreads;  // groups of 4 logits a copy: the first pass works on what has arrived
constexpr int kMaxChunks = (kMaxSlice / 4 + kChunk - 1) / kChunk;
constexpr int kAlign = 32;                               // logits: slices share no 64-byte sector of D
constexpr int64_t kThirdOfAnSm = 228 * 1024 / 3 - 1024;  // sm_90 and sm_100 keep 1 KiB a block
constexpr float kLowest = -1e30f;                        // a slice of forbidden ids has no maximum
constexpr float kFp16Scale = 0x1p-15f;                   // fp16 stores p 2^15: it would go subnormal below 6e-5

enum Sum { kOthers, kWeighted, kSquares, kTotal, kAllowed, kBeaten, kSums };

struct Scratch {
  uint64_t arrived[kMaxChunks];
  float tops[kMaxCluster];  // of the cluster's blocks, each stored by its own
  float target, factor;     // stored by the block that has the target
  float sums[kMaxCluster][kSums];
  float of_warp[kWarps][kSums];
};

struct None {};

// Logits a block holds.
__host__ __device__ inline int slice_of(int64_t vocabulary, unsigned cluster) {
  const int64_t each = (vocabulary + cluster - 1) / cluster;
  return static_cast<int>((each + kAlign - 1) / kAlign * kAlign);
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {  // not of NaN, which reaches the sums
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

// The cluster's sums, in the order of its blocks, in every thread of it.
template <int COUNT>
__device__ __forceinline__ void add_up(Scratch& scratch, float (&values)[COUNT], unsigned rank, unsigned size) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    values[k] = warp_sum(values[k]);
    if (lane == 0) scratch.of_warp[warp][k] = values[k];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const float sum = warp_sum(lane < kWarps ? scratch.of_warp[lane][k] : 0.0f);
      if (lane < size) *of_rank(&scratch.sums[rank][k], lane) = sum;
    }
  }
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    values[k] = 0;
    for (unsigned r = 0; r < size; ++r) values[k] += scratch.sums[r][k];
  }
}

// SHAPED: z is more than the matmul; EXTRAS: an output beside the log-probs is wanted; T: what D is stored as.
template <bool SHAPED, bool EXTRAS, class T>
__global__ void __launch_bounds__(kThreads, SHAPED ? 2 : 3) row_kernel(const LogprobRows rows) {
  constexpr bool GRAD = !std::is_same_v<T, None>, LAST_PASS = std::is_same_v<T, __half>;
  const unsigned rank = cluster_rank(), size = cluster_size();
  const int64_t index = blockIdx.x / size, V = rows.vocabulary;
  const int slice = slice_of(V, size);
  const int64_t start = int64_t{rank} * slice;
  const int mine = static_cast<int>(max(int64_t{0}, min(int64_t{slice}, V - start))), groups = (mine + 3) / 4;
  const float* logits = rows.logits + index * rows.stride;
  float* kept = shared_memory<float>();
  auto* kept4 = reinterpret_cast<float4*>(kept);
  Scratch& scratch = *reinterpret_cast<Scratch*>(kept + slice);
  if (threadIdx.x == 0) {
    for (int c = 0; c < kMaxChunks; ++c) mbarrier_init(&scratch.arrived[c], 1);
    mbarrier_init_fence();
    fence_proxy_async();
    for (int c = 0; c * kChunk < groups; ++c) {
      const unsigned bytes = 16 * min(kChunk, groups - c * kChunk);
      mbarrier_arrive_expect(&scratch.arrived[c], bytes);
      bulk_load(kept + c * kChunk * 4, logits + start + c * kChunk * 4, bytes, &scratch.arrived[c]);
    }
  }
  cluster_arrive();  // the others run, so that they can be stored to
  const int64_t target_id = rows.targets[index];
  const bool has_target = target_id >= 0 && target_id < V;
  const bool owner = target_id >= start && target_id < start + mine;
  const float temperature = SHAPED && rows.temperatures != nullptr ? rows.temperatures[index] : rows.temperature;
  float own_factor = 1;  // from the logit: a forbidden one has none in shared memory
  if (SHAPED && rows.softcap > 0 && owner && threadIdx.x < 32) {
    const float u = capped(rows, logits[target_id] + (rows.bias == nullptr ? 0.0f : rows.bias[target_id]));
    own_factor = 1 - u * u;
  }
  __syncthreads();  // the mbarriers are there

  float top = kLowest;
  for (int c = 0; c * kChunk < groups; ++c) {
    mbarrier_wait(&scratch.arrived[c], 0);
    for (int i = c * kChunk + threadIdx.x; i < min((c + 1) * kChunk, groups); i += kThreads) {
      const float4 four = kept4[i];
      float x[4] = {four.x, four.y, four.z, four.w};
      const bool last = 4 * i + 4 > mine;  // mine ends at V where it is no multiple of 4
      if (SHAPED) shape(rows, temperature, start + 4 * i, x);
      if (last) {
        for (int j = 1; j < 4; ++j) x[j] = 4 * i + j < mine ? x[j] : -INFINITY;
      }
      if (SHAPED || last) kept4[i] = make_float4(x[0], x[1], x[2], x[3]);
#pragma unroll
      for (int j = 0; j < 4; ++j) top = fmaxf(top, z_of<SHAPED>(rows, temperature, x[j]));
    }
  }
  top = warp_max(top);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) scratch.of_warp[warp][0] = top;
  cluster_wait();
  __syncthreads();
  if (warp == 0) {
    top = warp_max(lane < kWarps ? scratch.of_warp[lane][0] : kLowest);
    if (lane < size) {
      *of_rank(&scratch.tops[rank], lane) = top;
      if (owner) {
        *of_rank(&scratch.target, lane) = z_of<SHAPED>(rows, temperature, kept[target_id - start]);
        *of_rank(&scratch.factor, lane) = own_factor;
      }
    }
  }
  cluster_arrive();
  cluster_wait();
  top = kLowest;
  for (unsigned r = 0; r < size; ++r) top = fmaxf(top, scratch.tops[r]);
  const float target = has_target ? scratch.target : -INFINITY;

  const int own_place = owner ? static_cast<int>(target_id - start) : -1;
  T* matrix = static_cast<T*>(rows.matrix);
  if constexpr (GRAD) matrix += index * rows.matrix_stride + start;
  float sums[EXTRAS ? kSums : 1] = {};
  for (int i = threadIdx.x; i < groups; i += kThreads) {
    const float4 four = kept4[i];
    const float x[4] = {four.x, four.y, four.z, four.w};
    float d[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float z = z_of<SHAPED>(rows, temperature, x[j]);
      const float e = 4 * i + j == own_place ? 0.0f : expf(z - top);
      sums[kOthers] += e;
      d[j] = e;
      if (SHAPED && rows.softcap > 0) d[j] = x[j] == -INFINITY ? 0.0f : e * (1 - x[j] * x[j]);
      if constexpr (EXTRAS) {
        const bool allowed = z > -INFINITY;
        sums[kWeighted] += allowed ? e * (z - top) : 0.0f;
        sums[kSquares] += e * e;
        sums[kTotal] += allowed ? z : 0.0f;
        sums[kAllowed] += allowed ? 1.0f : 0.0f;
        if (z > target || (z == target && start + 4 * i + j < target_id)) sums[kBeaten] = 1;
      }
    }
    if constexpr (LAST_PASS) {
      kept4[i] = make_float4(d[0], d[1], d[2], d[3]);
    } else if constexpr (GRAD) {
      store(matrix + 4 * i, d);
    }
  }
  add_up(scratch, sums, rank, size);  // orders the stores to D as well

  const float others = sums[kOthers], factor = has_target ? scratch.factor : 1.0f;
  float scale = top * 0.0f + 1.0f;
  if constexpr (LAST_PASS) {
    scale = (others + expf(target - top)) * kFp16Scale;
    scale = scale == 0.0f ? 1.0f : scale;  // a shard of forbidden ids alone
    const float inverse = 1.0f / scale, own = rows.own ? -others * factor * inverse : 0.0f;
    for (int i = threadIdx.x; i < groups; i += kThreads) {
      const float4 four = kept4[i];
      float d[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) d[j] = 4 * i + j == own_place ? own : d[j] * inverse;
      store(matrix + 4 * i, d);
    }
  } else if constexpr (GRAD) {
    if (rows.own && owner && threadIdx.x == 0) store_one(matrix + own_place, -others * factor);
  }
  if (rank != 0 || threadIdx.x != 0) return;
  float* raw = rows.raw + index;
  const auto put = [&](int field, float value) { raw[field * rows.raw_stride] = value; };
  put(0, top);
  put(1, others);
  put(2, target);
  put(3, factor);
  put(4, scale);
  if constexpr (EXTRAS) {
    put(5, rows.entropy ? sums[kWeighted] : 0);
    put(6, rows.squares ? sums[kSquares] : 0);
    put(7, rows.mean ? sums[kTotal] : 0);
    put(8, rows.mean ? sums[kAllowed] : 0);
    put(9, rows.top1 ? sums[kBeaten] : 0);
  } else {
    for (int field = 5; field < 10; ++field) put(field, 0);
  }
}

// The fewest blocks that leave room for three on an SM.
unsigned cluster_of(int64_t vocabulary) {
  unsigned cluster = 1;
  while (cluster < kMaxCluster && slice_of(vocabulary, cluster) * 4 + int64_t{sizeof(Scratch)} > kThirdOfAnSm)
    cluster *= 2;
  return cluster;
}

template <bool SHAPED, bool EXTRAS, class T>
void start(const Launch& config, const LogprobRows& rows) {
  launch(config, row_kernel<SHAPED, EXTRAS, T>, rows);
}

template <bool SHAPED, bool EXTRAS>
void start(const Launch& config, const LogprobRows& rows) {
  switch (rows.stored) {
    case Stored::none:
      return start<SHAPED, EXTRAS, None>(config, rows);
    case Stored::fp32:
      return start<SHAPED, EXTRAS, float>(config, rows);
    case Stored::bf16:
      return start<SHAPED, EXTRAS, __nv_bfloat16>(config, rows);
    case Stored::fp16:
      return start<SHAPED, EXTRAS, __half>(config, rows);
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "linear_logprob_rows", 0);
  return value;
}

}  // namespace

int64_t linear_logprob_rows_limit(int device) {
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 9) return 0;
  const int64_t bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - int64_t{sizeof(Scratch)};
  return kMaxCluster * std::min<int64_t>(kMaxSlice, bytes / 4 / kAlign * kAlign);
}

void linear_logprob_rows(const LogprobRows& rows, int device, void* stream) {
  if (rows.rows == 0) return;
  const char* op = "linear_logprob_rows";
  const int64_t limit = linear_logprob_rows_limit(device), V = rows.vocabulary;
  const unsigned cluster = rows.cluster != 0 ? rows.cluster : cluster_of(V);
  if (V < 1 || cluster > kMaxCluster || V > limit || slice_of(V, cluster) > limit / kMaxCluster) {
    throw std::runtime_error(std::string(op) + ": " + std::to_string(V) + " logits do not fit " +
                             std::to_string(cluster) + " blocks of " + std::to_string(limit / kMaxCluster) +
                             " on this device" + (limit == 0 ? ", which is older than sm_90" : ""));
  }
  const int64_t count = rows.rows * V;
  if (rows.rows > INT32_MAX / cluster) throw std::runtime_error(std::string(op) + ": too many rows for a launch");
  const DeviceGuard guard(device, op, count);
  Launch config{op, count, static_cast<unsigned>(rows.rows) * cluster, kThreads};
  config.cluster = cluster;
  config.shared = slice_of(V, cluster) * sizeof(float) + sizeof(Scratch);
  config.stream = stream;
  const bool shaped = rows.temperatures != nullptr || rows.bias != nullptr || rows.blocked != nullptr ||
                      rows.logit_scale != 1.0f || rows.softcap > 0 || rows.temperature != 1.0f;
  const bool extras = rows.entropy || rows.top1 || rows.mean || rows.squares;
  if (shaped) return extras ? start<true, true>(config, rows) : start<true, false>(config, rows);
  return extras ? start<false, true>(config, rows) : start<false, false>(config, rows);
}

}  // namespace r1v2_fast
