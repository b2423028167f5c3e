// The row kernel as Python sees it: raw pointers and sizes, which r1v2_fast/ops/_linear_logprob_native.py has checked.
#include "linear_logprob_rows.h"

#include "bind.h"

namespace py = pybind11;

namespace r1v2_fast {
namespace {

int64_t limit(int device) {
#ifdef R1V2_FAST_CUDA
  return linear_logprob_rows_limit(device);
#else
  (void)device;
  no_cuda();
#endif
}

void rows(uintptr_t logits, uintptr_t targets, uintptr_t temperatures, uintptr_t bias, uintptr_t blocked, uintptr_t raw,
          uintptr_t matrix, int64_t count, int64_t vocabulary, int64_t stride, int64_t raw_stride,
          int64_t matrix_stride, float logit_scale, float softcap, float temperature, int stored, bool own,
          bool entropy, bool top1, bool mean, bool squares, unsigned cluster, int device, uintptr_t stream) {
  const LogprobRows given{pointer<const float>(logits),
                          pointer<const int64_t>(targets),
                          pointer<const float>(temperatures),
                          pointer<const float>(bias),
                          pointer<const uint8_t>(blocked),
                          pointer<float>(raw),
                          pointer<void>(matrix),
                          count,
                          vocabulary,
                          stride,
                          raw_stride,
                          matrix_stride,
                          logit_scale,
                          softcap,
                          temperature,
                          static_cast<Stored>(stored),
                          own,
                          entropy,
                          top1,
                          mean,
                          squares,
                          cluster};
  py::gil_scoped_release release;
#ifdef R1V2_FAST_CUDA
  linear_logprob_rows(given, device, pointer<void>(stream));
#else
  (void)given, (void)device, (void)stream;
  no_cuda();
#endif
}

}  // namespace

void bind_linear_logprob_rows(py::module_& m) {
  using py::arg;
  m.def("linear_logprob_rows_limit", &limit, arg("device"));
  m.def("linear_logprob_rows", &rows, py::kw_only(), arg("logits"), arg("targets"), arg("temperatures"), arg("bias"),
        arg("blocked"), arg("raw"), arg("matrix"), arg("rows"), arg("vocabulary"), arg("stride"), arg("raw_stride"),
        arg("matrix_stride"), arg("logit_scale"), arg("softcap"), arg("temperature"), arg("stored"), arg("own"),
        arg("entropy"), arg("top1"), arg("mean"), arg("squares"), arg("cluster"), arg("device"), arg("stream"));
}

}  // namespace r1v2_fast
