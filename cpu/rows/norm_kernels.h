// The kernels of RMSNorm. Each call runs on one thread over a range of rows.
#pragma once
#include "base/isa.h"

namespace mlxeff {

// Rows of n elements in groups: row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride. A plain matrix
// has inner = 1; heads of a (B, S, H, E) array have inner = H.
struct NormRows {
  char* data;
  int64_t outer_stride, inner_stride;
  int dtype;
};
struct NormArgs {
  NormRows x, y;
  const void* weight;  // null: ones
  int weight_dtype;
  int64_t inner, n;
  float eps;
};
struct NormBackwardArgs {
  NormArgs forward;  // y unused
  NormRows dy, dx;
  float* inverse_rms;  // one a row, written by `gradient_rows`, read by `gradient_weight`
  float* dw;
  int64_t rows;
};

struct NormKernels {
  bool (*rows)(const NormArgs& args, int64_t begin, int64_t end);
  bool (*gradient_rows)(const NormBackwardArgs& args, int64_t begin, int64_t end);
  // Columns [begin, end) of dw; after gradient_rows of all rows.
  bool (*gradient_weight)(const NormBackwardArgs& args, int64_t begin, int64_t end);
};
MLXEFF_DECLARE_FAMILY(NormKernels, norm_kernels)

}  // namespace mlxeff
