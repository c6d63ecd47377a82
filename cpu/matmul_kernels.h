// Table of the dense matmul kernels of one instruction-set level. Each function runs on the calling thread.
//
// All dense products are c (M, N) = A (M, K) B (K, N), where the arrays hold A or its transpose, B or its transpose.
// The order of calls is that of qmatmul_kernels.h: bind, prepare over all rows of A, then run over all columns of c.
#pragma once
#include "isa.h"

namespace mlxeff {

struct MatmulOperand {
  const void* data;
  int64_t ld;
  int dtype;
  bool transposed;  // the array is (K, M) for A, (N, K) for B
};

struct MatmulArgs {
  MatmulOperand a, b;
  void* c;
  int64_t ldc;
  int c_dtype;
  int64_t M, N, K;
  int mode;
  // Set by bind: the copy of A that the kernels read, padded with zeros.
  float* a_f32;
  bf16* a_bf16;
};

struct MatmulKernels {
  size_t (*workspace_bytes)(const MatmulArgs& args);
  void (*bind)(MatmulArgs& args, void* workspace);
  void (*prepare)(const MatmulArgs& args, int64_t m_begin, int64_t m_end);  // m_begin a multiple of 16
  int64_t (*piece)(const MatmulArgs& args, int threads);
  int (*run)(const MatmulArgs& args, int64_t n_begin, int64_t n_end);
};

MLXEFF_DECLARE_FAMILY(MatmulKernels, matmul_kernels)

}  // namespace mlxeff
