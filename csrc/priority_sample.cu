// One cooperative launch: count the priorities, set the limit, let the race's first ones through, order them. Its grid lives at
// once, so a limit that let too few or too many through is set anew on the device, and nothing waits for the host.
// Traffic: N priorities read twice (out of L2 where they fit); 10 rounds of Philox and one comparison each in the second read.
#include <algorithm>

#include "launch.h"
#include "priority_sample.h"

namespace r1v2_fast {
namespace {

constexpr unsigned THREADS = 256, WARPS = THREADS / 32, TILE = 1024, FULL = 0xffffffffu;
constexpr int64_t NEVER = INT64_MAX;  // an index beyond all
constexpr int MOST_ROUNDS = 200;

// what a block, or the grid, has counted
struct Part {
  Mass mass;
  int64_t positive = 0, first_bad = NEVER;

  __device__ void merge(const Part& other) {
    mass += other.mass;
    positive += other.positive;
    first_bad = other.first_bad < first_bad ? other.first_bad : first_bad;
  }
};

struct Head {  // of the workspace
  unsigned long long found[3];  // by rounds in turn: zeroed a barrier before it is used, a barrier after it was read
  unsigned long long padding;
  Part parts[SAMPLE_BLOCKS];
};
static_assert(sizeof(Head) <= SAMPLE_HEAD_BYTES, "the caller allocates it");

template <typename T>
struct Task {
  const T* priorities;  // [count], 16-byte aligned
  int64_t count, k, capacity;
  uint64_t seed;
  double alpha;
  Head* head;
  double* keys;         // [capacity]
  int64_t* candidates;  // [capacity]
  T* shares;            // [capacity], where somebody else orders the candidates; else null
  int64_t* indices;     // [k]
  T* probabilities;     // [k]
  int64_t* status;      // [3]: positive, first_bad, 1 where no limit was found
};

struct Shared {
  Part parts[WARPS];
  double keys[TILE];
  int64_t candidates[TILE];
};

__device__ Part from_lane(Part own, int offset) {
  Part other;
  other.mass.exponent = __shfl_xor_sync(FULL, own.mass.exponent, offset);
  other.mass.scale = __shfl_xor_sync(FULL, own.mass.scale, offset);
  other.positive = __shfl_xor_sync(FULL, static_cast<long long>(own.positive), offset);
  other.first_bad = __shfl_xor_sync(FULL, static_cast<long long>(own.first_bad), offset);
  return other;
}

// the same bits for every thread of every block: masses add in a fixed order, and a + b is b + a
__device__ Part block_total(Part own, Part* shared) {
  for (int offset = 16; offset; offset /= 2) own.merge(from_lane(own, offset));
  __syncthreads();  // the last total has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  own = threadIdx.x % 32 < WARPS ? shared[threadIdx.x % 32] : Part();
  for (int offset = 16; offset; offset /= 2) own.merge(from_lane(own, offset));
  return own;
}

__device__ Part grid_total(const Part& own, Part* parts, Part* shared) {
  const Part mine = block_total(own, shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = mine;
  grid_barrier();
  Part sum;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += THREADS) sum.merge(parts[block]);
  return block_total(sum, shared);
}

// Batches of a thread's priorities, loaded 16 bytes at a time before any is looked at, since 16 warps on a processor would not
// keep memory busy with one load each. run(values, index_of): value i has index index_of(i); beyond the end values are 0.
template <int VECTORS, typename T, typename Run>
__device__ void for_batches(const T* priorities, int64_t count, const Run& run) {
  constexpr int WIDTH = 16 / sizeof(T);
  struct alignas(16) Vector {
    T values[WIDTH];
  };
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS * WIDTH;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
  for (int64_t start = first; start < count; start += VECTORS * stride) {
    T values[VECTORS * WIDTH];
UNROLLED
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = start + v * stride;
      Vector loaded = {};
      if (at + WIDTH <= count) {
        loaded = *reinterpret_cast<const Vector*>(priorities + at);
      } else {
UNROLLED
        for (int i = 0; i < WIDTH; ++i) loaded.values[i] = at + i < count ? priorities[at + i] : T(0);
      }
UNROLLED
      for (int i = 0; i < WIDTH; ++i) values[v * WIDTH + i] = loaded.values[i];
    }
    run(values, [=](int i) { return start + i / WIDTH * stride + i % WIDTH; });
  }
}

// add(priority, index) for those that can be drawn, and their count
template <int VECTORS, typename T, typename Add>
__device__ Part counted_with(const Task<T>& task, const Add& add) {
  Part part;
  for_batches<VECTORS>(task.priorities, task.count, [&](const auto& values, const auto& index_of) {
    constexpr int LENGTH = sizeof(values) / sizeof(T);
UNROLLED
    for (int i = 0; i < LENGTH; ++i) {
      const bool good = drawable(values[i]), bad = !good & !(values[i] == 0);
      if (good) add(values[i], index_of(i));
      part.positive += good;
      if (bad && index_of(i) < part.first_bad) part.first_bad = index_of(i);
    }
  });
  return part;
}

template <typename T>
__device__ Part counted(const Task<T>& task) {
  if (sizeof(T) == 4 && task.alpha == 1.0) {  // the plain sum is far inside a double's range
    double sum = 0.0;
    Part part = counted_with<4>(task, [&](T p, int64_t) { sum += p; });
    part.mass = {0, sum};
    return part;
  }
  Mass mass;
  Part part = counted_with<1>(task, [&](T p, int64_t) { mass += power(p, task.alpha); });
  part.mass = mass;
  return part;
}

// The mass of those beyond the limit; a difference would lose all its digits where those before it hold nearly all
template <typename T>
__device__ Part counted_beyond(const Task<T>& task, double limit) {
  const Pretest test(limit, task.alpha);
  Mass mass;
  Part part = counted_with<1>(task, [&](T p, int64_t index) {
    const bool maybe = test.passes(philox(index, task.seed).w[1], p);
    if (!maybe || race_key(p, index, task.seed, task.alpha) > limit) mass += power(p, task.alpha);
  });
  part.mass = mass;
  return part;
}

template <typename T>
__device__ void scan(const Task<T>& task, double limit, unsigned long long* found) {
  const Pretest test(limit, task.alpha);
  for_batches<4>(task.priorities, task.count, [&](const auto& values, const auto& index_of) {
    constexpr int LENGTH = sizeof(values) / sizeof(T);
    unsigned passed = 0;
UNROLLED
    for (int i = 0; i < LENGTH; ++i) passed |= test.passes(philox(index_of(i), task.seed).w[1], values[i]) ? 1u << i : 0u;
    for (; passed; passed &= passed - 1) {  // few: one copy of the code, the priority read again
      const int64_t index = index_of(__ffs(passed) - 1);
      const double key = race_key(task.priorities[index], index, task.seed, task.alpha);
      if (!(key <= limit)) continue;
      const unsigned long long slot = atomicAdd(found, 1ull);
      if (slot >= static_cast<unsigned long long>(task.capacity)) continue;
      task.keys[slot] = key;
      task.candidates[slot] = index;
    }
  });
}

// A candidate's place is the number of candidates before it: a warp counts, the block stages them tile by tile
template <typename T>
__device__ void place_by_rank(const Task<T>& task, int64_t found, int64_t most, const Mass& sum, Shared* shared) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * WARPS;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * WARPS; first < found; first += step) {
    const int64_t own = first + warp < found ? first + warp : found - 1;  // a warp too many counts for nobody
    const double key = task.keys[own];
    const int64_t index = task.candidates[own];
    int before = 0;
    for (int64_t tile = 0; tile < found; tile += TILE) {
      const int length = static_cast<int>(found - tile < TILE ? found - tile : TILE);
      __syncthreads();
      for (int i = threadIdx.x; i < length; i += THREADS) {
        shared->keys[i] = task.keys[tile + i];
        shared->candidates[i] = task.candidates[tile + i];
      }
      __syncthreads();
      for (int i = lane; i < length; i += 32) {
        const double other = shared->keys[i];
        before += (other < key) | ((other == key) & (shared->candidates[i] < index));
      }
    }
    for (int offset = 16; offset; offset /= 2) before += __shfl_xor_sync(FULL, before, offset);
    if (lane == 0 && first + warp < found && before < most) {
      task.indices[before] = index;
      task.probabilities[before] = static_cast<T>(power(task.priorities[index], task.alpha).over(sum));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 2) priority_sample_kernel(Task<T> task) {
  Shared* shared = shared_memory<Shared>();
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * THREADS;
  if (first) task.head->found[0] = 0;
  const Part total = grid_total(counted(task), task.head->parts, shared->parts);
  const int64_t most = task.k < total.positive ? task.k : total.positive;
  const double want = wanted(most);

  Limit limit{want < total.positive ? fixed_log(want) - total.mass.log() : INFINITE_KEY};
  int64_t found = 0;
  bool settled = most == 0;
  for (int round = 0; !settled && round < MOST_ROUNDS; ++round) {
    if (first) task.head->found[(round + 1) % 3] = 0;
    unsigned long long* counter = task.head->found + round % 3;
    scan(task, limit.now, counter);
    grid_barrier();
    found = static_cast<int64_t>(*static_cast<volatile unsigned long long*>(counter));
    if (found < most) {
      const Part rest = grid_total(counted_beyond(task, limit.now), task.head->parts, shared->parts);
      limit.raise(want - found, rest.mass);
    } else if (found > task.capacity) {
      limit.lower();
    } else {
      settled = true;
    }
  }

  const int64_t ready = settled ? most : 0;
  for (int64_t i = ready + thread; i < task.k; i += threads) {
    task.indices[i] = -1;
    task.probabilities[i] = 0;
  }
  if (task.shares != nullptr) {
    for (int64_t i = thread; i < task.capacity; i += threads) {
      const bool used = settled && i < found;
      if (!used) task.keys[i] = INFINITE_KEY, task.candidates[i] = NEVER;
      task.shares[i] = used ? static_cast<T>(power(task.priorities[task.candidates[i]], task.alpha).over(total.mass)) : T(0);
    }
  } else if (settled) {
    place_by_rank(task, found, most, total.mass, shared);
  }
  if (first) {
    task.status[0] = total.positive;
    task.status[1] = total.first_bad == NEVER ? -1 : total.first_bad;
    task.status[2] = !settled;
  }
}

template <typename T>
__global__ void race_keys_kernel(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < count; i += stride) {
    keys[i] = race_key(priorities[i], i, seed, alpha);
  }
}

template <typename T>
void launch_sample(const Task<T>& task, void* stream) {
  const auto kernel = priority_sample_kernel<T>;
  const int64_t by_count = task.count / (THREADS * (16 / sizeof(T))) + 1, by_rank = task.capacity / (4 * WARPS) + 1;
  const int64_t useful = std::min<int64_t>(std::max(by_count, by_rank), SAMPLE_BLOCKS);
  Launch config{"priority_sample", task.count, 1, THREADS};
  config.shared = sizeof(Shared);
  config.grid = static_cast<unsigned>(std::min<int64_t>(useful, resident_blocks(kernel, THREADS, sizeof(Shared))));
  config.cooperative = true;
  config.stream = stream;
  launch(config, kernel, task);
}

}  // namespace

template <typename T>
void priority_sample_cuda(const T* priorities, int64_t count, int64_t k, uint64_t seed, double alpha,
                          const SampleSpace& space, int64_t* indices, T* probabilities, int64_t* status, int device,
                          void* stream) {
  const DeviceGuard guard(device, "priority_sample", count);
  launch_sample(Task<T>{priorities, count, k, space.capacity, seed, alpha, static_cast<Head*>(space.head), space.keys,
                        space.candidates, static_cast<T*>(space.shares), indices, probabilities, status},
                stream);
}

template void priority_sample_cuda(const float*, int64_t, int64_t, uint64_t, double, const SampleSpace&, int64_t*,
                                   float*, int64_t*, int, void*);
template void priority_sample_cuda(const double*, int64_t, int64_t, uint64_t, double, const SampleSpace&, int64_t*,
                                   double*, int64_t*, int, void*);

template <typename T>
void race_keys_cuda(const T* priorities, double* keys, int64_t count, uint64_t seed, double alpha, int device,
                    void* stream) {
  const DeviceGuard guard(device, "priority_sample", count);
  Launch config{"race_keys", count, static_cast<unsigned>(std::min<int64_t>(count / THREADS + 1, SAMPLE_BLOCKS)), THREADS};
  config.stream = stream;
  launch(config, race_keys_kernel<T>, priorities, keys, count, seed, alpha);
}

template void race_keys_cuda(const float*, double*, int64_t, uint64_t, double, int, void*);
template void race_keys_cuda(const double*, double*, int64_t, uint64_t, double, int, void*);

}  // namespace r1v2_fast
