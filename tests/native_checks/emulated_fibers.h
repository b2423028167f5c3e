// Threads of a CUDA kernel as fibers on one CPU thread: see emulated_cuda.h.
//
// A fiber runs until it waits; a warp runs as far as it gets before the next one does, in an order that a seed
// shuffles, so that what depends on a barrier that is not there comes out differently for some seed. A wave is the
// blocks that live at once: one, a cluster, or a cooperative grid. When nothing can run any more, that is a deadlock:
// the process says so and aborts.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace r1v2_fast::emulated {

[[noreturn]] [[gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("emulated CUDA: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputs("\n", stderr);
  std::abort();
}

// Threads that arrive and wait for the generation to pass. Slots hold what they bring, for two generations: the next
// one may write while this one is read, the one after it cannot.
struct Barrier {
  uint32_t expected = 0, arrived = 0, generation = 0;
  const char* what = "";
  uint64_t slot[2][32] = {};  // of lanes
  uint32_t votes[2] = {};

  uint32_t arrive(const char* name, bool vote = false) {
    if (arrived++ == 0) what = name;
    if (std::strcmp(what, name) != 0) fail("threads meet at different barriers: %s and %s", what, name);
    votes[generation & 1] += vote;
    const uint32_t mine = generation;
    if (arrived == expected) {
      arrived = 0;
      votes[++generation & 1] = 0;
    }
    return mine;
  }
};

struct Block {
  uint32_t index = 0, alive = 0;
  uint32_t begins = 0;  // in this round
  bool begun = false;
  size_t bytes = 0;
  unsigned char* shared = nullptr;  // freed when the last thread leaves, so that a sanitizer sees a late peer
  Barrier barrier;
  std::vector<std::map<uint32_t, Barrier>> warps;  // by mask
};

struct Fiber {
  ucontext_t context;  // to start in; then _setjmp, which unlike swapcontext makes no system call
  jmp_buf place;
  bool started = false;
  Block* block = nullptr;
  uint32_t thread = 0;
  bool done = false;
  const uint32_t* watched = nullptr;  // runnable where null, or once (*watched & mask) != unless
  uint32_t mask = 0, unless = 0;
  const char* waits_at = "";
  uint32_t wave_generation = 0;  // between arrive and wait
  bool wave_arrived = false;
  void* fake_stack = nullptr;

  bool runnable() const { return watched == nullptr || (*watched & mask) != unless; }
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* barrier;
};

inline constexpr size_t kStack = 128 << 10;
inline constexpr uint32_t kRounds = 4;  // in which the blocks of a wave begin

inline std::mt19937_64 random{0};
inline bool shuffled = false;
inline uint32_t resident = 4;  // what resident_blocks answers

inline Fiber* current = nullptr;
inline void (*on_switch)(const Fiber&) = nullptr;  // sets threadIdx and blockIdx
inline const std::function<void()>* kernel = nullptr;
inline std::vector<Block> blocks;  // of the wave
inline std::vector<Fiber> fibers;
inline Barrier wave;
inline bool cooperative = false;
inline std::vector<Copy> copies;  // asynchronous ones that are still to happen
inline uint32_t spins = 0;
inline jmp_buf scheduler;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;

inline void leaving(void** save, const void* stack, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
  (void)save, (void)stack, (void)size;
}

inline void landed(void* saved, const void** from = nullptr, size_t* size = nullptr) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(saved, from, size);
#endif
  (void)saved, (void)from, (void)size;
}

// From the current fiber to the scheduler, until it is resumed.
[[gnu::noinline]] inline void leave(bool for_good = false) {
  if (_setjmp(current->place) == 0) {
    leaving(for_good ? nullptr : &current->fake_stack, scheduler_stack, scheduler_stack_size);
    _longjmp(scheduler, 1);
  }
  landed(current->fake_stack);
}

// From the scheduler to a fiber, until it leaves.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  current = &fiber;
  on_switch(fiber);
  if (_setjmp(scheduler) == 0) {
    leaving(&scheduler_fake_stack, fiber.context.uc_stack.ss_sp, fiber.context.uc_stack.ss_size);
    if (std::exchange(current->started, true)) _longjmp(current->place, 1);
    setcontext(&current->context);
  }
  landed(scheduler_fake_stack);
}

// Until (*watched & mask) != unless.
inline void wait(const uint32_t* watched, uint32_t mask, uint32_t unless, const char* what) {
  if ((*watched & mask) != unless) return;
  Fiber& self = *current;
  self.watched = watched, self.mask = mask, self.unless = unless, self.waits_at = what;
  leave();
  self.watched = nullptr;
}

inline uint32_t meet(Barrier& barrier, const char* what, bool vote = false) {
  const uint32_t mine = barrier.arrive(what, vote);
  wait(&barrier.generation, ~0u, mine, what);
  return mine;
}

inline void complete_bytes(uint64_t* barrier, uint32_t bytes);  // of an mbarrier: emulated_cuda.h

inline void perform(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  complete_bytes(copy.barrier, copy.bytes);
}

[[noreturn]] inline void deadlock() {
  std::map<std::string, std::pair<uint32_t, std::string>> places;  // where: (threads, one of them)
  uint32_t gone = 0;
  for (const Fiber& fiber : fibers) {
    if (fiber.done) {
      ++gone;
      continue;
    }
    auto& place = places[fiber.waits_at];
    if (place.first++ == 0) {
      place.second = "block " + std::to_string(fiber.block->index) + " thread " + std::to_string(fiber.thread);
    }
  }
  std::string text;
  for (const auto& [where, count] : places) {
    text += "; " + std::to_string(count.first) + " wait at " + where + " (" + count.second + ")";
  }
  fail("deadlock: %u threads have left%s", gone, text.c_str());
}

inline void entry() {
  landed(nullptr, &scheduler_stack, &scheduler_stack_size);
  current->block->begun = true;
  (*kernel)();
  current->done = true;
  Block& block = *current->block;
  if (--block.alive == 0) {
    std::memset(block.shared, 0xff, block.bytes);
    ::operator delete(block.shared, std::align_val_t{128});
    block.shared = nullptr;
  }
  leave(true);
}

// Lets a warp run as far as it gets alone: where a barrier is missing, it is far ahead of the others. Whether it moved.
inline bool advance(std::vector<Fiber*>& lanes) {
  for (bool moved = false;; moved = true) {
    if (shuffled) std::shuffle(lanes.begin(), lanes.end(), random);
    uint32_t resumed = 0;
    const uint32_t spins_before = spins;
    for (Fiber* fiber : lanes) {
      if (!fiber->runnable()) continue;
      ++resumed;
      resume(*fiber);
    }
    lanes.erase(std::remove_if(lanes.begin(), lanes.end(), [](const Fiber* f) { return f->done; }), lanes.end());
    if (resumed == spins - spins_before) return moved;
  }
}

inline void run_wave(uint32_t first, uint32_t count, uint32_t threads, size_t shared) {
  static unsigned char* stacks = nullptr;
  static size_t room = 0;
  const size_t needed = size_t{count} * threads;
  if (needed > room) {
    if (stacks != nullptr) munmap(stacks, room * kStack);
    void* found =
        mmap(nullptr, needed * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) fail("no memory for %zu threads", needed);
    stacks = static_cast<unsigned char*>(found), room = needed;
  }
  blocks = std::vector<Block>(count);
  fibers = std::vector<Fiber>(needed);
  wave = Barrier{};
  wave.expected = static_cast<uint32_t>(needed);
  std::vector<std::vector<Fiber*>> warps;
  for (uint32_t b = 0; b < count; ++b) {
    Block& block = blocks[b];
    block.index = first + b, block.alive = threads, block.bytes = shared;
    block.begins = shuffled ? static_cast<uint32_t>(random() % kRounds) : 0;
    block.shared = static_cast<unsigned char*>(::operator new(shared, std::align_val_t{128}));
    std::memset(block.shared, 0xff, shared);  // NaN, -1: what is read before it is written shows
    block.barrier.expected = threads;
    block.warps.resize((threads + 31) / 32);
    for (uint32_t t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[size_t{b} * threads + t];
      fiber.block = &block, fiber.thread = t;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks + (size_t{b} * threads + t) * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, entry, 0);
      if (t % 32 == 0) warps.emplace_back();
      warps.back().push_back(&fiber);
    }
  }
  spins = 0;
  for (uint32_t round = 0; !warps.empty(); ++round) {
    if (shuffled) std::shuffle(warps.begin(), warps.end(), random);
    bool moved = false;
    for (auto& lanes : warps) {
      if (round >= lanes[0]->block->begins) moved = advance(lanes) || moved;
    }
    warps.erase(std::remove_if(warps.begin(), warps.end(), [](const auto& lanes) { return lanes.empty(); }),
                warps.end());
    if (moved) {
      spins = 0;
    } else if (!copies.empty()) {
      const std::vector<Copy> due = std::exchange(copies, {});
      for (const Copy& copy : due) perform(copy);
    } else if (round >= kRounds) {
      if (spins == 0) deadlock();
      if (spins > 1000000) fail("deadlock: threads spin, and nothing else happens");
    }
  }
  if (!copies.empty()) fail("a bulk copy outlives its block: nobody waited for it");
  current = nullptr;
}

}  // namespace r1v2_fast::emulated
