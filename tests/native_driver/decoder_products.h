// Checks of the products of a decoder, which go by product.h and, in builds with a BLAS, partly through it.
#pragma once
#include "products.h"
#include "products/product.h"
#include "seedlm.h"

// y = x W^T by mlxeff::Product with fresh buffers, in pieces from the last to the first. One row of seeds has three
// times the error of the others: its terms are those of the register's states.
inline void check_decoder_product(const mlxeff::WeightMatrix& w, const Matrix& x, const std::vector<double>& want,
                                  int mode) {
  Matrix y(x.rows, w.N);
  mlxeff::Product product(w, static_cast<const float*>(x.data()), y.floats(), x.rows, mode);
  std::vector<float> workspace(size_t(product.workspace_bytes() / 4) + 16);
  product.bind(reinterpret_cast<void*>(mlxeff::round_up(int64_t(reinterpret_cast<intptr_t>(workspace.data())), 64)));
  for (int64_t m = 0; m < x.rows; m += 16) product.prepare(m, std::min(m + 16, x.rows));
  const int64_t piece = product.piece(2);
  for (int64_t n = (w.N - 1) / piece * piece; n >= 0; n -= piece) RUN(product.run(n, std::min(n + piece, w.N)));
  y.check("decoder product", 3 * product_tolerance(mode, w.K),
          [&](int64_t m, int64_t n) { return want[size_t(m * w.N + n)]; });
}

inline void check_decoder_products_of(const mlxeff::WeightMatrix& w, int64_t M) {
  const Matrix x = Matrix::random(M, w.K);
  std::vector<float> rows(size_t(w.N * w.K));
  for (int64_t n = 0; n < w.N; ++n) mlxeff::read_row(w, n, rows.data() + n * w.K);
  const std::vector<double> want =
      sums(M, w.N, w.K, [&](int64_t m, int64_t n, int64_t k) { return x.at(m, k) * rows[size_t(n * w.K + k)]; });
  each_setting([&] {
    for (int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16, MLXEFF_COMPUTE_INT8}) check_decoder_product(w, x, want, mode);
  });
}

inline void check_decoder_products() {
  const int64_t N = 300, K = 96;
  const QuantizedMatrix quantised(N, K, 4, 32, MLXEFF_F16);
  const SeedMatrix seeds(8, 3, Matrix::random(N, K));
  for (int64_t M : {1, 40}) {
    check_decoder_products_of({N, K, quantised.c(), nullptr, 0, {}}, M);
    check_decoder_products_of({N, K, {}, nullptr, 0, seeds.c()}, M);
    for (int dtype : all_dtypes) {
      const Matrix dense = Matrix::random(N, K, dtype);
      check_decoder_products_of({N, K, {}, dense.data(), dtype, {}}, M);
    }
  }
}
