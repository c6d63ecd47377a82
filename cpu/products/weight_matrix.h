// A weight matrix of any kind.
#pragma once
#include "base/common.h"

namespace mlxeff {

// W (N, K): affine-quantised, or in SeedLM blocks, or dense (row-major, contiguous). The kind is that of the pointer
// which is not null.
struct WeightMatrix {
  int64_t N, K;
  mlxeff_qweight quantised;
  const void* dense;
  int dtype;  // of dense
  mlxeff_seedlm_weight seeds;

  enum class Kind { quantised, seeds, dense };
  Kind kind() const { return quantised.packed ? Kind::quantised : seeds.seeds ? Kind::seeds : Kind::dense; }
};

// out (K) = row n of W in fp32.
void read_row(const WeightMatrix& w, int64_t n, float* out);

}  // namespace mlxeff
