// The matrix products inside a block of attention, C (rows, n) += A (rows, depth) @ B (depth, n), and the packing of B.
//
// B is packed in panels, each a few vectors of columns wide; a panel stores its `depth` rows one after the other, so a
// product reads it sequentially. Fp32Product multiplies in fp32. Bf16Product rounds both operands to bf16 and sums in
// fp32; it stores two consecutive rows of B side by side in 32-bit lanes and exists only for levels with AMX tiles.
// Both define:
//   Operand              the element type of A and B
//   row_tile             rows of A in one call of multiply; A and C must have whole tiles of rows
//   depth_step           depth must be a multiple of it; A and B are padded with zeros
//   pack_columns         packs B = X (depth, n); used for values
//   pack_transposed      packs B = X^T with X (n, depth); used for keys
//   multiply             multiplies one row tile with one panel
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/simd_math.h"
#include "products/amx_tile.h"

namespace mlxeff {
namespace MLXEFF_ISA {

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int max_panel = 4;  // in vectors; 6 x 4 accumulators in 32 vector registers
#else
constexpr int max_panel = 2;  // 6 x 2 accumulators in 16 vector registers
#endif
constexpr int row_tile_fp32 = 6;

// The division of `n` columns into panels of `width` vectors, the last of which may be narrower.
struct Panels {
  int64_t vectors, width, count;
  explicit Panels(int64_t n) : vectors(ceil_div(n, VL)), width(1), count(1) {
    width = ceil_div(vectors, ceil_div(vectors, max_panel));
    count = ceil_div(vectors, width);
  }
  int64_t columns() const { return vectors * VL; }
  int width_of(int64_t panel) const { return int(min_of(width, vectors - panel * width)); }
};

// A strided matrix of any dtype.
struct Source {
  const char* data;
  int64_t stride;  // elements between rows
  int dtype;
  const char* row(int64_t i) const { return data + i * stride * int64_t(dtype_size(dtype)); }
};

MLXEFF_INLINE vf load_any(const char* p, int dtype, int64_t i) {
  if (dtype == MLXEFF_F32) return load(reinterpret_cast<const float*>(p) + i);
  if (dtype == MLXEFF_F16) return load(reinterpret_cast<const f16*>(p) + i);
  return load(reinterpret_cast<const bf16*>(p) + i);
}
MLXEFF_INLINE vf load_any_first(const char* p, int dtype, int64_t i, int64_t n) {
  if (n >= VL) return load_any(p, dtype, i);
  if (dtype == MLXEFF_F32) return load_first(reinterpret_cast<const float*>(p) + i, n);
  if (dtype == MLXEFF_F16) return load_first(reinterpret_cast<const f16*>(p) + i, n);
  return load_first(reinterpret_cast<const bf16*>(p) + i, n);
}

template <int M, int N>
static inline void multiply_fp32(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t depth, float* c,
                                 int64_t ldc, bool accumulate) {
  vf sums[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) sums[i][j] = accumulate ? load(c + i * ldc + j * VL) : zero();
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += N * VL) {
    vf right[N];
    for (int j = 0; j < N; ++j) right[j] = load(b + j * VL);
    for (int i = 0; i < M; ++i) {
      const vf left = broadcast(a[i * a_row]);
      for (int j = 0; j < N; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) store(c + i * ldc + j * VL, sums[i][j]);
}

struct Fp32Product {
  using Operand = float;
  static constexpr int row_tile = row_tile_fp32;
  static constexpr int64_t depth_step = 1;

  static void begin() {}
  static void end() {}

  // The element (m, k) of A is a[m * a_row + k * a_step], so A may be the transpose of a stored matrix.
  static void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int width, int64_t depth,
                       float* c, int64_t ldc, bool accumulate) {
    switch (width) {
      case 1: return multiply_fp32<row_tile, 1>(a, a_row, a_step, b, depth, c, ldc, accumulate);
      case 2: return multiply_fp32<row_tile, 2>(a, a_row, a_step, b, depth, c, ldc, accumulate);
#if defined(__AVX512F__) || defined(__ARM_NEON)
      case 3: return multiply_fp32<row_tile, 3>(a, a_row, a_step, b, depth, c, ldc, accumulate);
      case 4: return multiply_fp32<row_tile, 4>(a, a_row, a_step, b, depth, c, ldc, accumulate);
#endif
    }
  }

  static void pack_columns(float* dst, const Source& x, int64_t depth, int64_t n) {
    const Panels panels(n);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int width = panels.width_of(p);
      for (int64_t k = 0; k < depth; ++k)
        for (int j = 0; j < width; ++j, dst += VL) {
          const int64_t column = (p * panels.width + j) * VL;
          store(dst, load_any_first(x.row(k), x.dtype, column, n - column));
        }
    }
  }

  static void pack_transposed(float* dst, const Source& x, int64_t depth, int64_t n) {
    const Panels panels(n);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int width = panels.width_of(p);
      for (int j = 0; j < width; ++j) {
        const int64_t column = (p * panels.width + j) * VL;
        for (int64_t k = 0; k < depth; k += VL) {
          vf rows[VL];
          for (int i = 0; i < VL; ++i)
            rows[i] = column + i < n ? load_any_first(x.row(column + i), x.dtype, k, depth - k) : zero();
          transpose(rows);
          const int64_t steps = min_of(VL, depth - k);
          for (int64_t i = 0; i < steps; ++i) store(dst + ((k + i) * width + j) * VL, rows[i]);
        }
      }
      dst += depth * width * VL;
    }
  }
};

#if defined(MLXEFF_AMX)

MLXEFF_INLINE __m512i pair_up(__m256i first, __m256i second) {  // lane i: first[i] | second[i] << 16
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}
// Loads 32 elements from index i on and rounds them to bf16; elements from index n on are zero.
MLXEFF_INLINE vf load_pairs(const char* row, int dtype, int64_t i, int64_t n) {
  const auto sixteen = [&](int64_t at) {
    return at < n ? to_bf16(load_any_first(row, dtype, at, n - at)) : _mm256_setzero_si256();
  };
  return (vf)_mm512_inserti64x4(_mm512_castsi256_si512(sixteen(i)), sixteen(i + 16), 1);
}

struct Bf16Product {
  using Operand = bf16;
  static constexpr int row_tile = 32;
  static constexpr int64_t depth_step = 32;
  static void begin() { amx_begin(); }
  static void end() { amx_end(); }
  static void multiply(const bf16* a, int64_t lda, int64_t, const bf16* b, int width, int64_t depth, float* c,
                       int64_t ldc, bool accumulate) {
    const int64_t b_stride = width * 64, c_stride = ldc * 4;
    int j = 0;
    for (; j + 2 <= width; j += 2) {
      float* const out = c + j * VL;
      if (accumulate) {
        tile_load<0>(out, c_stride), tile_load<1>(out + VL, c_stride);
        tile_load<2>(out + 16 * ldc, c_stride), tile_load<3>(out + 16 * ldc + VL, c_stride);
      } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      }
      for (int64_t k = 0; k < depth; k += 32) {
        const bf16* const right = b + k * width * VL + j * VL * 2;
        tile_load<4>(a + k, lda * 2), tile_load<6>(right, b_stride), tile_load<7>(right + VL * 2, b_stride);
        tile_load<5>(a + 16 * lda + k, lda * 2);
        tile_product<0, 4, 6>(), tile_product<1, 4, 7>(), tile_product<2, 5, 6>(), tile_product<3, 5, 7>();
      }
      tile_store<0>(out, c_stride), tile_store<1>(out + VL, c_stride);
      tile_store<2>(out + 16 * ldc, c_stride), tile_store<3>(out + 16 * ldc + VL, c_stride);
    }
    if (j < width) {
      float* const out = c + j * VL;
      if (accumulate) tile_load<0>(out, c_stride), tile_load<2>(out + 16 * ldc, c_stride);
      else tile_zero<0>(), tile_zero<2>();
      for (int64_t k = 0; k < depth; k += 32) {
        tile_load<4>(a + k, lda * 2), tile_load<6>(b + k * width * VL + j * VL * 2, b_stride);
        tile_load<5>(a + 16 * lda + k, lda * 2);
        tile_product<0, 4, 6>(), tile_product<2, 5, 6>();
      }
      tile_store<0>(out, c_stride), tile_store<2>(out + 16 * ldc, c_stride);
    }
  }

  static void pack_columns(bf16* dst, const Source& x, int64_t depth, int64_t n) {
    const Panels panels(n);
    const int64_t padded = round_up(depth, depth_step);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int width = panels.width_of(p);
      for (int64_t k = 0; k < padded; k += 2)
        for (int j = 0; j < width; ++j, dst += VL * 2) {
          const int64_t column = (p * panels.width + j) * VL;
          const auto half = [&](int64_t step) {
            return step < depth ? to_bf16(load_any_first(x.row(step), x.dtype, column, n - column))
                                : _mm256_setzero_si256();
          };
          _mm512_storeu_si512(dst, pair_up(half(k), half(k + 1)));
        }
    }
  }

  static void pack_transposed(bf16* dst, const Source& x, int64_t depth, int64_t n) {
    const Panels panels(n);
    const int64_t padded = round_up(depth, depth_step);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int width = panels.width_of(p);
      for (int j = 0; j < width; ++j) {
        const int64_t column = (p * panels.width + j) * VL;
        for (int64_t k = 0; k < padded; k += 2 * VL) {
          vf rows[VL];  // each lane holds two bf16 values
          for (int i = 0; i < VL; ++i)
            rows[i] = column + i < n ? load_pairs(x.row(column + i), x.dtype, k, depth) : zero();
          transpose(rows);
          const int64_t pairs = min_of(VL, (padded - k) / 2);
          for (int64_t i = 0; i < pairs; ++i)
            _mm512_storeu_si512(dst + ((k / 2 + i) * width + j) * VL * 2, (__m512i)rows[i]);
        }
      }
      dst += padded * width * VL;
    }
  }
};

#endif

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
