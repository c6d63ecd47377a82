// The C entry points of the dense matrix product and of its two gradients: argument checks and threading.
#include "products/matmul_kernels.h"
#include "products/threaded_product.h"

namespace mlxeff {
namespace {

int check(const MatmulArgs& args) {
  if (args.M < 0 || args.N < 0 || args.K < 0) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(args.a.dtype) || !dtype_known(args.b.dtype) || !output_known(args.c)) return MLXEFF_BAD_DTYPE;
  if (args.mode != MLXEFF_EXACT && args.mode != MLXEFF_COMPUTE_BF16) return MLXEFF_BAD_DTYPE;
  const auto bad = [](const void* data, int64_t ld, int64_t rows, int64_t columns) {
    return rows > 0 && columns > 0 && (!data || (rows > 1 && ld < columns));
  };
  const bool a_bad =
      args.a.transposed ? bad(args.a.data, args.a.ld, args.K, args.M) : bad(args.a.data, args.a.ld, args.M, args.K);
  const bool b_bad =
      args.b.transposed ? bad(args.b.data, args.b.ld, args.N, args.K) : bad(args.b.data, args.b.ld, args.K, args.N);
  return a_bad || b_bad || bad(args.c.data, args.c.ld, args.M, args.N) ? MLXEFF_BAD_ARGUMENT : MLXEFF_OK;
}

int multiply(MatmulArgs args) {
  if (const int error = check(args)) return error;
  if (args.M == 0 || args.N == 0 || (args.K == 0 && args.c.accumulate)) return MLXEFF_OK;
  if (args.K == 0) {  // an empty sum; zero is all zero bits in every dtype
    for (int64_t m = 0; m < args.M; ++m)
      memset(static_cast<char*>(args.c.data) + m * args.c.ld * int64_t(dtype_size(args.c.dtype)), 0,
             size_t(args.N) * dtype_size(args.c.dtype));
    return MLXEFF_OK;
  }
  return threaded_product(MLXEFF_DISPATCH(matmul_kernels), args, args.M, args.N, args.K, 16);
}

}  // namespace
}  // namespace mlxeff

using namespace mlxeff;

extern "C" {

int mlxeff_matmul(const void* x, int64_t ldx, int x_dtype, const void* w, int64_t ldw, int w_dtype, void* y,
                  int64_t ldy, int y_dtype, int64_t M, int64_t N, int64_t K, int mode, int accumulate) {
  return multiply(
      {{x, ldx, x_dtype, false}, {w, ldw, w_dtype, true}, {y, ldy, y_dtype, accumulate != 0}, M, N, K, mode});
}

int mlxeff_matmul_dx(const void* dy, int64_t lddy, int dy_dtype, const void* w, int64_t ldw, int w_dtype, void* dx,
                     int64_t lddx, int dx_dtype, int64_t M, int64_t N, int64_t K, int mode, int accumulate) {
  return multiply(
      {{dy, lddy, dy_dtype, false}, {w, ldw, w_dtype, false}, {dx, lddx, dx_dtype, accumulate != 0}, M, K, N, mode});
}

int mlxeff_matmul_dw(const void* dy, int64_t lddy, int dy_dtype, const void* x, int64_t ldx, int x_dtype, void* dw,
                     int64_t lddw, int dw_dtype, int64_t M, int64_t N, int64_t K, int mode, int accumulate) {
  return multiply(
      {{dy, lddy, dy_dtype, true}, {x, ldx, x_dtype, false}, {dw, lddw, dw_dtype, accumulate != 0}, N, K, M, mode});
}
}
