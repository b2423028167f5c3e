// The emulated row kernel for ctypes: tests/test_linear_logprob_rows.py.
#include "linear_logprob_rows.cu"

extern "C" const char* rows_error(const r1v2_fast::LogprobRows* rows) {
  static std::string message;
  try {
    r1v2_fast::linear_logprob_rows(*rows, 0, nullptr);
    return nullptr;
  } catch (const std::exception& error) {
    return (message = error.what()).c_str();
  }
}

extern "C" int64_t rows_limit() { return r1v2_fast::linear_logprob_rows_limit(0); }

// Under an address sanitizer: every buffer is as long as it has to be and no longer.
int main() {
  using namespace r1v2_fast;
  const int64_t n = 2;
  for (const int64_t V : {1, 6, 301, 9001}) {
    for (const unsigned cluster : {1u, 8u}) {
      for (const int stored : {0, 1, 2, 3}) {
        for (const bool shaped : {false, true}) {
          emulated::seed(V + cluster + stored);
          const int64_t width = (V + 3) / 4 * 4, stride = width + 8, size = stored == 1 ? 4 : 2;
          std::vector<float> logits(stride + width, 1.0f), temperatures(n, 0.5f), bias(V, 1.0f), raw(10 * n);
          std::vector<int64_t> targets = {V - 1, V};
          std::vector<uint8_t> blocked(V, 0), matrix((stride + width) * size);
          LogprobRows rows{};
          rows.logits = logits.data(), rows.targets = targets.data(), rows.raw = raw.data(),
          rows.matrix = matrix.data();
          if (shaped) rows.temperatures = temperatures.data(), rows.bias = bias.data(), rows.blocked = blocked.data();
          if (shaped) rows.softcap = 3.0f, rows.entropy = true;
          rows.rows = n, rows.vocabulary = V, rows.stride = rows.matrix_stride = stride, rows.raw_stride = n;
          rows.logit_scale = rows.temperature = 1.0f, rows.own = true;
          rows.stored = static_cast<Stored>(stored), rows.cluster = cluster;
          linear_logprob_rows(rows, 0, nullptr);
          if (raw[n] != static_cast<float>(V - 1)) return 1;  // equal logits: each of the others adds 1
        }
      }
    }
  }
}
