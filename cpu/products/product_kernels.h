// The table of functions that every kind of matrix product provides, for y (M, N) = x (M, K) W (N, K)^T.
//
// A caller computes a product in three steps: bind(args, workspace), with a workspace of workspace_bytes(args) bytes;
// prepare(args, ...) for all rows of x, on any threads; and, when all threads have finished that, run(args, ...) for
// all rows of W, in pieces of a multiple of `piece` rows. threaded_product.h does so with parallel_for, and
// PassTeam::multiply with Team::for_chunks. Each function runs on the calling thread.
#pragma once
#include "base/isa.h"

namespace mlxeff {

// The output of a product: y (M, N), with rows `ld` elements apart. The finished fp32 sums are rounded to the dtype of
// y or, with `accumulate`, added to the content of y, which must be fp32.
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
  int64_t (*piece)(const Args& args, int threads);  // rows of W that a thread should process at a time
  int (*run)(const Args& args, int64_t n_begin, int64_t n_end);
};

}  // namespace mlxeff
