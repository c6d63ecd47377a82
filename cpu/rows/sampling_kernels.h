// The table of sampling kernels, which are the passes over a whole row of logits. Each call runs on one thread.
#pragma once
#include "base/isa.h"

namespace mlxeff {

struct Candidate {
  float value;
  int32_t id;
};
constexpr int64_t sampling_group = 64;
struct SamplingKernels {
  // Sets out[i] to the largest element of the i-th group of `sampling_group` elements; the last group may be shorter.
  void (*group_maxima)(const float* x, int64_t n, float* out);
  // Appends the elements >= floor to out, in the order of ids, and returns their number.
  int64_t (*gather)(const float* x, int64_t n, int32_t first_id, float floor, Candidate* out);
  // Sets w to exp((x - max) * inverse_temperature) where x >= floor, and to 0 elsewhere. Returns the sum of w.
  double (*weights)(const float* x, float* w, int64_t n, float max, float inverse_temperature, float floor);
};
MLXEFF_DECLARE_FAMILY(SamplingKernels, sampling_kernels)

}  // namespace mlxeff
