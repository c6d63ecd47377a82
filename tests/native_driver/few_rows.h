// Checks that a row of a product has the same bits alone and beside others, for up to 8 rows: what makes a draft that
// is verified in one pass equal to plain decoding.
#pragma once
#include <cstring>

#include "products.h"

// multiply(first, count, y): y (count, N) = rows [first, first + count) of x times W.
template <class Multiply>
void check_rows_alone(const char* what, int64_t N, Multiply multiply) {
  constexpr int64_t most = 8;
  Matrix alone(most, N);
  for (int64_t m = 0; m < most; ++m) RUN(multiply(m, 1, alone.floats() + m * N));
  for (int64_t first : {0, 1})
    for (int64_t count = 2; first + count <= most; ++count) {
      Matrix together(count, N);
      RUN(multiply(first, count, together.floats()));
      if (std::memcmp(together.data(), alone.floats() + first * N, size_t(count * N) * 4) == 0) continue;
      std::fprintf(stderr, "%s (%s, %d threads): of %d rows, one differs from the same row alone\n", what, mlxeff_isa(),
                   mlxeff_num_threads(), int(count));
      std::exit(1);
    }
}

// The last 8 of `tokens` queries over as many keys, and all of them alone. The keys end at a query's own position.
inline void check_queries_alone(int64_t tokens, int64_t window, int dtype) {
  const int64_t H = 12, G = 2, E = 24;
  const Matrix k = Matrix::random(G * tokens, E, dtype), v = Matrix::random(G * tokens, E, dtype),
               q = Matrix::random(8, H * E);
  each_setting([&] {
    check_rows_alone("attention", H * E, [&](int64_t first, int64_t count, float* out) {
      mlxeff_attention_args args = {};
      args.B = 1, args.H = H, args.G = G, args.S = count, args.T = tokens - 8 + first + count, args.E = E;
      args.scale = 0.3f, args.window = window, args.mode = MLXEFF_EXACT;
      args.q = {const_cast<float*>(static_cast<const float*>(q.data()) + first * H * E), 0, E, H * E, MLXEFF_F32};
      args.k = {const_cast<void*>(k.data()), 0, tokens * E, E, dtype};
      args.v = {const_cast<void*>(v.data()), 0, tokens * E, E, dtype};
      args.out = {out, 0, E, H * E, MLXEFF_F32};
      return mlxeff_attention(&args);
    });
  });
}

inline void check_few_rows() {
  for (int64_t tokens : {17, 260, 515, 1030})
    for (int64_t window : {0, 100, 300}) check_queries_alone(tokens, window, all_dtypes[tokens % 3]);
  int shape = 0;
  for (int bits : {2, 3, 4, 5, 6, 8})
    for (int group : {32, 64, 128})
      for (int64_t groups : {1, 5, 17}) {
        const int64_t N = 21 + 16 * (shape % 3), K = groups * group;
        const int scale_dtype = all_dtypes[shape++ % 3];
        if (shape % shape_step != 0) continue;
        const QuantizedMatrix matrix(N, K, bits, group, scale_dtype, shape % 2);
        const mlxeff_qweight weight = matrix.c();
        const Matrix x = Matrix::random(8, K);
        each_setting([&] {
          for (int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_INT8})
            check_rows_alone("qmm", N, [&](int64_t first, int64_t count, float* y) {
              return mlxeff_qmm(&weight, static_cast<const float*>(x.data()) + first * K, K, MLXEFF_F32, y, N,
                                MLXEFF_F32, count, mode, 0);
            });
        });
      }
  for (int dtype : all_dtypes)
    for (int64_t K : {1, 15, 40, 97, 576})
      for (int64_t N : {1, 18, 39}) {
        const Matrix x = Matrix::random(8, K), w = Matrix::random(N, K, dtype, K % 2);
        each_setting([&] {
          check_rows_alone("matmul", N, [&](int64_t first, int64_t count, float* y) {
            return mlxeff_matmul(static_cast<const float*>(x.data()) + first * K, K, MLXEFF_F32, w.data(), w.ld, dtype,
                                 y, N, MLXEFF_F32, count, N, K, MLXEFF_EXACT, 0);
          });
        });
      }
}
