// Checks of SeedLM: weights are encoded, packed, decoded and multiplied.
#pragma once
#include "checks.h"
#include "products.h"

// The arrays of a matrix that was encoded at the level in use. Rows lie `gap` blocks apart, an even number, between
// which all bits are set.
struct SeedMatrix {
  int64_t N, K, ld, blocks;
  int columns, states;
  std::vector<uint16_t> seeds, packed;
  std::vector<uint8_t> exponents;
  std::vector<uint32_t> words;
  Matrix decoded;
  std::vector<double> errors;

  SeedMatrix(int columns, int states, const Matrix& w, int64_t gap = 0)
      : N(w.rows), K(w.columns), ld(K), blocks((K + columns - 1) / columns), columns(columns), states(states),
        decoded(N, K) {
    if (states == 4) blocks += blocks % 2;
    const size_t count = size_t(N * blocks);
    seeds.resize(count), packed.resize(count), exponents.resize(count / 2), words.resize(count), errors.resize(count);
    std::vector<int8_t> coefficients(count * size_t(states));
    std::vector<uint8_t> codes(count);
    const mlxeff_seedlm_encode_args args = {static_cast<const float*>(w.data()),
                                            w.ld,
                                            N,
                                            K,
                                            nullptr,
                                            columns,
                                            states,
                                            -3,
                                            1,
                                            seeds.data(),
                                            coefficients.data(),
                                            codes.data(),
                                            decoded.floats(),
                                            errors.data()};
    RUN(mlxeff_seedlm_encode(&args));
    for (size_t i = 0; i < count; ++i) {
      for (int p = 0; p < states; ++p)
        packed[i] = uint16_t(packed[i] | (coefficients[i * size_t(states) + size_t(p)] & 15) << (4 * p));
      words[i] = seeds[i] | uint32_t(packed[i]) << 16 | uint32_t(codes[i]) << 28;
      if (states == 4) exponents[i / 2] = uint8_t(exponents[i / 2] | codes[i] << (i % 2 * 4));
    }
    if (gap == 0) return;
    const int64_t used = (K + columns - 1) / columns;
    ld = (blocks + gap) * columns;
    spread(seeds, blocks, used, gap), spread(packed, blocks, used, gap), spread(words, blocks, used, gap);
    if (states == 4) spread(exponents, blocks / 2, (used + 1) / 2, gap / 2);
  }

  // Rows of `width` elements become rows of `used` ones, which begin width + gap elements apart.
  template <class T>
  void spread(std::vector<T>& elements, int64_t width, int64_t used, int64_t gap) {
    std::vector<T> apart(size_t((N - 1) * (width + gap) + used), T(-1));
    for (int64_t n = 0; n < N; ++n) std::copy_n(elements.begin() + n * width, used, apart.begin() + n * (width + gap));
    elements = apart;
  }
  mlxeff_seedlm_weight c() const {
    if (states == 3) return {words.data(), nullptr, nullptr, N, K, ld, columns, states, -3};
    return {seeds.data(), packed.data(), exponents.data(), N, K, ld, columns, states, -3};
  }
};

inline void check_seedlm_matrix(int columns, int states, int64_t M, int64_t N, int64_t K, int64_t gap, int x_dtype,
                                int y_dtype) {
  const Matrix w = Matrix::random(N, K, MLXEFF_F32, 2), x = Matrix::random(M, K, x_dtype, 3);
  each_setting([&] {
    const SeedMatrix matrix(columns, states, w, gap);
    const mlxeff_seedlm_weight weight = matrix.c();
    matrix.decoded.check("seedlm_encode", 0.7, [&](int64_t n, int64_t k) { return w.at(n, k); });
    Matrix dense(N, K, y_dtype, 1), row(1, K, y_dtype);
    RUN(mlxeff_seedlm_decode(&weight, dense.data(), dense.ld, y_dtype));
    dense.check("seedlm_decode", 0, [&](int64_t n, int64_t k) { return matrix.decoded.at(n, k); });
    const int32_t last = int32_t(N - 1);
    RUN(mlxeff_seedlm_rows(&weight, &last, 1, row.data(), row.ld, y_dtype));
    row.check("seedlm_rows", 0, [&](int64_t, int64_t k) { return matrix.decoded.at(N - 1, k); });
    const std::vector<double> want =
        sums(M, N, K, [&](int64_t m, int64_t n, int64_t k) { return x.at(m, k) * matrix.decoded.at(n, k); });
    for (int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16, MLXEFF_COMPUTE_INT8})
      check_product(
          "seedlm_matmul", Matrix(M, N, y_dtype, 5), product_tolerance(mode, K), want, [&](Matrix& y, int accumulate) {
            return mlxeff_seedlm_matmul(&weight, x.data(), x.ld, x_dtype, y.data(), y.ld, y_dtype, M, mode, accumulate);
          });
  });
}

inline void check_seedlm() {
  int shape = 0;
  for (int format = 0; format < 3; ++format)
    for (int64_t M : {1, 2, 7, 35})
      if (shape++ % shape_step == 0)
        check_seedlm_matrix(format == 2 ? 12 : 8, format == 0 ? 3 : 4, M, 3, M + 20, (shape + format) % 2 * 2,
                            all_dtypes[shape % 3], all_dtypes[M % 3]);
}
