// SeedLM products with many rows of x. Weights are decoded once, with one row of W in each lane, into a panel of 2 * VL
// columns that stays in the cache. The panel is then multiplied with all rows of x in register-blocked tiles
// (gemm_tile.h) or AMX tiles.
//
//   EXACT  panel and x in fp32
//   BF16   (AMX) panel and x rounded to bf16, sums in fp32
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "products/panel_product.h"
#include "seedlm/seedlm_decode.h"
#include "seedlm/seedlm_kernels.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// The row stride of x, in floats for panel_stride and in bf16 values for amx_panel_stride.
MLXEFF_INLINE int64_t panel_stride(const SeedArgs& args) { return padded_stride(args.w.K, 4); }
MLXEFF_INLINE int64_t amx_panel_stride(const SeedArgs& args) {  // whole blocks, even if K ends within the last one
  return padded_stride(round_up(round_up(args.w.K, args.w.columns), 32), 2);
}

// Decodes the blocks [j, j_end) of up to 2 * VL rows from row n on. Calls body(half, k, weights) for each half of VL
// rows and each column k, counted from the first column of block j.
template <int C, int P, class Body>
MLXEFF_INLINE void decode_panel(const mlxeff_seedlm_weight& w, int64_t n, int64_t rows, int64_t j, int64_t j_end,
                                Body body) {
  const SeedRowBlocks a_row = seed_row_blocks(w);
  for (int half = 0; half < 2 && half * VL < rows; ++half)
    for (int64_t i = j; i < j_end; ++i)
      decode_columns<C, P>(Blocks<C, P>::of_rows(w, n + half * VL, rows - half * VL, i, a_row), w,
                           [&](int c, vf weight) { body(half, (i - j) * C + c, weight); });
}

template <int C, int P>
static int run_panel(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_seedlm_weight w = args.w;
  const int64_t blocks = ceil_div(w.K, C), ldx = panel_stride(args), step = panel_depth / C;
  float* const panel = static_cast<float*>(scratch(Scratch::panel, size_t(panel_depth * panel_width) * 4));
  float* const sums =
      static_cast<float*>(scratch(Scratch::accumulator, size_t(min_of(args.M, rows_at_once) * panel_width) * 4));
  if (!panel || !sums) return MLXEFF_NO_MEMORY;
  for (int64_t n = n_begin; n < n_end; n += panel_width)
    for (int64_t m = 0; m < args.M; m += rows_at_once) {
      const int64_t rows = min_of(rows_at_once, args.M - m), columns = min_of(panel_width, n_end - n);
      for (int64_t j = 0; j < blocks; j += step) {
        decode_panel<C, P>(w, n, columns, j, min_of(blocks, j + step),
                           [&](int half, int64_t k, vf weight) { store(panel + k * panel_width + half * VL, weight); });
        gemm_panel(args.x_f32 + m * ldx + j * C, ldx, rows, panel, min_of(step * C, w.K - j * C), sums, j > 0);
      }
      store_block(sums, panel_width, rows, columns, args.y, m, n);
    }
  return MLXEFF_OK;
}

#if defined(MLXEFF_AMX)
template <int C, int P>
static int run_panel_amx(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_seedlm_weight w = args.w;
  const int64_t blocks = ceil_div(w.K, C), ldx = amx_panel_stride(args), padded_rows = round_up(args.M, 32);
  const int64_t step = amx_panel_depth / (C * 8) * 8;  // a multiple of 8 blocks has a multiple of 32 columns
  bf16* const panel = static_cast<bf16*>(scratch(Scratch::panel, size_t((step + 8) * C * panel_width) * 2));
  float* const sums =
      static_cast<float*>(scratch(Scratch::accumulator, size_t(min_of(padded_rows, rows_at_once) * panel_width) * 4));
  if (!panel || !sums) return MLXEFF_NO_MEMORY;
  amx_begin();
  for (int64_t n = n_begin; n < n_end; n += panel_width)
    for (int64_t m = 0; m < padded_rows; m += rows_at_once) {
      const int64_t rows = min_of(rows_at_once, padded_rows - m), columns = min_of(panel_width, n_end - n);
      for (int64_t j = 0; j < blocks; j += step) {
        const int64_t decoded = min_of(step, blocks - j) * C, depth = round_up(decoded, 32);
        memset(panel + decoded * panel_width, 0, size_t((depth - decoded) * panel_width) * 2);
        vf even = zero();
        decode_panel<C, P>(w, n, columns, j, min_of(blocks, j + step), [&](int half, int64_t k, vf weight) {
          if (k % 2 == 0) even = weight;
          else store_pairs(panel + (k - 1) * panel_width + half * VL * 2, even, weight);
        });
        for (int64_t i = 0; i < rows; i += 32)
          amx_tile(args.x_bf16 + (m + i) * ldx + j * C, ldx, panel, depth, sums + i * panel_width, panel_width, j > 0);
      }
      store_block(sums, panel_width, min_of(rows, args.M - m), columns, args.y, m, n);
    }
  amx_end();
  return MLXEFF_OK;
}
#endif

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
