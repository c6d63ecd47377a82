// The table of SeedLM product and decoding kernels of one instruction-set level, and the arguments of a product.
#pragma once
#include "products/product_kernels.h"

namespace mlxeff {

struct SeedArgs {
  mlxeff_seedlm_weight w;
  const void* x;
  int64_t ldx;
  int x_dtype;
  ProductOutput y;
  int64_t M;
  int mode;
  // Set by bind: x in the layout that the chosen kernel reads. The other pointers stay null.
  float* x_f32 = nullptr;  // few rows: seedlm_few.h; many: (M, K)
  bf16* x_bf16 = nullptr;  // AMX: (M padded to 32, K padded)
  char* x_int8 = nullptr;  // seedlm_int8.h
  int64_t ldx_few = 0;     // row stride with few rows: in floats, or in bytes for x_int8
};

struct SeedlmKernels : ProductKernels<SeedArgs> {
  void (*decode_row)(const mlxeff_seedlm_weight& w, int64_t n, void* out, int out_dtype);
};

MLXEFF_DECLARE_FAMILY(SeedlmKernels, seedlm_kernels)

}  // namespace mlxeff
