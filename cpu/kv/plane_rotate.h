// The Hadamard transform of a head, which is its own inverse.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include <math.h>

#include "base/simd_math.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// Lane i of the result is lane i ^ step.
template <int step>
MLXEFF_INLINE vf swap_lanes(vf x) {
#if defined(__clang__)
  vf swapped;
  for (int i = 0; i < VL; ++i) swapped[i] = x[i ^ step];
  return swapped;
#else
  return __builtin_shuffle(x, lane_numbers() ^ step);
#endif
}

// The butterflies at distances step, 2 step, ... below VL. A product with 1 or -1 is exact, so the result does not
// depend on whether it is fused with the sum.
template <int step>
MLXEFF_INLINE vf lane_butterflies(vf x) {
  if constexpr (step < VL) {
    const vf sign = (lane_numbers() & step) != 0 ? broadcast(-1.0f) : broadcast(1.0f);
    return lane_butterflies<2 * step>(swap_lanes<step>(x) + x * sign);
  }
  return x;
}

// The butterflies at distances 1, 2, 4, ... in this order, and then the factor: the same sums at every level.
static inline void rotate_row(const float* from, float* to, int64_t size) {
  const int64_t block = size & -size;
  for (int64_t i = 0; i < size; i += VL) store(to + i, lane_butterflies<1>(load(from + i)));
  for (int64_t step = VL; step < block; step *= 2)
    for (int64_t first = 0; first < size; first += 2 * step)
      for (int64_t i = first; i < first + step; i += VL) {
        const vf a = load(to + i), b = load(to + i + step);
        store(to + i, a + b);
        store(to + i + step, a - b);
      }
  const vf factor = broadcast(1.0f / sqrtf(float(block)));
  for (int64_t i = 0; i < size; i += VL) store(to + i, load(to + i) * factor);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
