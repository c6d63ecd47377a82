// The table of dense matrix product kernels of one instruction-set level, and their arguments.
//
// All dense products are c (M, N) = A (M, K) B (K, N), where each array in memory holds the operand or its transpose.
// In the terms of product_kernels.h, A is x and B is the transpose of W.
#pragma once
#include "products/product_kernels.h"

namespace mlxeff {

struct MatmulOperand {
  const void* data;
  int64_t ld;
  int dtype;
  bool transposed;  // the array is (K, M) for A, (N, K) for B
};

struct MatmulArgs {
  MatmulOperand a, b;
  ProductOutput c;
  int64_t M, N, K;
  int mode;
  // Set by bind: the copy of A that the kernels read, padded with zeros.
  float* a_f32 = nullptr;
  bf16* a_bf16 = nullptr;
};

using MatmulKernels = ProductKernels<MatmulArgs>;  // prepare: m_begin a multiple of 16

MLXEFF_DECLARE_FAMILY(MatmulKernels, matmul_kernels)

}  // namespace mlxeff
