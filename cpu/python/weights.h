// Weights: owns the arrays of a native decoder, which Python passes as dicts of named matrices and vectors.
//
// A matrix is a dict with a "kind", the arrays and numbers of that kind, and a "bias", which is an array (N) or None:
//   dense   weight (N, K)
//   affine  weight (packed, uint32), scales, biases; group_size, bits: in the format of mx.quantize
//   affine_planes  upper, scales, biases and lower, lower_scales, lower_biases: the sum of two affine matrices of 4
//           bits; group_size
//   seedlm  blocks, or seeds, coefficients, exponents; cols, columns, states, exponent_bias: mlxeff/seedlm/format.py
#pragma once
#include <deque>

#include "decoder/pass_team.h"
#include "python/named.h"

namespace mlxeff {

class Weights {
 public:
  // Returns the array, evaluated and row-contiguous. This object keeps it alive.
  const mx::array& keep(const mx::array& given);
  // Returns the data of the array in float32, kept alive in the same way; null if there is no array.
  const float* floats(const std::optional<mx::array>& given);
  // Reads the matrix `given` and checks that it is (rows, columns); `rows` 0 allows any number of rows.
  Linear linear(Named given, int64_t rows, int64_t columns);

 private:
  std::deque<mx::array> arrays_;
};

}  // namespace mlxeff
