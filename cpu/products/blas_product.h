// Products with many rows of x by a BLAS, in builds that have one. On macOS that is Accelerate, the only way to the
// matrix units of Apple's CPUs: a P-core's vectors do 102 GFLOPS in fp32 on an M1, its matrix unit 600 to 1400.
//
// Rows of W are brought into fp32, a block at a time, and the block is given to cblas_sgemm on the calling thread
// alone: while one thread is in the matrix unit, which cores share, others read their blocks. Blocks do not depend on
// the number of threads.
#pragma once
#include "products/product_kernels.h"
#include "products/weight_matrix.h"

namespace mlxeff {

// x (M, K) and y (M, N) are fp32 and contiguous. Where a product is added to y, the BLAS rounds in an order of its own.
struct BlasArgs {
  WeightMatrix w;
  const float* x;
  float* y;
  int64_t M;
  bool accumulate;
};

// The table, or null where the build has no BLAS, or M rows are too few to be worth its packing of both operands.
const ProductKernels<BlasArgs>* blas_kernels(int64_t M);

}  // namespace mlxeff
