// What the sources of the plane kernels share: the attention of one part of the sequence, and what completes a row.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "kv/plane_kernels.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr float upper_middle = 7.5f / 16.0f;  // of a scale: the middle of the numbers with the same upper half

// Computes the partial results of tasks [begin, end). Returns false if memory is exhausted.
bool attend_parts(const PlaneArgs& args, int64_t begin, int64_t end);

// Merges the parts of output row `row` of B * S * H.
void merge_row(const PlaneArgs& args, int64_t row);

static inline float* plane_partial(const PlaneArgs& a, int64_t row, int64_t part) {
  return a.partial + (row * a.parts + part) * (a.sizes.size + 2);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
