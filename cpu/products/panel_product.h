// The blocked matrix product c (M, N) = a (M, K) b (K, N) on top of the tiles of gemm_tile.h and amx_tile.h: block
// sizes, and the loops over panels of b. The caller supplies a callable that fills a panel, so b may be dense or
// compressed.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/pool.h"
#include "products/amx_tile.h"
#include "products/gemm_tile.h"
#include "products/product_output.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int direct_rows = 8;        // most rows of a for which b is used directly in registers: the tokens of a draft
constexpr int64_t panel_depth = 256;  // 256 x 32 fp32 = 32 KiB, which stay in the L1 cache
// Deeper than panel_depth, because loading and storing an accumulator tile costs as much as two tile products.
constexpr int64_t amx_panel_depth = 1024;
constexpr int64_t rows_at_once = 1024;  // rows of a per filled panel; bounds the size of the accumulators

MLXEFF_INLINE bool amx_mode(int mode) {
#if defined(MLXEFF_AMX)
  return mode == MLXEFF_COMPUTE_BF16;
#else
  (void)mode;
  return false;
#endif
}

// The number of rows of a that the kernels read, in tiles; rows beyond M are zeros.
static inline int64_t rows_read(int64_t M, bool amx) { return amx ? round_up(M, 32) : M; }

// The number of columns that a thread should take at a time for few rows of a: about 64 KiB of b, which balances the
// threads at little overhead.
static inline int64_t direct_piece(int64_t N, int64_t column_bytes, int threads) {
  return VL * max_of(1, min_of(65536 / (VL * column_bytes), N / (VL * threads * 4)));
}
// The same for many rows of a: one whole panel, or with AMX up to four, so that a tile of a is used several times while
// it is in the cache.
static inline int64_t panel_piece(int64_t N, bool amx, int threads) {
  if (!amx) return panel_width;
  const int64_t widest = 4 * panel_width, rounds = ceil_div(N, widest * threads);
  return round_up(ceil_div(N, rounds * threads), panel_width);
}

// Computes columns [n_begin, n_end) of c in fp32. fill(n, k, k_end, panel) must store the rows [k, k_end) of b, from
// column n on, as panel [k_end - k][panel_width]. It is called with k = 0 first.
template <class Fill>
static int panel_product(const float* a, int64_t lda, int64_t M, int64_t K, int64_t n_begin, int64_t n_end,
                         const ProductOutput& c, Fill fill) {
  float* const panel = static_cast<float*>(scratch(Scratch::panel, size_t(panel_depth * panel_width) * 4));
  float* const sums =
      static_cast<float*>(scratch(Scratch::accumulator, size_t(min_of(M, rows_at_once) * panel_width) * 4));
  if (!panel || !sums) return MLXEFF_NO_MEMORY;
  for (int64_t n = n_begin; n < n_end; n += panel_width)
    for (int64_t m = 0; m < M; m += rows_at_once) {
      const int64_t rows = min_of(rows_at_once, M - m);
      for (int64_t k = 0; k < K; k += panel_depth) {
        const int64_t k_end = min_of(K, k + panel_depth);
        fill(n, k, k_end, panel);
        gemm_panel(a + m * lda + k, lda, rows, panel, k_end - k, sums, k > 0);
      }
      store_block(sums, panel_width, rows, min_of(panel_width, n_end - n), c, m, n);
    }
  return MLXEFF_OK;
}

#if defined(MLXEFF_AMX)
// Computes columns [n_begin, n_end) of c with both operands in bf16 on AMX tiles. a must be padded with zeros to
// multiples of 32 rows and columns. The range must be at most a few panels wide: all its panels are filled before a is
// read, so that each tile of a serves every panel while it is in the cache. fill(n, k, k_end, panel) must store panel
// [(k_end - k) / 2][panel_width][2], with zeros for rows from K on.
template <class Fill>
static int amx_product(const bf16* a, int64_t lda, int64_t M, int64_t K, int64_t n_begin, int64_t n_end,
                       const ProductOutput& c, Fill fill) {
  const int64_t panels = ceil_div(n_end - n_begin, panel_width), columns = panels * panel_width;
  const int64_t padded_rows = round_up(M, 32), padded_k = round_up(K, 32), depth = min_of(padded_k, amx_panel_depth);
  bf16* const weights = static_cast<bf16*>(scratch(Scratch::panel, size_t(depth * columns) * 2));
  float* const sums =
      static_cast<float*>(scratch(Scratch::accumulator, size_t(min_of(padded_rows, rows_at_once) * columns) * 4));
  if (!weights || !sums) return MLXEFF_NO_MEMORY;
  amx_begin();
  for (int64_t m = 0; m < padded_rows; m += rows_at_once) {
    const int64_t rows = min_of(rows_at_once, padded_rows - m);
    for (int64_t k = 0; k < padded_k; k += depth) {
      const int64_t k_end = min_of(padded_k, k + depth);
      for (int64_t p = 0; p < panels; ++p) fill(n_begin + p * panel_width, k, k_end, weights + p * depth * panel_width);
      for (int64_t i = 0; i < rows; i += 32)
        for (int64_t p = 0; p < panels; ++p)
          amx_tile(a + (m + i) * lda + k, lda, weights + p * depth * panel_width, k_end - k,
                   sums + i * columns + p * panel_width, columns, k > 0);
    }
    store_block(sums, columns, min_of(rows, M - m), n_end - n_begin, c, m, n_begin);
  }
  amx_end();
  return MLXEFF_OK;
}
#endif

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
