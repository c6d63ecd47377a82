// Functions that the C entry points of all matrix kinds share: a product computed with a kernel table, and the decoding
// of rows of a weight matrix, on all threads of the pool. For sources compiled with the platform's base flags.
#pragma once
#include <atomic>

#include "base/pool.h"
#include "products/product_kernels.h"

namespace mlxeff {

// Computes a product (M, K) x (K, N) with the functions of product_kernels.h. M, N and K must not be 0. Rows are
// prepared in pieces of a multiple of `row_step`.
template <class Args>
static int threaded_product(const ProductKernels<Args>& kernels, Args& args, int64_t M, int64_t N, int64_t K,
                            int64_t row_step = 1) {
  void* const workspace = scratch(Scratch::shared_input, kernels.workspace_bytes(args));
  if (!workspace) return MLXEFF_NO_MEMORY;
  kernels.bind(args, workspace);
  if (M * K < 65536) kernels.prepare(args, 0, M);
  else
    parallel_for(M, round_up(max_of(1, 16384 / K), row_step),
                 [&](int64_t begin, int64_t end) { kernels.prepare(args, begin, end); });
  std::atomic<int> result{MLXEFF_OK};
  parallel_for(N, kernels.piece(args, num_threads()), [&](int64_t begin, int64_t end) {
    if (const int error = kernels.run(args, begin, end)) result = error;
  });
  return result;
}

static inline bool output_known(const ProductOutput& y) {
  return y.accumulate ? y.dtype == MLXEFF_F32 : dtype_known(y.dtype);
}

// Calls decode(n, destination) for `count` rows of a matrix with `rows` rows: for the rows ids[0], ids[1], ..., or for
// the first `count` rows if `ids` is null. A thread takes `piece` rows at a time.
template <class Decode>
static int threaded_rows(int64_t rows, int64_t columns, const int32_t* ids, int64_t count, void* out, int64_t ld,
                         int out_dtype, int64_t piece, Decode&& decode) {
  if (count < 0 || (count > 0 && !out) || (count > 1 && ld < columns)) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(out_dtype)) return MLXEFF_BAD_DTYPE;
  for (int64_t i = 0; ids && i < count; ++i)
    if (ids[i] < 0 || ids[i] >= rows) return MLXEFF_BAD_ARGUMENT;
  const int64_t row_size = ld * int64_t(dtype_size(out_dtype));
  parallel_for(count, max_of(1, piece), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) decode(ids ? ids[i] : i, static_cast<char*>(out) + i * row_size);
  });
  return MLXEFF_OK;
}

}  // namespace mlxeff
