// PriorityIndex and draws with replacement as Python sees them.
#include "priority_index.h"

#include "bind.h"
#include "priority_draw.h"

namespace py = pybind11;

namespace r1v2_fast {
namespace {

PriorityIndex index_of(int64_t capacity, double alpha, uintptr_t leaves, uintptr_t powers, uintptr_t sums) {
  return {capacity, alpha, pointer<float>(leaves), pointer<double>(powers), pointer<double>(sums)};
}

int64_t sums_doubles(int64_t capacity) { return SumLevels(capacity).doubles(); }
int64_t root(int64_t capacity) { return SumLevels(capacity).root(); }

void build(int64_t capacity, double alpha, uintptr_t leaves, uintptr_t powers, uintptr_t sums, int threads, int device,
           uintptr_t stream) {
  const PriorityIndex index = index_of(capacity, alpha, leaves, powers, sums);
  py::gil_scoped_release release;
  if (device < 0) return priority_index_build_cpu(index, threads);
#ifdef R1V2_FAST_CUDA
  priority_index_build_cuda(index, device, pointer<void>(stream));
#else
  (void)stream;
  no_cuda();
#endif
}

int64_t update_bytes(int64_t count) {
#ifdef R1V2_FAST_CUDA
  return priority_index_update_bytes(count);
#else
  (void)count;
  no_cuda();
#endif
}

void update(int64_t capacity, double alpha, uintptr_t leaves, uintptr_t powers, uintptr_t sums, uintptr_t indices,
            uintptr_t priorities, int64_t count, uintptr_t workspace, int64_t workspace_bytes, int threads, int device,
            uintptr_t stream) {
  const PriorityIndex index = index_of(capacity, alpha, leaves, powers, sums);
  const auto* at = pointer<const int64_t>(indices);
  const auto* p = pointer<const float>(priorities);
  py::gil_scoped_release release;
  if (device < 0) return priority_index_update_cpu(index, at, p, count, threads);
#ifdef R1V2_FAST_CUDA
  priority_index_update_cuda(index, at, p, count, pointer<void>(workspace), workspace_bytes, device, pointer<void>(stream));
#else
  (void)workspace, (void)workspace_bytes, (void)stream;
  no_cuda();
#endif
}

int64_t sample_bytes(int64_t capacity, int64_t k, bool replacement) {
#ifdef R1V2_FAST_CUDA
  return priority_index_sample_bytes(capacity, k, replacement);
#else
  (void)capacity, (void)k, (void)replacement;
  no_cuda();
#endif
}

void sample(int64_t capacity, double alpha, uintptr_t leaves, uintptr_t powers, uintptr_t sums, int64_t k, uint64_t seed,
            bool replacement, uintptr_t indices, uintptr_t probabilities, uintptr_t drawn, uintptr_t workspace,
            int64_t workspace_bytes, int threads, int device, uintptr_t stream) {
  const PriorityIndex index = index_of(capacity, alpha, leaves, powers, sums);
  auto* at = pointer<int64_t>(indices);
  auto* p = pointer<float>(probabilities);
  auto* count = pointer<int64_t>(drawn);
  py::gil_scoped_release release;
  if (device < 0) {
    *count = priority_index_sample_cpu(index, k, seed, replacement, at, p, threads);
    return;
  }
#ifdef R1V2_FAST_CUDA
  priority_index_sample_cuda(index, k, seed, replacement, at, p, count, pointer<void>(workspace), workspace_bytes, device,
                             pointer<void>(stream));
#else
  (void)workspace, (void)workspace_bytes, (void)stream;
  no_cuda();
#endif
}

int64_t draw_bytes(int64_t count) {
#ifdef R1V2_FAST_CUDA
  return priority_draw_bytes(count);
#else
  (void)count;
  no_cuda();
#endif
}

// status [2]: positive, first_bad
template <typename T>
void draw(uintptr_t priorities, int64_t count, int64_t k, uint64_t seed, double alpha, uintptr_t indices,
          uintptr_t probabilities, uintptr_t status, uintptr_t workspace, int64_t workspace_bytes, int threads, int device,
          uintptr_t stream) {
  const auto* p = pointer<const T>(priorities);
  auto* at = pointer<int64_t>(indices);
  auto* shares = pointer<T>(probabilities);
  auto* seen = pointer<int64_t>(status);
  py::gil_scoped_release release;
  if (device < 0) {
    const Drawn drawn = priority_draw_cpu(p, count, k, seed, alpha, at, shares, threads);
    seen[0] = drawn.positive;
    seen[1] = drawn.first_bad;
    return;
  }
#ifdef R1V2_FAST_CUDA
  priority_draw_cuda(p, count, k, seed, alpha, at, shares, seen, pointer<void>(workspace), workspace_bytes, device,
                     pointer<void>(stream));
#else
  (void)workspace, (void)workspace_bytes, (void)stream;
  no_cuda();
#endif
}

template <typename T>
void bind_draw(py::module_& m, const char* name) {
  using py::arg;
  m.def(name, &draw<T>, py::kw_only(), arg("priorities"), arg("count"), arg("k"), arg("seed"), arg("alpha"),
        arg("indices"), arg("probabilities"), arg("status"), arg("workspace"), arg("workspace_bytes"), arg("threads"),
        arg("device"), arg("stream"));
}

}  // namespace

void bind_priority_index(py::module_& m) {
  using py::arg;
  m.def("priority_index_doubles", &sums_doubles, arg("capacity"));
  m.def("priority_index_root", &root, arg("capacity"));
  m.def("priority_index_build", &build, py::kw_only(), arg("capacity"), arg("alpha"), arg("leaves"), arg("powers"),
        arg("sums"), arg("threads"), arg("device"), arg("stream"));
  m.def("priority_index_update_bytes", &update_bytes, arg("count"));
  m.def("priority_index_update", &update, py::kw_only(), arg("capacity"), arg("alpha"), arg("leaves"), arg("powers"),
        arg("sums"), arg("indices"), arg("priorities"), arg("count"), arg("workspace"), arg("workspace_bytes"),
        arg("threads"), arg("device"), arg("stream"));
  m.def("priority_index_sample_bytes", &sample_bytes, arg("capacity"), arg("k"), arg("replacement"));
  m.def("priority_index_sample", &sample, py::kw_only(), arg("capacity"), arg("alpha"), arg("leaves"), arg("powers"),
        arg("sums"), arg("k"), arg("seed"), arg("replacement"), arg("indices"), arg("probabilities"), arg("drawn"),
        arg("workspace"), arg("workspace_bytes"), arg("threads"), arg("device"), arg("stream"));
  m.def("priority_draw_bytes", &draw_bytes, arg("count"));
  bind_draw<float>(m, "priority_draw_f32");
  bind_draw<double>(m, "priority_draw_f64");
}

}  // namespace r1v2_fast
