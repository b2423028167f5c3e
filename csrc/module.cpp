// r1v2_fast._C: raw pointers, sizes, a device index and a stream handle; the Python op validates before it calls.
// No torch header, so one file serves every torch version.
#include <pybind11/pybind11.h>

#ifdef R1V2_FAST_CUDA
#include <cuda_runtime.h>
#endif

namespace py = pybind11;

namespace r1v2_fast {

void bind_linear_logprob_rows(py::module_& m);
void bind_priority_index(py::module_& m);
void bind_priority_sample(py::module_& m);

namespace {

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
}  // namespace r1v2_fast

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.attr("cuda_architectures") = R1V2_FAST_ARCHITECTURES;
  m.attr("nvcc_version") = R1V2_FAST_NVCC;  // "" without CUDA
  m.attr("compiler") = R1V2_FAST_COMPILER;
  m.def("cuda_versions", &r1v2_fast::cuda_versions);
  r1v2_fast::bind_linear_logprob_rows(m);
  r1v2_fast::bind_priority_index(m);
  r1v2_fast::bind_priority_sample(m);
}
