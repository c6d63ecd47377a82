// cblas_sgemm in plain loops, for builds with -DMLXEFF_BLAS=reference: row-major, the second operand transposed, beta 0
// or 1, nothing else.
#include <cstdlib>

extern "C" void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                            const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  if (order != 101 || transpose_a != 111 || transpose_b != 112 || alpha != 1) std::abort();
  if (beta != 0 && beta != 1) std::abort();
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float sum = 0;
      for (int l = 0; l < k; ++l) sum += a[i * lda + l] * b[j * ldb + l];
      c[i * ldc + j] = beta == 0 ? sum : c[i * ldc + j] + sum;
    }
}
