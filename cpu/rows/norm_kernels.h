// The table of RMSNorm kernels and their arguments. Each call processes a range of rows, or of columns, on one thread.
#pragma once
#include "base/isa.h"

namespace mlxeff {

// The rows of an array, in groups of `inner` rows: row r starts at element (r / inner) * outer_stride + (r % inner) *
// inner_stride. A plain matrix has inner = 1; the heads of a (B, S, H, E) array have inner = H.
struct NormRows {
  char* data;
  int64_t outer_stride, inner_stride;
  int dtype;
};
struct NormArgs {
  NormRows x, y;
  const void* weight;  // null stands for ones
  int weight_dtype;
  int64_t inner, n;
  float eps;
};
struct NormBackwardArgs {
  NormArgs forward;  // its y is not used
  NormRows dy, dx;
  float* inverse_rms;  // one value per row, written by gradient_rows and read by gradient_weight
  float* dw;
  int64_t rows;
};

struct NormKernels {
  bool (*rows)(const NormArgs& args, int64_t begin, int64_t end);
  bool (*gradient_rows)(const NormBackwardArgs& args, int64_t begin, int64_t end);
  // Computes columns [begin, end) of dw. Must be called after gradient_rows has processed all rows.
  bool (*gradient_weight)(const NormBackwardArgs& args, int64_t begin, int64_t end);
};
MLXEFF_DECLARE_FAMILY(NormKernels, norm_kernels)

}  // namespace mlxeff
