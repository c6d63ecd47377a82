// The kernel of the rotary position embedding. Each call runs on one thread over a range of rows.
#pragma once
#include "base/isa.h"

namespace mlxeff {

struct RopeArgs {
  mlxeff_heads x, y;
  int64_t B, H, S, E, rotated;
  const float *cos, *sin;  // (S, rotated / 2)
  bool inverse;
};
struct RopeKernels {
  // Rows [begin, end) of B * S * H, heads innermost.
  void (*rows)(const RopeArgs& args, int64_t begin, int64_t end);
};
MLXEFF_DECLARE_FAMILY(RopeKernels, rope_kernels)

}  // namespace mlxeff
