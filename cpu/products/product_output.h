// Functions by which all matrix product kernels store their finished sums in y, or add them to y.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/simd.h"
#include "products/product_kernels.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// y [m][n] = sum.
MLXEFF_INLINE void store_sum(float sum, const ProductOutput& y, int64_t m, int64_t n) {
  const int64_t at = m * y.ld + n;
  store_value(y.data, y.dtype, at, y.accumulate ? static_cast<const float*>(y.data)[at] + sum : sum);
}

// y [m_begin .. + rows, n_begin .. + columns) = sums [rows][stride].
static inline void store_block(const float* sums, int64_t stride, int64_t rows, int64_t columns, const ProductOutput& y,
                               int64_t m_begin, int64_t n_begin) {
  const int64_t size = int64_t(dtype_size(y.dtype));
  for (int64_t m = 0; m < rows; ++m, sums += stride) {
    char* const row = static_cast<char*>(y.data) + ((m_begin + m) * y.ld + n_begin) * size;
    if (!y.accumulate) {
      from_floats(row, y.dtype, sums, columns);
      continue;
    }
    float* const held = reinterpret_cast<float*>(row);
    int64_t n = 0;
    for (; n + VL <= columns; n += VL) store(held + n, load(held + n) + load(sums + n));
    for (; n < columns; ++n) held[n] += sums[n];
  }
}

// Stores one vector of sums per row.
static inline void store_strip(const vf* sums, int64_t rows, int64_t columns, const ProductOutput& y, int64_t n_begin) {
  for (int64_t m = 0; m < rows; ++m) {
    float row[VL];
    store(row, sums[m]);
    store_block(row, VL, 1, columns, y, m, n_begin);
  }
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
