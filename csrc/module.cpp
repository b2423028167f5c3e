// r1v2_fast._C: raw pointers, sizes, a device index and a stream handle; the Python op validates before it calls.
// No torch header, so one file serves every torch version.
#include <pybind11/pybind11.h>

#include <string>

#include "priority_sample.h"

#ifdef R1V2_FAST_CUDA
#include <cuda_runtime.h>
#endif

namespace py = pybind11;
using namespace r1v2_fast;

namespace {

template <typename T>
void race_keys(uintptr_t priorities, uintptr_t keys, int64_t count, uint64_t seed, double alpha, int device,
               uintptr_t stream) {
  const auto* in = reinterpret_cast<const T*>(priorities);
  auto* out = reinterpret_cast<double*>(keys);
  py::gil_scoped_release release;
  if (device < 0) return race_keys_cpu(in, out, count, seed, alpha);
#ifdef R1V2_FAST_CUDA
  race_keys_cuda(in, out, count, seed, alpha, device, reinterpret_cast<void*>(stream));
#else
  throw std::runtime_error("r1v2_fast._C was built without CUDA");
#endif
}

// (runtime, driver) as CUDA counts them, 13000 for 13.0; driver 0 where there is none
py::tuple cuda_versions() {
  int runtime = 0, driver = 0;
#ifdef R1V2_FAST_CUDA
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
#endif
  return py::make_tuple(runtime, driver);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.attr("cuda_architectures") = R1V2_FAST_ARCHITECTURES;
  m.def("cuda_versions", &cuda_versions);
  m.def("race_keys_f32", &race_keys<float>);
  m.def("race_keys_f64", &race_keys<double>);
}
