// Checks of the quantised and the dense matrix products.
#pragma once
#include "checks.h"

// Rows lie `gap` groups apart; between them scales and biases are NaN, and words have all bits set.
struct QuantizedMatrix {
  int64_t N, K, ld;
  int bits, group;
  std::vector<uint32_t> packed;
  Matrix scales, biases;

  QuantizedMatrix(int64_t N, int64_t K, int bits, int group, int scale_dtype, int64_t gap = 0)
      : N(N), K(K), ld(K + gap * group), bits(bits), group(group),
        packed(size_t(((N - 1) * ld + K) * bits / 32), 0xffffffffu),
        scales(Matrix::random(N, K / group, scale_dtype, gap, 1 / float(1 << bits))),
        biases(Matrix::random(N, K / group, scale_dtype, gap)) {
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < K * bits / 32; ++i)
        packed[size_t(n * ld * bits / 32 + i)] = uint32_t(int32_t(uniform() * 0x1p31f));
  }
  mlxeff_qweight c() const {
    return {packed.data(), scales.data(), biases.data(), N, K, ld, bits, group, scales.dtype};
  }
  double at(int64_t n, int64_t k) const {
    uint32_t q = 0;
    for (int b = 0; b < bits; ++b) {
      const int64_t i = n * ld * bits + k * bits + b;
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

// multiply(y, accumulate) twice: y = product, then y += product. `want` is the product; of y's dtype only fp32 may be
// added to.
template <class Multiply>
void check_product(const char* what, Matrix y, double tolerance, const std::vector<double>& want, Multiply multiply) {
  const auto times = [&](int count) {
    y.check(what, count * tolerance, [&](int64_t r, int64_t c) { return count * want[size_t(r * y.columns + c)]; });
  };
  RUN(multiply(y, 0));
  times(1);
  CHECK(multiply(y, 1) == (y.dtype == MLXEFF_F32 ? MLXEFF_OK : MLXEFF_BAD_DTYPE));
  times(y.dtype == MLXEFF_F32 ? 2 : 1);
}

inline void check_qmm(int bits, int group, int64_t M, int64_t N, int64_t K, int64_t gap, int x_dtype, int y_dtype,
                      int scale_dtype) {
  const QuantizedMatrix matrix(N, K, bits, group, scale_dtype, gap);
  const mlxeff_qweight weight = matrix.c();
  std::vector<double> w(size_t(N * K));
  for (int64_t i = 0; i < N * K; ++i) w[size_t(i)] = matrix.at(i / K, i % K);
  const Matrix x = Matrix::random(M, K, x_dtype, 3);
  const std::vector<double> want =
      sums(M, N, K, [&](int64_t m, int64_t n, int64_t k) { return x.at(m, k) * w[size_t(n * K + k)]; });
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < 5; ++i) ids.push_back(int32_t((i * 7 + 1) % N));
  each_setting([&] {
    for (int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16, MLXEFF_COMPUTE_INT8})
      check_product("qmm", Matrix(M, N, y_dtype, 5), product_tolerance(mode, K), want, [&](Matrix& y, int accumulate) {
        return mlxeff_qmm(&weight, x.data(), x.ld, x_dtype, y.data(), y.ld, y_dtype, M, mode, accumulate);
      });
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
      check_product("matmul", Matrix(M, N, y_dtype, 3), product_tolerance(mode, K), want, [&](Matrix& y, int add) {
        return mlxeff_matmul(x.data(), x.ld, x_dtype, w.data(), w.ld, w_dtype, y.data(), y.ld, y_dtype, M, N, K, mode,
                             add);
      });
      check_product("matmul_dx", Matrix(M, K, x_dtype, 1), product_tolerance(mode, N), want_dx,
                    [&](Matrix& dx, int add) {
                      return mlxeff_matmul_dx(dy.data(), dy.ld, y_dtype, w.data(), w.ld, w_dtype, dx.data(), dx.ld,
                                              x_dtype, M, N, K, mode, add);
                    });
      check_product("matmul_dw", Matrix(N, K, w_dtype, 2), product_tolerance(mode, M), want_dw,
                    [&](Matrix& dw, int add) {
                      return mlxeff_matmul_dw(dy.data(), dy.ld, y_dtype, x.data(), x.ld, x_dtype, dw.data(), dw.ld,
                                              w_dtype, M, N, K, mode, add);
                    });
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
          check_qmm(bits, group, M, 2 + 5 * M, (1 + i % 3) * group, i / 4 % 2, dtype(1), dtype(3), dtype(9));
        ++i;
      }
  for (int64_t M : {1, 3, 9, 33})
    for (int64_t N : {1, 35, 70}) {
      if (i++ % shape_step != 0) continue;
      check_matmul(M, N, N == 35 ? 67 : 4 * N + 20, dtype(1), dtype(3), dtype(9));
      check_matmul(M, N, 2 * N - 1, MLXEFF_F32, MLXEFF_F32, MLXEFF_F32);
    }
}
