// The layout of a SeedLM matrix that Python passes to mlxeff._native, and the function that registers the SeedLM
// operators.
#pragma once
#include <vector>

#include "python/mlx_ops.h"

namespace mlxeff {

// The sizes of a seed-encoded matrix. Its data are one array (blocks) or three arrays (seeds, coefficients, exponents),
// which are passed separately.
struct SeedLayout {
  int64_t rows, cols;
  int columns, states, exponent_bias;

  // Throws std::invalid_argument for arrays that do not fit.
  void check_arrays(const std::vector<mx::array>& arrays) const;
  // Returns the C description of the matrix whose row-contiguous arrays begin at inputs[first].
  mlxeff_seedlm_weight weight(const std::vector<mx::array>& inputs, size_t first) const;

  bool operator==(const SeedLayout& o) const {
    return rows == o.rows && cols == o.cols && columns == o.columns && states == o.states &&
           exponent_bias == o.exponent_bias;
  }
};

void bind_seedlm(nb::module_& m);

}  // namespace mlxeff
