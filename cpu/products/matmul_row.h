// Dense matmul, few rows of A (M <= direct_rows), B transposed: the linear layer of a decoding step, limited by reading
// B, and of a step that verifies a draft.
//
// B is read in the order of its addresses, four of its rows at a time, with the values of K in the lanes and the sums
// of a row's lanes at its end. A vector of B is converted once and meets up to four rows of A while it is in registers;
// further rows of A read it again from the L1 cache. Each product of a row with a row has one vector of sums, so its
// bits are the same for every M.
//
// To be included by per-level sources only.
#pragma once
#include "base/simd_math.h"
#include "products/matmul_kernels.h"
#include "products/panel_product.h"
#include "products/row_lines.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int b_rows = 4;  // rows of B in a block

// A block of rows of B with a tile of rows of A: sums[r * sums_step + i] = row r of A times row rows_of_b[i] of B.
template <class T>
struct DenseTile {
  const T* b[b_rows];
  const float* a;  // padded with zeros to a multiple of 32 values
  int64_t lda, K;
  float* sums;
  int64_t sums_step;
};

// `columns` rows of the block, from the one with index `first` on.
template <class T, int rows, int columns>
MLXEFF_INLINE void dense_sums(const DenseTile<T>& tile, int first, RowLines<true>& next, vf sum[rows][b_rows]) {
  constexpr int line = 64 / int(sizeof(T));
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < columns; ++i) sum[r][first + i] = zero();
  const auto add = [&](int64_t k, auto load_b) {
    vf b[columns];
#pragma GCC unroll 4
    for (int i = 0; i < columns; ++i) b[i] = load_b(tile.b[first + i] + k);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const vf a = load(tile.a + r * tile.lda + k);
#pragma GCC unroll 4
      for (int i = 0; i < columns; ++i) sum[r][first + i] = fma(a, b[i], sum[r][first + i]);
    }
  };
  int64_t k = 0;
  for (; k + line <= tile.K; k += line) {
#pragma GCC unroll 4
    for (int i = 0; i < columns; ++i) next.fetch();
#pragma GCC unroll 8
    for (int j = 0; j < line; j += VL) add(k + j, [](const T* p) { return load(p); });
  }
  for (; k + VL <= tile.K; k += VL) add(k, [](const T* p) { return load(p); });
  if (k < tile.K) add(k, [&](const T* p) { return load_up_to(p, tile.K - k); });
}

// The accumulators of a tile of four rows with all of the block fill half of 32 vector registers; where there are 16,
// the block is taken by halves.
template <class T, int rows>
static void dense_tile(const DenseTile<T>& tile, RowLines<true>& next) {
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int columns = b_rows;
#else
  constexpr int columns = rows > 2 ? 2 : b_rows;
#endif
  vf sum[rows][b_rows];
#pragma GCC unroll 2
  for (int first = 0; first < b_rows; first += columns) dense_sums<T, rows, columns>(tile, first, next, sum);
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) store_sums(tile.sums + r * tile.sums_step, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

// While a block is computed the next one is prefetched.
template <class T>
static int run_rows(const MatmulArgs& args, int64_t lda, int64_t n_begin, int64_t n_end) {
  constexpr int64_t at_once = 16;  // rows of B whose sums are stored together
  const int64_t ldb = args.b.ld, size = int64_t(sizeof(T));
  const T* const b = static_cast<const T*>(args.b.data);
  float sums[direct_rows][at_once];
  for (int64_t n = n_begin; n < n_end; n += b_rows) {
    RowLines<true> next;
    next.start(reinterpret_cast<const char*>(b + min_of(n + b_rows, args.N - 1) * ldb), args.K * size, ldb * size);
    const int64_t slot = (n - n_begin) % at_once, count = min_of(b_rows, n_end - n);
    DenseTile<T> tile = {{}, args.a_f32, lda, args.K, sums[0] + slot, at_once};
    for (int i = 0; i < b_rows; ++i) tile.b[i] = b + (n + min_of(i, count - 1)) * ldb;
    for (int64_t m = 0, rows; m < args.M; m += rows) {
      rows = min_of(4, args.M - m);
      tile.a = args.a_f32 + m * lda;
      tile.sums = sums[m] + slot;
      if (rows == 4) dense_tile<T, 4>(tile, next);
      else if (rows == 3) dense_tile<T, 3>(tile, next);
      else if (rows == 2) dense_tile<T, 2>(tile, next);
      else dense_tile<T, 1>(tile, next);
    }
    if (slot + b_rows == at_once || n + b_rows >= n_end)
      store_block(sums[0], at_once, args.M, slot + count, args.c, 0, n - slot);
  }
  return MLXEFF_OK;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
