// An update writes leaves, then makes the nodes above them, level by level; a sample is one launch with as many rounds as
// it takes. A node that several warps make gets the same bits from each.
// k draws: a warp each, two loads of 256 and 32 bytes a level; no traffic grows with the capacity.
#include "priority_index.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "block_sums_warp.h"
#include "priority_index_slots.h"

namespace r1v2_fast {
namespace {

constexpr unsigned WARPS = THREADS / 32;
constexpr int64_t BATCH = 1 << 20;  // updates a launch resolves: later launches overwrite what earlier ones wrote
// The nodes of a level above the indices; all of them where that is no more work, or where there are no indices
template <typename Sums>
__device__ void remake(const Sums& sums, int level, const int64_t* indices, int64_t count) {
  const bool all = indices == nullptr || count >= sums.levels.size[level];
  const int64_t most = all ? sums.levels.size[level] : count;
  for (int64_t i = grid_warp(); i < most; i += grid_warps()) {
    const int64_t index = all ? 0 : indices[i];
    if (index < 0 || index >= sums.levels.size[0]) continue;
    make_node(sums, level, all ? i : index >> FAN_BITS * level, Plain());
  }
}

template <typename Sums>
__device__ void remake_above(const Sums& sums, const int64_t* indices, int64_t count) {
  for (int level = 1; level <= sums.levels.last; ++level) {
    grid_barrier();  // the level below is there
    remake(sums, level, indices, count);
  }
}

struct Writes {
  PriorityIndex index;
  const int64_t* indices;
  const float* priorities;
  int64_t count;
  Slots slots;

  __device__ bool valid(int64_t i) const {
    return indices[i] >= 0 && indices[i] < index.capacity && priorities[i] >= 0.0f && priorities[i] < INFINITE_KEY;
  }
};

__global__ void __launch_bounds__(THREADS) write_kernel(Writes writes) {
  writes.slots.clear(0);
  grid_barrier();
  for (int64_t i = grid_thread(); i < writes.count; i += grid_threads())
    if (writes.valid(i)) atomicMax(&writes.slots.claim(writes.indices[i])->position, Position(i));
  grid_barrier();
  const PriorityIndex& index = writes.index;
  for (int64_t i = grid_thread(); i < writes.count; i += grid_threads()) {
    if (!writes.valid(i) || writes.slots.find(writes.indices[i])->position != Position(i)) continue;
    const float p = writes.priorities[i];
    index.leaves[writes.indices[i]] = p > 0.0f ? p : 0.0f;  // no -0
    if (index.powers) index.powers[writes.indices[i]] = Power{index.alpha}(p);
  }
}

template <typename Leaf>
__global__ void __launch_bounds__(THREADS) remake_kernel(BlockSums<Leaf> sums, const int64_t* indices, int64_t count) {
  remake_above(sums, indices, count);
}

__global__ void __launch_bounds__(THREADS) powers_kernel(PriorityIndex index) {
  const Power weigh{index.alpha};
  for (int64_t i = grid_thread(); i < index.capacity; i += grid_threads()) index.powers[i] = weigh(index.leaves[i]);
}

template <typename Leaf>
struct Sample {
  BlockSums<Leaf> sums;
  Leaf* weights;  // what the sums are over
  int64_t k;
  uint64_t seed;
  int64_t* indices;      // [k]
  float* probabilities;  // [k]
  int64_t* drawn;        // [1]
  Slots slots;
  int64_t* leaf;   // of each draw of a round
  double* weight;  // of that leaf
  int64_t* slot;   // of that leaf
  double* kept;    // [k], what the drawn ones weigh
};

struct Shared {
  int of_warp[WARPS];
};

// Draws whose leaf is new go behind the `found` ones, in the order of draws; by one block. The number found then
template <typename Leaf>
__device__ int64_t accepted(const Sample<Leaf>& sample, int64_t draws, int64_t found, int64_t most, double total,
                            Shared* shared) {
  constexpr int EACH = 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t tile = 0; tile < draws && found < most; tile += THREADS * EACH) {
    const int64_t first = tile + threadIdx.x * EACH;
    unsigned fresh = 0;
    UNROLLED
    for (int i = 0; i < EACH; ++i) {
      const int64_t draw = first + i < draws ? first + i : draws - 1;
      const bool one = sample.slots.slots[sample.slot[draw]].position == Position(first + i);
      fresh |= one ? 1u << i : 0u;
    }
    int upto = __popc(fresh);
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, upto, step);
      if (lane >= step) upto += before;
    }
    __syncthreads();  // the last tile's have been read
    if (lane == 31) shared->of_warp[warp] = upto;
    __syncthreads();
    int64_t place = found + upto - __popc(fresh);
    for (unsigned w = 0; w < WARPS; ++w) {
      place += static_cast<int>(w) < warp ? shared->of_warp[w] : 0;
      found += shared->of_warp[w];
    }
    for (; fresh && place < most; fresh &= fresh - 1, ++place) {
      const int64_t draw = first + __ffs(fresh) - 1;
      sample.indices[place] = sample.leaf[draw];
      sample.kept[place] = sample.weight[draw];
      sample.probabilities[place] = static_cast<float>(sample.weight[draw] / total);
    }
  }
  return found < most ? found : most;
}

template <typename Leaf>
__device__ int64_t drawn_once(const Sample<Leaf>& sample, double total, Shared* shared) {
  const auto& sums = sample.sums;
  const int64_t most = sample.k < sums.levels.size[0] ? sample.k : sums.levels.size[0];
  int64_t found = 0, dropped = 0;
  for (uint64_t number = 0; found < most && sums.total() > 0.0;) {
    const int64_t draws = draws_of_round(most - found);
    sample.slots.clear(NOBODY);
    grid_barrier();
    for (int64_t draw = grid_warp(); draw < draws; draw += grid_warps()) {
      double weight = 0.0;
      const int64_t leaf = drawn_leaf(sums, Plain(), target_of_draw(number + draw, sample.seed, sums.total()), weight);
      if (threadIdx.x % 32) continue;
      Slot* slot = sample.slots.claim(leaf);
      atomicMin(&slot->position, Position(draw));
      sample.leaf[draw] = leaf;
      sample.weight[draw] = weight;
      sample.slot[draw] = slot - sample.slots.slots;
    }
    number += draws;
    grid_barrier();
    if (blockIdx.x == 0) {
      const int64_t count = accepted(sample, draws, found, most, total, shared);
      if (threadIdx.x == 0) *sample.drawn = count;
    }
    grid_barrier();
    found = *static_cast<volatile int64_t*>(sample.drawn);
    if (found == most) break;
    for (int64_t i = dropped + grid_thread(); i < found; i += grid_threads()) sample.weights[sample.indices[i]] = 0;
    remake_above(sums, sample.indices + dropped, found - dropped);
    dropped = found;
    grid_barrier();
  }
  for (int64_t i = grid_thread(); i < dropped; i += grid_threads())
    sample.weights[sample.indices[i]] = static_cast<Leaf>(sample.kept[i]);
  if (dropped) remake_above(sums, sample.indices, dropped);
  return found;
}

template <typename Leaf>
__device__ int64_t drawn_again(const Sample<Leaf>& sample, double total) {
  for (int64_t draw = grid_warp(); draw < sample.k && total > 0.0; draw += grid_warps()) {
    double weight = 0.0;
    const int64_t leaf = drawn_leaf(sample.sums, Plain(), target_of_draw(draw, sample.seed, total), weight);
    if (threadIdx.x % 32) continue;
    sample.indices[draw] = leaf;
    sample.probabilities[draw] = static_cast<float>(weight / total);
  }
  return total > 0.0 ? sample.k : 0;
}

template <typename Leaf, bool REPLACEMENT>
__global__ void __launch_bounds__(THREADS, 4) sample_kernel(Sample<Leaf> sample) {
  const double total = sample.sums.total();
  const int64_t found = REPLACEMENT ? drawn_again(sample, total) : drawn_once(sample, total, shared_memory<Shared>());
  for (int64_t i = found + grid_thread(); i < sample.k; i += grid_threads()) {
    sample.indices[i] = -1;
    sample.probabilities[i] = 0.0f;
  }
  if (grid_thread() == 0) *sample.drawn = found;
}

template <class... P, class... A>
void start(const char* op, int64_t count, int64_t blocks, void* stream, void (*kernel)(P...), A... arguments) {
  Launch config{op, count, 1, THREADS};
  config.shared = sizeof(Shared);
  config.grid = static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, resident_blocks(kernel, THREADS, sizeof(Shared))));
  config.cooperative = true;
  config.stream = stream;
  launch(config, kernel, arguments...);
}

template <typename Run>
void with_weights(const PriorityIndex& index, const Run& run) {
  const auto given = [&](auto* weights) {
    using Leaf = std::decay_t<decltype(*weights)>;
    run(BlockSums<Leaf>{weights, index.sums, SumLevels(index.capacity)}, weights);
  };
  index.powers ? given(index.powers) : given(index.leaves);
}

void start_remake(const PriorityIndex& index, const int64_t* indices, int64_t count, void* stream) {
  with_weights(index, [&](const auto& sums, auto* weights) {
    const auto kernel = remake_kernel<std::decay_t<decltype(*weights)>>;
    const int64_t nodes = indices ? std::min(count, sums.levels.size[1]) : sums.levels.size[1];
    start("priority_index_update", count, nodes / WARPS + 1, stream, kernel, sums, indices, count);
  });
}

void check_room(const char* op, int64_t got, int64_t needed) {
  if (got < needed)
    throw std::invalid_argument(std::string(op) + " needs a workspace of " + std::to_string(needed) + " bytes, got " +
                                std::to_string(got));
}

int64_t slots_bytes(int64_t most) { return static_cast<int64_t>(sizeof(Slot)) << Slots::bits_for(most); }

}  // namespace

int64_t priority_index_update_bytes(int64_t count) { return slots_bytes(std::min(count, BATCH)); }

int64_t priority_index_sample_bytes(int64_t capacity, int64_t k, bool replacement) {
  const int64_t most = std::min(k, capacity), room = draws_of_round(most);
  return replacement ? 0 : slots_bytes(room) + 3 * 8 * room + 8 * most;
}

void priority_index_build_cuda(const PriorityIndex& index, int device, void* stream) {
  const DeviceGuard guard(device, "priority_index_build", index.capacity);
  const int64_t blocks = index.capacity / THREADS + 1;
  if (index.powers) start("priority_index_build", index.capacity, blocks, stream, powers_kernel, index);
  start_remake(index, nullptr, index.capacity, stream);
}

void priority_index_update_cuda(const PriorityIndex& index, const int64_t* indices, const float* priorities,
                                int64_t count, void* workspace, int64_t workspace_bytes, int device, void* stream) {
  const char* op = "priority_index_update";
  const DeviceGuard guard(device, op, count);
  check_room(op, workspace_bytes, priority_index_update_bytes(count));
  const Slots slots{static_cast<Slot*>(workspace), Slots::bits_for(std::min(count, BATCH))};
  for (int64_t first = 0; first < count; first += BATCH) {
    const int64_t batch = std::min(count - first, BATCH);
    const Writes writes{index, indices + first, priorities + first, batch, slots};
    start(op, count, batch / THREADS + 1, stream, write_kernel, writes);
  }
  if (count) start_remake(index, indices, count, stream);
}

void priority_index_sample_cuda(const PriorityIndex& index, int64_t k, uint64_t seed, bool replacement,
                                int64_t* indices, float* probabilities, int64_t* drawn, void* workspace,
                                int64_t workspace_bytes, int device, void* stream) {
  const char* op = "priority_index_sample";
  const DeviceGuard guard(device, op, k);
  check_room(op, workspace_bytes, priority_index_sample_bytes(index.capacity, k, replacement));
  const int64_t room = draws_of_round(std::min(k, index.capacity));
  const Slots slots{static_cast<Slot*>(workspace), Slots::bits_for(room)};
  auto* leaf = reinterpret_cast<int64_t*>(static_cast<char*>(workspace) + slots_bytes(room));
  auto* weight = reinterpret_cast<double*>(leaf + room);
  auto* slot = reinterpret_cast<int64_t*>(weight + room);
  auto* kept = reinterpret_cast<double*>(slot + room);
  with_weights(index, [&](const auto& sums, auto* weights) {
    using Leaf = std::decay_t<decltype(*weights)>;
    const Sample<Leaf> sample{sums,  weights, k,    seed,   indices, probabilities,
                              drawn, slots,   leaf, weight, slot,    kept};
    const auto kernel = replacement ? sample_kernel<Leaf, true> : sample_kernel<Leaf, false>;
    start(op, k, (replacement ? k : room) / WARPS + 1, stream, kernel, sample);
  });
}

}  // namespace r1v2_fast
