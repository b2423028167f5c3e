// The twins of csrc/launch.h and csrc/async_copy.h on the CPU: see emulated_cuda.h, which includes this.
#pragma once

namespace r1v2_fast {

// the twins of launch.h

struct Launch {
  const char* op;
  int64_t count;
  unsigned grid;
  unsigned block;
  unsigned cluster = 1;
  size_t shared = 0;
  bool cooperative = false;
  void* stream = nullptr;
};

namespace emulated {

inline void seed(uint64_t value) { shuffled = value != 0, random.seed(value); }

template <class... P, class... A>
void launch(const Launch& config, void (*function)(P...), A... arguments) {
  if (config.grid == 0 || config.block == 0 || config.block > 1024)
    fail("%s: grid %u, block %u", config.op, config.grid, config.block);
  if (config.cooperative && config.cluster > 1) fail("%s: a cooperative grid of clusters is not emulated", config.op);
  if (config.grid % config.cluster != 0) fail("%s: %u blocks, clusters of %u", config.op, config.grid, config.cluster);
  if (config.cooperative && config.grid > resident)
    fail("%s: %u blocks, %u resident", config.op, config.grid, resident);
  const std::tuple<P...> given(arguments...);
  const std::function<void()> body = [&] { std::apply(function, given); };
  kernel = &body;
  cooperative = config.cooperative;
  blockDim = {config.block, 1, 1}, gridDim = {config.grid, 1, 1};
  on_switch = [](const Fiber& fiber) { threadIdx = {fiber.thread, 0, 0}, blockIdx = {fiber.block->index, 0, 0}; };
  const uint32_t width = config.cooperative ? config.grid : config.cluster;
  std::vector<uint32_t> firsts;
  for (uint32_t first = 0; first < config.grid; first += width) firsts.push_back(first);
  if (shuffled) std::shuffle(firsts.begin(), firsts.end(), random);
  for (const uint32_t first : firsts) run_wave(first, width, config.block, config.shared);
}

}  // namespace emulated

using emulated::launch;

template <class... P>
unsigned resident_blocks(void (*)(P...), unsigned, size_t = 0) {
  return emulated::resident;
}

template <class T = unsigned char>
T* shared_memory() {
  if (emulated::current->block->bytes < sizeof(T))
    emulated::fail(
        "the launch gives %zu bytes of shared memory, the kernel "
        "wants %zu",
        emulated::current->block->bytes, sizeof(T));
  return reinterpret_cast<T*>(emulated::current->block->shared);
}

inline void grid_barrier() {
  if (!emulated::cooperative) emulated::fail("grid_barrier in a grid that is not cooperative");
  emulated::meet(emulated::wave, "grid_barrier");
}

// the twins of async_copy.h

namespace emulated {

struct Mbarrier {                     // in the 64 bits of a real one
  uint16_t phase, expected, pending;  // arrivals; the phase's parity is that of a count
  int16_t sixteens;                   // bytes / 16 that are still to come
  static Mbarrier& of(uint64_t* barrier) {
    if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail("an mbarrier must be 8-byte aligned");
    return *reinterpret_cast<Mbarrier*>(barrier);
  }
  void settle() {
    if (pending == 0 && sixteens == 0) ++phase, pending = expected;
  }
};

inline void complete_bytes(uint64_t* barrier, uint32_t bytes) {
  Mbarrier& state = Mbarrier::of(barrier);
  state.sixteens = static_cast<int16_t>(state.sixteens - static_cast<int>(bytes / 16));
  if (state.sixteens < 0) fail("an mbarrier gets more bytes than it was told to expect");
  state.settle();
}

}  // namespace emulated

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  emulated::Mbarrier::of(barrier) = {0, count, count, 0};
}
inline void mbarrier_init_fence() {}

inline void mbarrier_arrive(uint64_t* barrier) {
  auto& state = emulated::Mbarrier::of(barrier);
  if (state.pending == 0) emulated::fail("more arrivals at an mbarrier than it expects: %u", state.expected);
  --state.pending;
  state.settle();
}

inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  if (bytes % 16 != 0 || bytes >= 1u << 19) emulated::fail("an mbarrier cannot expect %u bytes", bytes);
  auto& state = emulated::Mbarrier::of(barrier);
  state.sixteens = static_cast<int16_t>(state.sixteens + static_cast<int>(bytes / 16));
  mbarrier_arrive(barrier);
}

inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  emulated::wait(reinterpret_cast<const uint32_t*>(&emulated::Mbarrier::of(barrier)), 1, parity & 1, "mbarrier_wait");
}

inline void bulk_load(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  const auto a = reinterpret_cast<uintptr_t>(to), b = reinterpret_cast<uintptr_t>(from);
  if ((a | b | bytes) % 16 != 0) emulated::fail("bulk_load: %p from %p, %u bytes: not aligned to 16", to, from, bytes);
  const auto* mine = emulated::current->block;
  const auto start = reinterpret_cast<uintptr_t>(mine->shared);
  if (a < start || a + bytes > start + mine->bytes) emulated::fail("bulk_load leaves the block's shared memory");
  emulated::copies.push_back({to, from, bytes, barrier});
  if (!emulated::shuffled || emulated::random() % 2 == 0) {
    emulated::perform(emulated::copies.back());
    emulated::copies.pop_back();
  }
}
inline void fence_proxy_async() {}

inline unsigned cluster_rank() { return static_cast<unsigned>(emulated::current->block - emulated::blocks.data()); }
inline unsigned cluster_size() { return static_cast<unsigned>(emulated::blocks.size()); }

inline void cluster_arrive() {
  if (emulated::cooperative) emulated::fail("a cluster's barrier in a cooperative grid");
  if (std::exchange(emulated::current->wave_arrived, true)) emulated::fail("cluster_arrive twice without a wait");
  emulated::current->wave_generation = emulated::wave.arrive("cluster_barrier");
}
inline void cluster_wait() {
  if (!std::exchange(emulated::current->wave_arrived, false)) emulated::fail("cluster_wait without cluster_arrive");
  emulated::wait(&emulated::wave.generation, ~0u, emulated::current->wave_generation, "cluster_barrier");
}

template <class T>
T* of_rank(T* mine, unsigned rank) {
  if (rank >= cluster_size()) emulated::fail("rank %u of a cluster of %u", rank, cluster_size());
  const auto offset = reinterpret_cast<const unsigned char*>(mine) - emulated::current->block->shared;
  const auto& there = emulated::blocks[rank];
  if (!there.begun || there.alive == 0)
    emulated::fail("shared memory of rank %u, which %s", rank, there.begun ? "has left" : "has not begun");
  return reinterpret_cast<T*>(there.shared + offset);
}

}  // namespace r1v2_fast

extern "C" inline __attribute__((used)) void emulated_seed(uint64_t value) { r1v2_fast::emulated::seed(value); }
