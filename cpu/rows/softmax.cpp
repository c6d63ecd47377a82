// The C entry points of softmax, its logarithm, logsumexp, cross-entropy with its gradient, and argmax, on rows of any
// length. A thread takes one row at a time. A NaN makes its row NaN; a row whose elements are all -inf has logsumexp
// -inf and softmax NaN.
//
//   loss = logsumexp(x) - x[target];   dx = (exp(x - logsumexp(x)) - onehot(target)) * dloss
//
// A negative target marks a row to ignore: its loss and its gradient are 0.
#include "rows/softmax_kernels.h"

#include <cmath>

#include "base/pool.h"

namespace mlxeff {
namespace {

template <class Body>
void for_rows(int64_t rows, int64_t n, Body body) {
  parallel_for(rows, max_of(1, 16384 / n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

const void* row_at(const void* x, int64_t ld, int dtype, int64_t row) {
  return static_cast<const char*>(x) + row * ld * int64_t(dtype_size(dtype));
}
void* row_at(void* x, int64_t ld, int dtype, int64_t row) {
  return static_cast<char*>(x) + row * ld * int64_t(dtype_size(dtype));
}

float element(const void* x, int dtype, int64_t i) {
  if (dtype == MLXEFF_F32) return static_cast<const float*>(x)[i];
  if (dtype == MLXEFF_F16) return to_float(static_cast<const f16*>(x)[i]);
  return to_float(static_cast<const bf16*>(x)[i]);
}

float logsumexp(const SoftmaxKernels& kernels, const void* x, int dtype, int64_t n) {
  float max, sum;
  kernels.statistics(x, dtype, n, &max, &sum);
  return max + std::log(sum);
}

// Checks the arguments of a function from rows to rows, and calls body(kernels, row of x, row of y) for each row.
template <class Body>
int map_rows(const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy, int y_dtype, int64_t rows, int64_t n,
             Body body) {
  if (!x || !y || rows < 0 || n < 1) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(x_dtype) || !dtype_known(y_dtype)) return MLXEFF_BAD_DTYPE;
  const SoftmaxKernels& kernels = MLXEFF_DISPATCH(softmax_kernels);
  for_rows(rows, n, [&](int64_t row) { body(kernels, row_at(x, ldx, x_dtype, row), row_at(y, ldy, y_dtype, row)); });
  return MLXEFF_OK;
}

bool targets_valid(const int32_t* targets, int64_t rows, int64_t n) {
  for (int64_t row = 0; row < rows; ++row)
    if (targets[row] >= n) return false;
  return true;
}

}  // namespace
}  // namespace mlxeff

using namespace mlxeff;

extern "C" {

int mlxeff_softmax(const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy, int y_dtype, int64_t rows,
                   int64_t n) {
  return map_rows(x, ldx, x_dtype, y, ldy, y_dtype, rows, n, [=](const auto& kernels, const void* from, void* to) {
    float max, sum;
    kernels.statistics(from, x_dtype, n, &max, &sum);
    kernels.exponentials(from, x_dtype, to, y_dtype, n, max, 1.0f / sum);
  });
}

int mlxeff_log_softmax(const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy, int y_dtype, int64_t rows,
                       int64_t n) {
  return map_rows(x, ldx, x_dtype, y, ldy, y_dtype, rows, n, [=](const auto& kernels, const void* from, void* to) {
    kernels.differences(from, x_dtype, to, y_dtype, n, logsumexp(kernels, from, x_dtype, n));
  });
}

int mlxeff_logsumexp(const void* x, int64_t ldx, int dtype, float* out, int64_t rows, int64_t n) {
  if (!x || !out || rows < 0 || n < 1) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(dtype)) return MLXEFF_BAD_DTYPE;
  const SoftmaxKernels& kernels = MLXEFF_DISPATCH(softmax_kernels);
  for_rows(rows, n, [&](int64_t row) { out[row] = logsumexp(kernels, row_at(x, ldx, dtype, row), dtype, n); });
  return MLXEFF_OK;
}

int mlxeff_cross_entropy(const void* x, int64_t ldx, int dtype, const int32_t* targets, float* loss, float* lse,
                         int64_t rows, int64_t n) {
  if (!x || !targets || !loss || rows < 0 || n < 1 || !targets_valid(targets, rows, n)) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(dtype)) return MLXEFF_BAD_DTYPE;
  const SoftmaxKernels& kernels = MLXEFF_DISPATCH(softmax_kernels);
  for_rows(rows, n, [&](int64_t row) {
    const void* const source = row_at(x, ldx, dtype, row);
    const float value = targets[row] < 0 && !lse ? 0.0f : logsumexp(kernels, source, dtype, n);
    loss[row] = targets[row] < 0 ? 0.0f : value - element(source, dtype, targets[row]);
    if (lse) lse[row] = value;
  });
  return MLXEFF_OK;
}

int mlxeff_cross_entropy_backward(const void* x, int64_t ldx, int x_dtype, const int32_t* targets, const float* lse,
                                  const float* dloss, void* dx, int64_t lddx, int dx_dtype, int64_t rows, int64_t n) {
  if (!x || !targets || !lse || !dloss || !dx || rows < 0 || n < 1 || !targets_valid(targets, rows, n))
    return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(x_dtype) || !dtype_known(dx_dtype)) return MLXEFF_BAD_DTYPE;
  const SoftmaxKernels& kernels = MLXEFF_DISPATCH(softmax_kernels);
  for_rows(rows, n, [&](int64_t row) {
    const void* const source = row_at(x, ldx, x_dtype, row);
    void* const gradient = row_at(dx, lddx, dx_dtype, row);
    const int64_t target = targets[row];
    if (target < 0) {
      memset(gradient, 0, size_t(n) * dtype_size(dx_dtype));
      return;
    }
    // The target's gradient is p - 1, which expm1 computes without cancellation when p is close to 1. x is read here,
    // before dx is written, because dx may be x.
    const float at_target = std::expm1(element(source, x_dtype, target) - lse[row]) * dloss[row];
    kernels.exponentials(source, x_dtype, gradient, dx_dtype, n, lse[row], dloss[row]);
    if (dx_dtype == MLXEFF_F32) static_cast<float*>(gradient)[target] = at_target;
    else if (dx_dtype == MLXEFF_F16) from_float(at_target, static_cast<f16*>(gradient) + target);
    else from_float(at_target, static_cast<bf16*>(gradient) + target);
  });
  return MLXEFF_OK;
}

int mlxeff_argmax(const void* x, int64_t ldx, int dtype, int32_t* out, int64_t rows, int64_t n) {
  if (!x || !out || rows < 0 || n < 1) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(dtype)) return MLXEFF_BAD_DTYPE;
  const SoftmaxKernels& kernels = MLXEFF_DISPATCH(softmax_kernels);
  for_rows(rows, n, [&](int64_t row) { out[row] = int32_t(kernels.argmax(row_at(x, ldx, dtype, row), dtype, n)); });
  return MLXEFF_OK;
}
}
