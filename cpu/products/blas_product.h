// Matrix products with many rows of x through a BLAS library, in builds that have one. On macOS this is Accelerate, the
// only access to the matrix units of Apple's CPUs: on an M1, the vector units of a performance core reach 102 GFLOPS in
// fp32, and its matrix unit reaches 600 to 1400.
//
// Rows of W are converted to fp32 one block at a time, and the block is multiplied by cblas_sgemm on the calling thread
// alone. Cores share a matrix unit: while one thread uses it, other threads convert their blocks. The division into
// blocks does not depend on the number of threads.
#pragma once
#include "products/product_kernels.h"
#include "products/weight_matrix.h"

namespace mlxeff {

// The arguments of a BLAS product. x (M, K) and y (M, N) are fp32, with rows ldx and ldy floats apart.
// With `accumulate` the BLAS adds to y
// while it sums, so the order of rounding differs from the other kernels.
struct BlasArgs {
  WeightMatrix w;
  const float* x;
  float* y;
  int64_t ldx, ldy, M;
  bool accumulate;
};

// Returns the kernel table, or null if the build has no BLAS or if M rows are too few to repay the packing of both
// operands.
const ProductKernels<BlasArgs>* blas_kernels(int64_t M);

}  // namespace mlxeff
