// The part that the kernel tables of the matrix families have in common: a product y (M, N) = x (M, K) W (N, K)^T.
//
// It is: bind(args, workspace of workspace_bytes(args) bytes); prepare(args, ...) over all rows of x; when that is
// complete everywhere, run(args, ...) over all rows of W, in pieces of a multiple of `piece` rows. A fused step that
// owns a team does the same with Team::for_chunks between other kernels. Each function runs on the calling thread.
#pragma once
#include "base/isa.h"

namespace mlxeff {

// What a product writes: y (M, N), its rows `ld` elements apart. The finished fp32 sums are rounded to the dtype of y;
// or each is added once to what y, which is fp32 then, holds before.
struct ProductOutput {
  void* data;
  int64_t ld;
  int dtype;
  bool accumulate;
};

template <class Args>
struct ProductKernels {
  size_t (*workspace_bytes)(const Args& args);
  void (*bind)(Args& args, void* workspace);
  void (*prepare)(const Args& args, int64_t m_begin, int64_t m_end);
  int64_t (*piece)(const Args& args, int threads);  // rows of W a thread should take at once
  int (*run)(const Args& args, int64_t n_begin, int64_t n_end);
};

}  // namespace mlxeff
