// Chunks of a range over threads. What a chunk computes depends on the chunk alone, so results do not depend on their number.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace r1v2_fast {

// run(chunk) for every chunk in [0, chunks); the first exception is thrown again here
template <typename Run>
void parallel_chunks(int64_t chunks, int threads, const Run& run) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failing;
  const auto work = [&] {
    try {
      for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks;) run(chunk);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failing);
      if (!failure) failure = std::current_exception();
      next = chunks;
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, chunks); ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // no more threads to be had: those there are do the work
  }
  work();
  for (auto& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace r1v2_fast
