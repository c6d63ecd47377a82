// Table of the quantised-matmul kernels of one instruction-set level. Each function runs on the calling thread.
//
// A product is: bind(args, workspace of workspace_bytes(args) bytes); prepare(args, ...) over all rows of x; when that is
// complete everywhere, run(args, ...) over all rows of W, in pieces of a multiple of `piece` rows. A fused step that
// owns a team does the same with Team::for_chunks between other kernels.
#pragma once
#include "isa.h"

namespace mlxeff {

struct QmmArgs {
  mlxeff_qweight w;
  const void* x;
  int64_t ldx;
  int x_dtype;
  void* y;
  int64_t ldy;
  int y_dtype;
  int64_t M;
  int mode;
  // Set by bind. The form of x that the kernels read, each (M, K) or (M, K / group):
  const float* x_f32;   // EXACT
  int64_t ldx_f32;
  float* x_sum;         // of each group: EXACT, M = 1 or few; INT8, of the rounded values
  int8_t* x_int8;       // INT8, elements of each 32 in the order of the weights' decoder
  float* x_scale;       // INT8
  bf16* x_bf16;         // BF16, rows padded with zeros to a multiple of 32
};

struct QmatmulKernels {
  size_t (*workspace_bytes)(const QmmArgs& args);
  void (*bind)(QmmArgs& args, void* workspace);
  void (*prepare)(const QmmArgs& args, int64_t m_begin, int64_t m_end);
  int64_t (*piece)(const QmmArgs& args, int threads);  // rows of W a thread should take at once
  int (*run)(const QmmArgs& args, int64_t n_begin, int64_t n_end);
  void (*dequantize_row)(const mlxeff_qweight& w, int64_t n, void* out, int out_dtype);
};

MLXEFF_DECLARE_FAMILY(QmatmulKernels, qmatmul_kernels)

}  // namespace mlxeff
