// Checks of the quantised and the dense matrix products.
#pragma once
#include "checks.h"

struct QuantizedMatrix {
  int64_t N, K;
  int bits, group;
  std::vector<uint32_t> packed;
  Matrix scales, biases;

  QuantizedMatrix(int64_t N, int64_t K, int bits, int group, int scale_dtype)
      : N(N), K(K), bits(bits), group(group), packed(size_t(N * K * bits / 32)),
        scales(Matrix::random(N, K / group, scale_dtype, 0, 1 / float(1 << bits))),
        biases(Matrix::random(N, K / group, scale_dtype)) {
    for (uint32_t& word : packed) word = uint32_t(int32_t(uniform() * 0x1p31f));
  }
  mlxeff_qweight c() const { return {packed.data(), scales.data(), biases.data(), N, K, bits, group, scales.dtype}; }
  double at(int64_t n, int64_t k) const {
    uint32_t q = 0;
    for (int b = 0; b < bits; ++b) {
      const int64_t i = n * K * bits + k * bits + b;
      q |= (packed[size_t(i / 32)] >> (i % 32) & 1) << b;
    }
    return q * scales.at(n, k / group) + biases.at(n, k / group);
  }
};

// want (rows, columns): sums of `terms` products term(row, column, i).
template <class Term>
std::vector<double> sums(int64_t rows, int64_t columns, int64_t terms, Term term) {
  std::vector<double> want(size_t(rows * columns), 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t i = 0; i < terms; ++i) want[size_t(r * columns + c)] += term(r, c, i);
  return want;
}

// fp32 sums of K products of size 1 are off by some 1e-7 sqrt(K); operands of 8 bits of mantissa, or of 127 steps, by a
// hundredth of it.
inline double product_tolerance(int mode, int64_t K) {
  return (mode == MLXEFF_EXACT ? 1e-6 : 2e-2) * std::sqrt(double(K));
}

inline void check_qmm(int bits, int group, int64_t M, int64_t N, int64_t K, int x_dtype, int y_dtype, int scale_dtype) {
  const QuantizedMatrix matrix(N, K, bits, group, scale_dtype);
  const mlxeff_qweight weight = matrix.c();
  std::vector<double> w(size_t(N * K));
  for (int64_t i = 0; i < N * K; ++i) w[size_t(i)] = matrix.at(i / K, i % K);
  const Matrix x = Matrix::random(M, K, x_dtype, 3);
  const std::vector<double> want =
      sums(M, N, K, [&](int64_t m, int64_t n, int64_t k) { return x.at(m, k) * w[size_t(n * K + k)]; });
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < 5; ++i) ids.push_back(int32_t((i * 7 + 1) % N));
  each_setting([&] {
    for (int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16, MLXEFF_COMPUTE_INT8}) {
      Matrix y(M, N, y_dtype, 5);
      RUN(mlxeff_qmm(&weight, x.data(), x.ld, x_dtype, y.data(), y.ld, y_dtype, M, mode));
      y.check("qmm", product_tolerance(mode, K), [&](int64_t m, int64_t n) { return want[size_t(m * N + n)]; });
    }
    Matrix dense(N, K, y_dtype, 1), rows(5, K, y_dtype, 1);
    RUN(mlxeff_dequantize(&weight, dense.data(), dense.ld, y_dtype));
    dense.check("dequantize", 1e-6, [&](int64_t n, int64_t k) { return w[size_t(n * K + k)]; });
    RUN(mlxeff_qmm_rows(&weight, ids.data(), 5, rows.data(), rows.ld, y_dtype));
    rows.check("qmm_rows", 1e-6, [&](int64_t i, int64_t k) { return w[size_t(ids[size_t(i)] * K + k)]; });
  });
}

inline void check_matmul(int64_t M, int64_t N, int64_t K, int x_dtype, int w_dtype, int y_dtype) {
  const Matrix x = Matrix::random(M, K, x_dtype, 1), w = Matrix::random(N, K, w_dtype, 2),
               dy = Matrix::random(M, N, y_dtype, 3);
  const std::vector<double> want =
      sums(M, N, K, [&](int64_t m, int64_t n, int64_t k) { return x.at(m, k) * w.at(n, k); });
  const std::vector<double> want_dx =
      sums(M, K, N, [&](int64_t m, int64_t k, int64_t n) { return dy.at(m, n) * w.at(n, k); });
  const std::vector<double> want_dw =
      sums(N, K, M, [&](int64_t n, int64_t k, int64_t m) { return dy.at(m, n) * x.at(m, k); });
  each_setting([&] {
    for (int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16}) {
      Matrix y(M, N, y_dtype, 3), dx(M, K, x_dtype, 1), dw(N, K, w_dtype, 2);
      RUN(mlxeff_matmul(x.data(), x.ld, x_dtype, w.data(), w.ld, w_dtype, y.data(), y.ld, y_dtype, M, N, K, mode));
      RUN(mlxeff_matmul_dx(dy.data(), dy.ld, y_dtype, w.data(), w.ld, w_dtype, dx.data(), dx.ld, x_dtype, M, N, K,
                           mode));
      RUN(mlxeff_matmul_dw(dy.data(), dy.ld, y_dtype, x.data(), x.ld, x_dtype, dw.data(), dw.ld, w_dtype, M, N, K,
                           mode));
      y.check("matmul", product_tolerance(mode, K), [&](int64_t m, int64_t n) { return want[size_t(m * N + n)]; });
      dx.check("matmul_dx", product_tolerance(mode, N),
               [&](int64_t m, int64_t k) { return want_dx[size_t(m * K + k)]; });
      dw.check("matmul_dw", product_tolerance(mode, M),
               [&](int64_t n, int64_t k) { return want_dw[size_t(n * K + k)]; });
    }
  });
}

inline void check_products() {
  int i = 0;  // every dtype meets every shape in turn
  const auto dtype = [&i](int step) { return all_dtypes[i / step % 3]; };
  for (int bits : {2, 3, 4, 5, 6, 8})
    for (int group : {32, 64, 128})
      for (int64_t M : {1, 2, 5, 13}) {
        if (i % shape_step == 0)
          check_qmm(bits, group, M, 2 + 5 * M, (1 + i % 3) * group, dtype(1), dtype(3), dtype(9));
        ++i;
      }
  for (int64_t M : {1, 3, 9, 33})
    for (int64_t N : {1, 35, 70}) {
      if (i++ % shape_step != 0) continue;
      check_matmul(M, N, N == 35 ? 67 : 4 * N + 20, dtype(1), dtype(3), dtype(9));
      check_matmul(M, N, 2 * N - 1, MLXEFF_F32, MLXEFF_F32, MLXEFF_F32);
    }
}
