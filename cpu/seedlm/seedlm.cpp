// The C entry points of the SeedLM products: argument checks and threading. mlxeff_cpu.h describes the layout of a
// matrix.
#include "products/threaded_product.h"
#include "seedlm/seedlm_kernels.h"

namespace mlxeff {
namespace {

int check_weight(const mlxeff_seedlm_weight* w) {
  if (!w || !w->seeds || w->N < 0 || w->K <= 0) return MLXEFF_BAD_ARGUMENT;
  const bool packed = w->columns == 8 && w->states == 3,
             planar = (w->columns == 8 || w->columns == 12) && w->states == 4;
  if (!packed && !(planar && w->coefficients && w->exponents)) return MLXEFF_BAD_ARGUMENT;
  if (w->ld < w->K) return MLXEFF_BAD_ARGUMENT;
  return w->exponent_bias >= -96 && w->exponent_bias <= 96 ? MLXEFF_OK : MLXEFF_BAD_ARGUMENT;
}

int check_product(const SeedArgs& args) {
  if (args.M < 0 || (args.M > 0 && (!args.x || !args.y.data))) return MLXEFF_BAD_ARGUMENT;
  if (args.M > 1 && (args.ldx < args.w.K || args.y.ld < args.w.N)) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(args.x_dtype) || !output_known(args.y)) return MLXEFF_BAD_DTYPE;
  return args.mode >= MLXEFF_EXACT && args.mode <= MLXEFF_COMPUTE_INT8 ? MLXEFF_OK : MLXEFF_BAD_DTYPE;
}

int decode_rows(const mlxeff_seedlm_weight* w, const int32_t* ids, int64_t count, void* out, int64_t ld,
                int out_dtype) {
  const SeedlmKernels& kernels = MLXEFF_DISPATCH(seedlm_kernels);
  return threaded_rows(w->N, w->K, ids, count, out, ld, out_dtype, 65536 / w->K,
                       [&](int64_t n, void* row) { kernels.decode_row(*w, n, row, out_dtype); });
}

}  // namespace
}  // namespace mlxeff

using namespace mlxeff;

extern "C" {

int mlxeff_seedlm_matmul(const mlxeff_seedlm_weight* w, const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy,
                         int y_dtype, int64_t M, int mode, int accumulate) {
  if (const int error = check_weight(w)) return error;
  SeedArgs args = {*w, x, ldx, x_dtype, {y, ldy, y_dtype, accumulate != 0}, M, mode};
  if (const int error = check_product(args)) return error;
  if (M == 0 || w->N == 0) return MLXEFF_OK;
  return threaded_product(MLXEFF_DISPATCH(seedlm_kernels), args, M, w->N, w->K);
}

int mlxeff_seedlm_rows(const mlxeff_seedlm_weight* w, const int32_t* ids, int64_t count, void* out, int64_t ld,
                       int out_dtype) {
  if (const int error = check_weight(w)) return error;
  if (count > 0 && !ids) return MLXEFF_BAD_ARGUMENT;
  return decode_rows(w, ids, count, out, ld, out_dtype);
}

int mlxeff_seedlm_decode(const mlxeff_seedlm_weight* w, void* out, int64_t ld, int out_dtype) {
  if (const int error = check_weight(w)) return error;
  return decode_rows(w, nullptr, w->N, out, ld, out_dtype);
}
}
