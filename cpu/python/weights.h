// The weights of a native decoder: matrices and vectors that Python gives by name.
//
// A matrix is a dict with a "kind", the arrays and numbers of that kind, and a "bias", an array (N) or None:
//   dense   weight (N, K)
//   affine  weight (packed, uint32), scales, biases; group_size, bits: as mx.quantize makes them
//   seedlm  blocks, or seeds, coefficients, exponents; cols, columns, states, exponent_bias: mlxeff/seedlm/format.py
#pragma once
#include <deque>

#include "decoder/pass_team.h"
#include "python/named.h"

namespace mlxeff {

class Weights {
 public:
  // The array, evaluated and row-contiguous; it is kept for as long as this object lives.
  const mx::array& keep(const mx::array& given);
  // The same in float32; null for none.
  const float* floats(const std::optional<mx::array>& given);
  // The matrix `given`, which is to be (rows, columns); rows 0: of any number.
  Linear linear(Named given, int64_t rows, int64_t columns);

 private:
  std::deque<mx::array> arrays_;
};

}  // namespace mlxeff
