// Checks of the products of a decoder, which go by product.h and, in builds with a BLAS, partly through it.
#pragma once
#include "products.h"
#include "products/product.h"
#include "seedlm.h"

// y = x W^T, and then y += x W^T, by mlxeff::Product with fresh buffers, in pieces from the last to the first. One row
// of seeds has three times the error of the others: its terms are those of the register's states.
inline void check_decoder_product(const mlxeff::WeightMatrix& w, const Matrix& x, const std::vector<double>& want,
                                  int mode) {
  const auto multiply = [&](Matrix& y, int accumulate) {
    mlxeff::Product product(w, static_cast<const float*>(x.data()), y.floats(), x.rows, mode, accumulate != 0);
    std::vector<float> workspace(size_t(product.workspace_bytes() / 4) + 16);
    product.bind(reinterpret_cast<void*>(mlxeff::round_up(int64_t(reinterpret_cast<intptr_t>(workspace.data())), 64)));
    for (int64_t m = 0; m < x.rows; m += 16) product.prepare(m, std::min(m + 16, x.rows));
    const int64_t piece = product.piece(2);
    for (int64_t n = (w.N - 1) / piece * piece; n >= 0; n -= piece) RUN(product.run(n, std::min(n + piece, w.N)));
    return int(MLXEFF_OK);
  };
  check_product("decoder product", Matrix(x.rows, w.N), 3 * product_tolerance(mode, w.K), want, multiply);
}

// The rows of a matrix, one after the other.
inline std::vector<float> values_of(const mlxeff::WeightMatrix& w) {
  std::vector<float> values(size_t(w.N * w.K));
  for (int64_t n = 0; n < w.N; ++n) mlxeff::read_row(w, n, values.data() + n * w.K);
  return values;
}

inline void check_decoder_products_of(const mlxeff::WeightMatrix& w, int64_t M) {
  const Matrix x = Matrix::random(M, w.K);
  const std::vector<float> values = values_of(w);
  const std::vector<double> want =
      sums(M, w.N, w.K, [&](int64_t m, int64_t n, int64_t k) { return x.at(m, k) * values[size_t(n * w.K + k)]; });
  each_setting([&] {
    for (int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16, MLXEFF_COMPUTE_INT8}) check_decoder_product(w, x, want, mode);
  });
}

// The rows [row, row + rows) and columns [column, column + columns) of w: their values, and products with them.
inline void check_decoder_slice(const mlxeff::WeightMatrix& w, int64_t row, int64_t rows, int64_t column,
                                int64_t columns, int64_t M) {
  mlxeff::WeightMatrix part, other;
  RUN(mlxeff::slice_rows(w, row, rows, &part));
  RUN(mlxeff::slice_columns(part, column, columns, &part));
  RUN(mlxeff::slice_columns(w, column, columns, &other));
  RUN(mlxeff::slice_rows(other, row, rows, &other));
  const std::vector<float> all = values_of(w), values = values_of(part);
  CHECK(values == values_of(other));
  static int slices = 0;
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t k = 0; k < columns; ++k)
      CHECK(values[size_t(n * columns + k)] == all[size_t((row + n) * w.K + column + k)]);
  if (slices++ % shape_step == 0) check_decoder_products_of(part, M);
}

// `unit`: columns that begin elsewhere than at a multiple of it are refused, and with `whole` those that end elsewhere.
inline void check_decoder_slices_of(const mlxeff::WeightMatrix& w, int64_t unit, bool whole, int64_t M) {
  check_decoder_slice(w, 0, w.N, 0, unit, M);
  check_decoder_slice(w, 7, 30, unit, unit, M);
  check_decoder_slice(w, w.N - 1, 1, 0, w.K - unit, M);
  if (!whole) check_decoder_slice(w, 3, 20, unit, unit + 1, M);
  mlxeff::WeightMatrix part;
  for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{-1, 2}, {0, 0}, {1, w.N}, {w.N, 1}})
    CHECK(mlxeff::slice_rows(w, begin, count, &part) == MLXEFF_BAD_ARGUMENT);
  for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{-unit, unit}, {0, 0}, {unit, w.K}, {w.K, unit}})
    CHECK(mlxeff::slice_columns(w, begin, count, &part) == MLXEFF_BAD_ARGUMENT);
  const int code = unit == 1 ? MLXEFF_OK : MLXEFF_BAD_ARGUMENT;
  CHECK(mlxeff::slice_columns(w, unit / 2, unit, &part) == code);
  CHECK(mlxeff::slice_columns(w, 0, unit + 1, &part) == (whole ? MLXEFF_BAD_ARGUMENT : MLXEFF_OK));
}

inline void check_decoder_products() {
  using mlxeff::WeightMatrix;
  const int64_t N = 300, K = 96, gap = 2;
  const QuantizedMatrix quantised(N, K, 4, 32, MLXEFF_F16), lower(N, K, 4, 32, MLXEFF_F16);
  WeightMatrix sum = WeightMatrix::of(quantised.c());
  sum.lower = lower.c();
  const SeedMatrix seeds(8, 3, Matrix::random(N, K));
  for (int64_t M : {1, 40}) {
    check_decoder_products_of(WeightMatrix::of(quantised.c()), M);
    check_decoder_products_of(sum, M);
    check_decoder_products_of(WeightMatrix::of(seeds.c()), M);
    for (int dtype : all_dtypes) {
      const Matrix dense = Matrix::random(N, K, dtype);
      check_decoder_products_of(WeightMatrix::of(dense.data(), dtype, N, K), M);
    }
  }
  const QuantizedMatrix three_bits(50, K, 3, 32, MLXEFF_BF16, 1), eight_bits(50, K, 8, 32, MLXEFF_F32, 1);
  const QuantizedMatrix upper_half(50, K, 4, 32, MLXEFF_F16, 1), lower_half(50, K, 4, 32, MLXEFF_F16, 1);
  WeightMatrix halves = WeightMatrix::of(upper_half.c());
  halves.lower = lower_half.c();
  const SeedMatrix planar(12, 4, Matrix::random(50, K), gap), words(8, 3, Matrix::random(50, K), gap);
  for (int64_t M : {1, 3, 33}) {
    check_decoder_slices_of(WeightMatrix::of(three_bits.c()), 32, true, M);
    check_decoder_slices_of(WeightMatrix::of(eight_bits.c()), 32, true, M);
    check_decoder_slices_of(halves, 32, true, M);
    check_decoder_slices_of(WeightMatrix::of(planar.c()), 24, false, M);
    check_decoder_slices_of(WeightMatrix::of(words.c()), 8, false, M);
    for (int dtype : all_dtypes) {
      const Matrix dense = Matrix::random(50, K, dtype);
      check_decoder_slices_of(WeightMatrix::of(dense.data(), dtype, 50, K), 1, false, M);
    }
  }
}
