// What the bindings share: addresses as Python sends them, which the callers in r1v2_fast have checked. `device` -1 is the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

namespace r1v2_fast {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#ifndef R1V2_FAST_CUDA
[[noreturn]] inline void no_cuda() { throw std::runtime_error("r1v2_fast._C was built without CUDA"); }
#endif

}  // namespace r1v2_fast
