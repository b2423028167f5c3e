// The emulator itself: kernels that are right for every seed, and planted faults. `emulator_test FAULT` must abort.
#include <cstdio>
#include <cstring>
#include <numeric>
#include <set>
#include <vector>

#include "async_copy.h"
#include "launch.h"

using namespace r1v2_fast;

namespace {

constexpr int kThreads = 96;  // three warps
constexpr int kSeeds = 20;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

__device__ int warp_sum(int value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

struct Partials {
  int of_warp[kThreads / 32];
};

template <bool BARRIER>
__global__ void sum_kernel(const int* values, int* sums) {
  auto& partials = *shared_memory<Partials>();
  const int sum = warp_sum(values[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x % 32 == 0) partials.of_warp[threadIdx.x / 32] = sum;
  if (BARRIER) __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (int part : partials.of_warp) total += part;
    atomicAdd(sums + blockIdx.x, total);
  }
}

template <bool BARRIER>
bool sums_are_right() {
  std::vector<int> values(5 * kThreads), sums(5, 0);
  std::iota(values.begin(), values.end(), 1);
  launch({"sum", 480, 5, kThreads, 1, sizeof(Partials)}, sum_kernel<BARRIER>, values.data(), sums.data());
  for (int block = 0; block < 5; ++block) {
    if (sums[block] != kThreads * (kThreads * block + (kThreads + 1) / 2) + kThreads / 2) return false;
  }
  return true;
}

// Inclusive scan of a block by shuffles and shared memory; votes count the odd values.
__global__ void scan_kernel(int* values, int* votes) {
  auto& partials = *shared_memory<Partials>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int value = values[threadIdx.x];
  const int odd = __syncthreads_count(value % 2);
  const unsigned odd_lanes = __ballot_sync(~0u, value % 2);
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += before;
  }
  if (lane == 31) partials.of_warp[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += partials.of_warp[w];
  values[threadIdx.x] = value;
  if (threadIdx.x == 0) votes[0] = odd, votes[1] = __popc(odd_lanes);
}

void check_scan() {
  std::vector<int> values(kThreads, 1), votes(2);
  values[40] = 3, values[41] = 2;
  launch({"scan", kThreads, 1, kThreads, 1, sizeof(Partials)}, scan_kernel, values.data(), votes.data());
  expect(values[0] == 1 && values[40] == 43 && values[95] == 99, "block scan");
  expect(votes[0] == kThreads - 1 && votes[1] == 32, "votes");
}

// Each round every block reads what its neighbour wrote in the round before.
__global__ void relay_kernel(int* cells, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    int seen = cells[(blockIdx.x + 1) % gridDim.x];
    grid_barrier();
    if (threadIdx.x == 0) cells[blockIdx.x] = seen + 1;
    grid_barrier();
  }
}

void check_grid_barrier() {
  std::vector<int> cells(4, 0);
  launch({"relay", 4, resident_blocks(relay_kernel, 64), 64, 1, 0, true}, relay_kernel, cells.data(), 7);
  expect(cells == std::vector<int>(4, 7), "grid barrier");
}

__global__ void hasty_kernel() { *of_rank(shared_memory<int>(), (cluster_rank() + 1) % cluster_size()) = 1; }

// Blocks store their rank, barrier, and read their neighbour's; the second barrier keeps them there until it has been
// read.
template <bool STAY>
__global__ void exchange_kernel(int* out) {
  int* mine = shared_memory<int>();
  if (threadIdx.x == 0) *mine = 10 * static_cast<int>(cluster_rank());
  cluster_arrive();
  cluster_wait();
  if (STAY || cluster_rank() == 0) {
    if (threadIdx.x == 0) out[blockIdx.x] = *of_rank(mine, (cluster_rank() + 1) % cluster_size());
    if (STAY) cluster_arrive();
    if (STAY) cluster_wait();
  }
}

void check_cluster() {
  std::vector<int> out(8);
  launch({"exchange", 8, 8, 32, 4, sizeof(int)}, exchange_kernel<true>, out.data());
  expect(out == std::vector<int>({10, 20, 30, 0, 10, 20, 30, 0}), "cluster exchange");
}

struct Stage {
  alignas(16) float tile[64];
  uint64_t arrived;
};

// Two tiles through one stage: the barrier's second phase has parity 1.
template <bool WAIT>
__global__ void copy_kernel(const float* from, float* to, int skew, unsigned announced) {
  auto& stage = *shared_memory<Stage>();
  if (threadIdx.x == 0) {
    mbarrier_init(&stage.arrived, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  for (int tile = 0; tile < 2; ++tile) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(&stage.arrived, announced);
      bulk_load(stage.tile, from + 64 * tile + skew, sizeof stage.tile, &stage.arrived);
    }
    if (WAIT) mbarrier_wait(&stage.arrived, tile);
    to[64 * tile + threadIdx.x] = stage.tile[threadIdx.x];
    fence_proxy_async();
    __syncthreads();
    if (!WAIT) {
      mbarrier_wait(&stage.arrived, tile);
      __syncthreads();
    }
  }
}

template <bool WAIT>
bool copies_are_right(int skew = 0, unsigned announced = sizeof(Stage::tile)) {
  alignas(16) static float from[132];
  std::iota(from, from + 132, 0.0f);
  std::vector<float> to(128, -1.0f);
  launch({"copy", 128, 1, 64, 1, sizeof(Stage)}, copy_kernel<WAIT>, from, to.data(), skew, announced);
  return std::equal(to.begin(), to.end(), from);
}

template <class F>
bool for_every_seed(F holds) {
  bool all = true;
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulated::seed(seed);
    all = holds() && all;
  }
  return all;
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (threadIdx.x < 64) {
    __syncthreads_or(1);
  }
}

__global__ void early_exit_kernel() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void divergent_warp_kernel() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __shfl_sync(~0u, 1, 0);
  }
}

__global__ void overrun_kernel() { shared_memory()[threadIdx.x] = 1; }

__global__ void spin_kernel(int* flag) {
  while (atomicAdd(flag, 0) == 0) __nanosleep(10);
}

void plant(const char* fault) {
  const auto is = [&](const char* name) { return std::strcmp(fault, name) == 0; };
  if (is("divergent barriers")) launch({fault, 1, 1, kThreads}, divergent_kernel);
  if (is("early exit")) launch({fault, 1, 1, kThreads}, early_exit_kernel);
  if (is("divergent warp")) launch({fault, 1, 1, 32}, divergent_warp_kernel);
  if (is("misaligned copy")) copies_are_right<true>(1);
  if (is("bytes that never come")) copies_are_right<true>(0, sizeof(Stage::tile) + 16);
  if (is("bytes not announced")) copies_are_right<true>(0, sizeof(Stage::tile) - 16);
  if (is("overrun")) launch({fault, 1, 1, 64, 1, 63}, overrun_kernel);  // under a sanitizer
  if (is("block that left")) {
    std::vector<int> out(8);
    for_every_seed([&] { return launch({fault, 8, 4, 32, 4, sizeof(int)}, exchange_kernel<false>, out.data()), true; });
  }
  if (is("block that has not begun")) launch({fault, 2, 2, 32, 2, sizeof(int)}, hasty_kernel);
  if (is("spinning")) {
    int flag = 0;
    launch({fault, 1, 1, 32}, spin_kernel, &flag);
  }
  std::printf("no fault was seen: %s\n", fault);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) return plant(arguments[1]), 0;
  expect(for_every_seed(sums_are_right<true>), "sums");
  expect(for_every_seed([] { return copies_are_right<true>(); }), "bulk copies");
  expect(for_every_seed([] { return check_scan(), check_grid_barrier(), check_cluster(), true; }), "");
  expect(!for_every_seed(sums_are_right<false>), "a missing barrier went unseen");
  expect(!for_every_seed([] { return copies_are_right<false>(); }), "a missing wait for a copy went unseen");
  std::printf("the emulator holds\n");
}
