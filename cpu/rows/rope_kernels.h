// The table of the rotary position embedding's kernel and its arguments. Each call processes a range of rows on one
// thread.
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
  // Rotates the rows [begin, end) of B * S * H, where heads are the innermost index.
  void (*rows)(const RopeArgs& args, int64_t begin, int64_t end);
};
MLXEFF_DECLARE_FAMILY(RopeKernels, rope_kernels)

}  // namespace mlxeff
