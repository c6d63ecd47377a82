// The register-blocked product of a few rows with a panel: the innermost step of every matrix product with many rows.
//
// A panel holds 2 * VL columns of the right-hand operand, side by side for each k: fp32 [K][2 * VL], or for int8
// products bytes [K / 4][2 * VL][4]. Elements of the left-hand operand are read one at a time and broadcast to all
// lanes. Its row stride should not be a multiple of 4 KiB, because the rows of a tile would then compete for the same
// cache sets. Accumulators stay in registers.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/simd.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int panel_width = 2 * VL;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int tile_rows = 12;  // 24 accumulators in 32 vector registers
#else
constexpr int tile_rows = 6;  // 12 accumulators in 16 vector registers
#endif

// The row stride, in elements, for a copy of an operand with K columns: whole vectors, and not a multiple of 4 KiB.
MLXEFF_INLINE int64_t padded_stride(int64_t K, int64_t element_size) {
  return round_up(K * element_size, 64) / element_size +
         64 / element_size * (round_up(K * element_size, 64) % 1024 == 0);
}

// Computes c [rows][panel_width] = x [rows][K] @ panel, or adds the product to c if `accumulate`.
template <int rows>
static void gemm_tile(const float* MLXEFF_RESTRICT x, int64_t ldx, const float* MLXEFF_RESTRICT panel, int64_t K,
                      float* MLXEFF_RESTRICT c, bool accumulate) {
  vf sum[rows][2];
#pragma GCC unroll 12
  for (int m = 0; m < rows; ++m)
    for (int j = 0; j < 2; ++j) sum[m][j] = accumulate ? load(c + m * panel_width + j * VL) : zero();
  const float* const fourth[3] = {x, x + (rows > 4 ? 4 : 0) * ldx, x + (rows > 8 ? 8 : 0) * ldx};  // rows 0, 4, 8
  for (int64_t k = 0; k < K; ++k) {
    const vf w0 = load(panel + k * panel_width), w1 = load(panel + k * panel_width + VL);
#pragma GCC unroll 12
    for (int m = 0; m < rows; ++m) {
      const vf value = broadcast(fourth[m / 4][m % 4 * ldx + k]);
      sum[m][0] = fma(value, w0, sum[m][0]);
      sum[m][1] = fma(value, w1, sum[m][1]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < rows; ++m)
    for (int j = 0; j < 2; ++j) store(c + m * panel_width + j * VL, sum[m][j]);
}

typedef void GemmTile(const float*, int64_t, const float*, int64_t, float*, bool);

// Does the same for M rows, in tiles of nearly equal height.
static inline void gemm_panel(const float* x, int64_t ldx, int64_t M, const float* panel, int64_t K, float* c,
                              bool accumulate) {
  static GemmTile* const tiles[] = {gemm_tile<1>,  gemm_tile<2>, gemm_tile<3>, gemm_tile<4>,
                                    gemm_tile<5>,  gemm_tile<6>,
#if defined(__AVX512F__) || defined(__aarch64__)
                                    gemm_tile<7>,  gemm_tile<8>, gemm_tile<9>, gemm_tile<10>,
                                    gemm_tile<11>, gemm_tile<12>
#endif
  };
  const int64_t height = ceil_div(M, ceil_div(M, tile_rows));
  for (int64_t m = 0; m < M; m += height)
    tiles[min_of(height, M - m) - 1](x + m * ldx, ldx, panel, K, c + m * panel_width, accumulate);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
