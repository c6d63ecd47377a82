// Table of the quantised-matmul kernels of one instruction-set level.
#pragma once
#include "products/product_kernels.h"

namespace mlxeff {

struct QmmArgs {
  mlxeff_qweight w;
  const void* x;
  int64_t ldx;
  int x_dtype;
  ProductOutput y;
  int64_t M;
  int mode;
  // Set by bind. The form of x that the kernels read, each (M, K) or (M, K / group):
  const float* x_f32 = nullptr;  // EXACT, unless it reads x_int8
  int64_t ldx_f32 = 0;
  float* x_sum = nullptr;  // of each group: EXACT, few rows; INT8, of the rounded values
  // INT8, elements of each 32 in the order of the weights' decoder; EXACT, few rows: three bytes each
  int8_t* x_int8 = nullptr;
  float* x_scale = nullptr;  // of each group, where there is x_int8
  bf16* x_bf16 = nullptr;    // BF16, rows padded with zeros to a multiple of 32
};

struct QmatmulKernels : ProductKernels<QmmArgs> {
  void (*dequantize_row)(const mlxeff_qweight& w, int64_t n, void* out, int out_dtype);
};

MLXEFF_DECLARE_FAMILY(QmatmulKernels, qmatmul_kernels)

}  // namespace mlxeff
