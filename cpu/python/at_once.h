// What calls that compute at once, outside of MLX's graph, do with arrays.
#pragma once
#include <vector>

#include "python/mlx_ops.h"

namespace mlxeff {

// Evaluates arrays that a call reads, without Python's lock while it waits. Refuses arrays that are being traced: what
// is computed from their values has no gradient. Must be called with Python's lock.
void evaluate(const std::vector<mx::array>& arrays);

// Returns the array, or a copy of it, evaluated and in memory without gaps.
mx::array in_memory(const mx::array& given);

// Returns an array with memory that the call fills.
mx::array new_array(mx::Shape shape, mx::Dtype dtype);

}  // namespace mlxeff
