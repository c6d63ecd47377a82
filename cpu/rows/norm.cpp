// The C entry points of RMSNorm on rows and on heads, and of its gradients: argument checks and threading. Threads take
// pieces of about 16 Ki elements: whole rows or, for dw, ranges of columns. A NaN in a row makes that row NaN.
#include "rows/norm_kernels.h"

#include <atomic>

#include "base/pool.h"

namespace mlxeff {
namespace {

constexpr int64_t piece = 16384;

NormRows matrix(const void* data, int64_t ld, int dtype) {
  return {static_cast<char*>(const_cast<void*>(data)), ld, 0, dtype};
}

template <class Body>
int run(int64_t count, int64_t chunk, Body body) {
  std::atomic<bool> failed{false};
  parallel_for(count, max_of(1, chunk), [&](int64_t begin, int64_t end) {
    if (!body(begin, end)) failed = true;
  });
  return failed ? MLXEFF_NO_MEMORY : MLXEFF_OK;
}

}  // namespace
}  // namespace mlxeff

using namespace mlxeff;

extern "C" {

int mlxeff_rms_norm(const void* x, int64_t ldx, int x_dtype, const void* weight, int weight_dtype, void* y, int64_t ldy,
                    int y_dtype, int64_t rows, int64_t n, float eps) {
  if (!x || !y || rows < 0 || n < 1) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(x_dtype) || !dtype_known(y_dtype) || (weight && !dtype_known(weight_dtype))) return MLXEFF_BAD_DTYPE;
  const NormArgs args = {matrix(x, ldx, x_dtype), matrix(y, ldy, y_dtype), weight, weight_dtype, 1, n, eps};
  const NormKernels& kernels = MLXEFF_DISPATCH(norm_kernels);
  return run(rows, piece / n, [&](int64_t begin, int64_t end) { return kernels.rows(args, begin, end); });
}

int mlxeff_head_norm(const mlxeff_heads* x, const mlxeff_heads* y, int64_t B, int64_t H, int64_t S, int64_t E,
                     const void* weight, int weight_dtype, float eps) {
  if (!x || !y || !x->data || !y->data || B < 0 || H < 1 || S < 0 || E < 1) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(x->dtype) || !dtype_known(y->dtype) || (weight && !dtype_known(weight_dtype)))
    return MLXEFF_BAD_DTYPE;
  const NormKernels& kernels = MLXEFF_DISPATCH(norm_kernels);
  for (int64_t b = 0; b < B; ++b) {
    const auto heads = [&](const mlxeff_heads& at) {
      return NormRows{static_cast<char*>(at.data) + b * at.batch * int64_t(dtype_size(at.dtype)), at.token, at.head,
                      at.dtype};
    };
    const NormArgs args = {heads(*x), heads(*y), weight, weight_dtype, H, E, eps};
    if (const int code =
            run(S * H, piece / E, [&](int64_t begin, int64_t end) { return kernels.rows(args, begin, end); }))
      return code;
  }
  return MLXEFF_OK;
}

int mlxeff_rms_norm_backward(const void* x, int64_t ldx, int x_dtype, const void* weight, int weight_dtype,
                             const void* dy, int64_t lddy, int dy_dtype, void* dx, int64_t lddx, int dx_dtype,
                             float* dw, int64_t rows, int64_t n, float eps) {
  if (!x || !dy || !dx || rows < 0 || n < 1) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(x_dtype) || !dtype_known(dy_dtype) || !dtype_known(dx_dtype) ||
      (weight && !dtype_known(weight_dtype)))
    return MLXEFF_BAD_DTYPE;
  float* const inverse_rms = static_cast<float*>(scratch(Scratch::shared_input, size_t(max_of(rows, 1)) * 4));
  if (!inverse_rms) return MLXEFF_NO_MEMORY;
  const NormArgs forward = {matrix(x, ldx, x_dtype), {}, weight, weight_dtype, 1, n, eps};
  const NormBackwardArgs args = {forward, matrix(dy, lddy, dy_dtype), matrix(dx, lddx, dx_dtype), inverse_rms, dw,
                                 rows};
  const NormKernels& kernels = MLXEFF_DISPATCH(norm_kernels);
  const int code =
      run(rows, piece / n, [&](int64_t begin, int64_t end) { return kernels.gradient_rows(args, begin, end); });
  if (code || !dw) return code;
  return run(n, 256, [&](int64_t begin, int64_t end) { return kernels.gradient_weight(args, begin, end); });
}
}
