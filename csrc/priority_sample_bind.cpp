#include "priority_sample.h"

#include "bind.h"

namespace py = pybind11;

namespace r1v2_fast {
namespace {

// status [3]: positive, first_bad, 1 where no limit was found. The rest of the space is the GPU's
template <typename T>
void sample(uintptr_t priorities, int64_t count, int64_t k, uint64_t seed, double alpha, uintptr_t indices,
            uintptr_t probabilities, uintptr_t status, uintptr_t head, int64_t capacity, uintptr_t keys,
            uintptr_t candidates, uintptr_t shares, int threads, int device, uintptr_t stream) {
  const auto* p = pointer<const T>(priorities);
  auto* at = pointer<int64_t>(indices);
  auto* probability = pointer<T>(probabilities);
  auto* seen = pointer<int64_t>(status);
  py::gil_scoped_release release;
  if (device < 0) {
    const Drawn drawn = priority_sample_cpu(p, count, k, seed, alpha, at, probability, threads);
    seen[0] = drawn.positive, seen[1] = drawn.first_bad, seen[2] = 0;
    return;
  }
#ifdef R1V2_FAST_CUDA
  const SampleSpace space{pointer<void>(head), capacity, pointer<double>(keys), pointer<int64_t>(candidates),
                          pointer<void>(shares)};
  priority_sample_cuda(p, count, k, seed, alpha, space, at, probability, seen, device, pointer<void>(stream));
#else
  (void)head, (void)capacity, (void)keys, (void)candidates, (void)shares, (void)stream;
  no_cuda();
#endif
}

template <typename T>
void race_keys(uintptr_t priorities, uintptr_t keys, int64_t count, uint64_t seed, double alpha, int device,
               uintptr_t stream) {
  const auto* in = pointer<const T>(priorities);
  auto* out = pointer<double>(keys);
  py::gil_scoped_release release;
  if (device < 0) return race_keys_cpu(in, out, count, seed, alpha);
#ifdef R1V2_FAST_CUDA
  race_keys_cuda(in, out, count, seed, alpha, device, pointer<void>(stream));
#else
  (void)stream;
  no_cuda();
#endif
}

template <typename T>
void bind(py::module_& m, const char* sample_name, const char* keys_name) {
  using py::arg;
  m.def(sample_name, &sample<T>, py::kw_only(), arg("priorities"), arg("count"), arg("k"), arg("seed"), arg("alpha"),
        arg("indices"), arg("probabilities"), arg("status"), arg("head"), arg("capacity"), arg("keys"),
        arg("candidates"), arg("shares"), arg("threads"), arg("device"), arg("stream"));
  m.def(keys_name, &race_keys<T>, py::kw_only(), arg("priorities"), arg("keys"), arg("count"), arg("seed"), arg("alpha"),
        arg("device"), arg("stream"));
}

}  // namespace

void bind_priority_sample(py::module_& m) {
  bind<float>(m, "priority_sample_f32", "race_keys_f32");
  bind<double>(m, "priority_sample_f64", "race_keys_f64");
  m.def("sample_capacity", &sample_capacity, py::arg("count"), py::arg("k"));
  m.attr("SAMPLE_HEAD_BYTES") = SAMPLE_HEAD_BYTES;
  m.attr("RANKED_MOST") = RANKED_MOST;
}

}  // namespace r1v2_fast
