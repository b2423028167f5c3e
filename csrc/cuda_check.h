// CUDA errors as exceptions that name the op and its shape.
#pragma once

#ifdef R1V2_FAST_EMULATED
#include "emulated_cuda.h"  // tests/native_checks
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace r1v2_fast {

inline void check_cuda(cudaError_t error, const char* op, int64_t count) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + " on " + std::to_string(count) +
                           " elements: " + cudaGetErrorString(error));
}

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op, int64_t count) {
    check_cuda(cudaGetDevice(&before_), op, count);
    check_cuda(cudaSetDevice(device), op, count);
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

}  // namespace r1v2_fast
