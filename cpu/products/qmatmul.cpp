// C entry points of the affine-quantised matmul: argument checks and threading. See mlxeff_cpu.h for the layout.
#include "products/qmatmul_kernels.h"
#include "products/threaded_product.h"

namespace mlxeff {
namespace {

int check_weight(const mlxeff_qweight* w) {
  if (!w || !w->packed || !w->scales || !w->biases || w->N < 0 || w->K <= 0) return MLXEFF_BAD_ARGUMENT;
  if (w->bits < 2 || w->bits > 8 || w->bits == 7) return MLXEFF_BAD_ARGUMENT;
  if ((w->group != 32 && w->group != 64 && w->group != 128) || w->K % w->group != 0) return MLXEFF_BAD_ARGUMENT;
  if (w->ld < w->K || w->ld % w->group != 0) return MLXEFF_BAD_ARGUMENT;
  return dtype_known(w->scale_dtype) ? MLXEFF_OK : MLXEFF_BAD_DTYPE;
}

int check_product(const QmmArgs& args) {
  if (args.M < 0 || (args.M > 0 && (!args.x || !args.y.data))) return MLXEFF_BAD_ARGUMENT;
  if (args.M > 1 && (args.ldx < args.w.K || args.y.ld < args.w.N)) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(args.x_dtype) || !output_known(args.y)) return MLXEFF_BAD_DTYPE;
  return args.mode >= MLXEFF_EXACT && args.mode <= MLXEFF_COMPUTE_INT8 ? MLXEFF_OK : MLXEFF_BAD_DTYPE;
}

int dequantize_rows(const mlxeff_qweight* w, const int32_t* ids, int64_t count, void* out, int64_t ld, int out_dtype) {
  const QmatmulKernels& kernels = MLXEFF_DISPATCH(qmatmul_kernels);
  return threaded_rows(w->N, w->K, ids, count, out, ld, out_dtype, 16384 / w->K,
                       [&](int64_t n, void* row) { kernels.dequantize_row(*w, n, row, out_dtype); });
}

}  // namespace
}  // namespace mlxeff

using namespace mlxeff;

extern "C" {

int mlxeff_qmm(const mlxeff_qweight* w, const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy, int y_dtype,
               int64_t M, int mode, int accumulate) {
  if (const int error = check_weight(w)) return error;
  QmmArgs args = {*w, x, ldx, x_dtype, {y, ldy, y_dtype, accumulate != 0}, M, mode};
  if (const int error = check_product(args)) return error;
  if (M == 0 || w->N == 0) return MLXEFF_OK;
  return threaded_product(MLXEFF_DISPATCH(qmatmul_kernels), args, M, w->N, w->K);
}

int mlxeff_qmm_rows(const mlxeff_qweight* w, const int32_t* ids, int64_t count, void* out, int64_t ld, int out_dtype) {
  if (const int error = check_weight(w)) return error;
  if (count > 0 && !ids) return MLXEFF_BAD_ARGUMENT;
  return dequantize_rows(w, ids, count, out, ld, out_dtype);
}

int mlxeff_dequantize(const mlxeff_qweight* w, void* out, int64_t ld, int out_dtype) {
  if (const int error = check_weight(w)) return error;
  return dequantize_rows(w, nullptr, w->N, out, ld, out_dtype);
}
}
