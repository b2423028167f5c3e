// One cooperative launch: look at the priorities and sum them up, level by level, then a warp a draw.
// Traffic: N priorities read once (twice where powers have to be relative to the largest), N bytes of sums written.
#include "priority_draw.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "block_sums_warp.h"

namespace r1v2_fast {
namespace {

constexpr unsigned THREADS = 256, WARPS = THREADS / 32, MOST_BLOCKS = 2048;
constexpr int64_t NEVER = INT64_MAX;  // an index beyond all

// what a lane, a block or the grid has seen
struct Part {
  int64_t positive = 0, first_bad = NEVER;
  double largest = 0.0;

  __device__ void merge(const Part& other) {
    positive += other.positive;
    first_bad = other.first_bad < first_bad ? other.first_bad : first_bad;
    largest = other.largest > largest ? other.largest : largest;
  }
  template <typename T>
  __device__ void look(T p, int64_t index) {
    const bool good = drawable(p);
    positive += good;
    largest = good && p > largest ? static_cast<double>(p) : largest;
    if (!good && !(p == 0) && index < first_bad) first_bad = index;
  }
};

struct Shared {
  Part of_warp[WARPS];
};

template <typename T, typename Weigh>
struct Draw {
  BlockSums<T> sums;
  Weigh weigh;
  int64_t k;
  uint64_t seed;
  int64_t* indices;   // [k]
  T* probabilities;   // [k]
  int64_t* status;    // [2]: positive, first_bad
  Part* parts;        // [MOST_BLOCKS]
};

// of the block, for its first thread
__device__ Part block_total(Part own, Part* shared) {
  const auto from_lanes = [&] {
    for (int offset = 16; offset; offset /= 2) {
      Part other;
      other.positive = __shfl_xor_sync(~0u, static_cast<long long>(own.positive), offset);
      other.first_bad = __shfl_xor_sync(~0u, static_cast<long long>(own.first_bad), offset);
      other.largest = __shfl_xor_sync(~0u, own.largest, offset);
      own.merge(other);
    }
  };
  from_lanes();
  __syncthreads();  // the last total has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  own = threadIdx.x % 32 < WARPS ? shared[threadIdx.x % 32] : Part();
  from_lanes();
  return own;
}

template <typename T, typename Weigh>
__global__ void __launch_bounds__(THREADS, 2) priority_draw_kernel(Draw<T, Weigh> draw) {
  Part* shared = shared_memory<Shared>()->of_warp;
  const BlockSums<T>& sums = draw.sums;
  Weigh weigh = draw.weigh;
  const SumLevels& levels = sums.levels;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, warp = thread / 32;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * THREADS, warps = threads / 32;
  const bool in_range = weigh.template in_range<T>();

  Part seen;
  for (int64_t block = warp; block < levels.size[1]; block += warps) {
    const int64_t first = block * FAN + threadIdx.x % 32 * FAN_EACH;
    T values[FAN_EACH];
    load_lane(sums.leaves + block * FAN, levels.size[0] - block * FAN, values);
    UNROLLED
    for (int i = 0; i < FAN_EACH; ++i) seen.look(values[i], first + i);  // 0 beyond the end
    if (in_range) store_node(sums, 1, block, values, weigh);
  }
  seen = block_total(seen, shared);
  if (threadIdx.x == 0) draw.parts[blockIdx.x] = seen;
  grid_barrier();
  if (!in_range || blockIdx.x == 0) {
    seen = Part();
    for (unsigned block = threadIdx.x; block < gridDim.x; block += THREADS) seen.merge(draw.parts[block]);
    seen = block_total(seen, shared);
  }
  if (thread == 0) {
    draw.status[0] = seen.positive;
    draw.status[1] = seen.first_bad == NEVER ? -1 : seen.first_bad;
  }
  if (!in_range) {
    if (seen.positive) weigh.refer_to(seen.largest);
    for (int64_t block = warp; block < levels.size[1]; block += warps) make_node(sums, 1, block, weigh);
    grid_barrier();
  }
  for (int level = 2; level <= levels.last; ++level) {
    for (int64_t node = warp; node < levels.size[level]; node += warps) make_node(sums, level, node, weigh);
    grid_barrier();
  }
  const double total = sums.total();
  for (int64_t i = warp; i < draw.k; i += warps) {
    double weight = 0.0;
    const int64_t leaf = total > 0.0 ? drawn_leaf(sums, weigh, target_of_draw(i, draw.seed, total), weight) : -1;
    if (threadIdx.x % 32) continue;
    draw.indices[i] = leaf;
    draw.probabilities[i] = leaf < 0 ? T(0) : static_cast<T>(weight / total);
  }
}

template <typename T, typename Weigh>
void start(const Draw<T, Weigh>& draw, void* stream) {
  const auto kernel = priority_draw_kernel<T, Weigh>;
  const int64_t useful = std::max(draw.sums.levels.size[1], draw.k) / WARPS + 1;
  Launch config{"priority_draw", draw.sums.levels.size[0], 1, THREADS};
  config.shared = sizeof(Shared);
  config.grid = std::min({static_cast<unsigned>(std::min<int64_t>(useful, MOST_BLOCKS)), MOST_BLOCKS,
                          resident_blocks(kernel, THREADS, sizeof(Shared))});
  config.cooperative = true;
  config.stream = stream;
  launch(config, kernel, draw);
}

constexpr int64_t PARTS_BYTES = sizeof(Part) * MOST_BLOCKS;

}  // namespace

int64_t priority_draw_bytes(int64_t count) { return PARTS_BYTES + 8 * SumLevels(count).doubles(); }

template <typename T>
void priority_draw_cuda(const T* priorities, int64_t count, int64_t k, uint64_t seed, double alpha, int64_t* indices,
                        T* probabilities, int64_t* status, void* workspace, int64_t workspace_bytes, int device,
                        void* stream) {
  const DeviceGuard guard(device, "priority_draw", count);
  if (workspace_bytes < priority_draw_bytes(count))
    throw std::invalid_argument("priority_draw needs a workspace of " + std::to_string(priority_draw_bytes(count)) +
                                " bytes, got " + std::to_string(workspace_bytes));
  auto* sums = reinterpret_cast<double*>(static_cast<char*>(workspace) + PARTS_BYTES);
  const auto with = [&](const auto& weigh) {
    using Weigh = std::decay_t<decltype(weigh)>;
    const BlockSums<T> blocks{priorities, sums, SumLevels(count)};
    start(Draw<T, Weigh>{blocks, weigh, k, seed, indices, probabilities, status, static_cast<Part*>(workspace)}, stream);
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (alpha == 1.0) return with(Plain());
  }
  with(Power{alpha});
}

template void priority_draw_cuda(const float*, int64_t, int64_t, uint64_t, double, int64_t*, float*, int64_t*, void*,
                                 int64_t, int, void*);
template void priority_draw_cuda(const double*, int64_t, int64_t, uint64_t, double, int64_t*, double*, int64_t*, void*,
                                 int64_t, int, void*);

}  // namespace r1v2_fast
