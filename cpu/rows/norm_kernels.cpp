// The kernels of RMSNorm and its gradients, at one instruction-set level.
//
//   y = x * r * w,  r = 1 / sqrt(mean(x^2) + eps)
//   dx = r * (w * dy) - x * r^3 / n * sum(w * dy * x),   dw = sum over rows of dy * x * r
//
// Rows in half precision are converted to fp32, all arithmetic is fp32, and results are rounded once when they are
// stored.
#include "rows/norm_kernels.h"

#include <math.h>

#include "base/pool.h"
#include "base/simd_math.h"

namespace mlxeff {
namespace MLXEFF_ISA {

static char* row_of(const NormRows& x, int64_t row, int64_t inner) {
  return x.data + (row / inner * x.outer_stride + row % inner * x.inner_stride) * int64_t(dtype_size(x.dtype));
}

// Returns `count` buffers of n fp32 values each, padded with zeros to whole vectors. The first holds the weight in
// fp32. Returns null if memory is exhausted.
static float* norm_buffers(const NormArgs& args, int64_t count) {
  const int64_t width = round_up(args.n, VL);
  float* const memory = static_cast<float*>(scratch(Scratch::panel, size_t(width * count) * 4));
  if (!memory) return nullptr;
  memset(memory, 0, size_t(width * count) * 4);
  if (args.weight) to_floats(memory, args.weight, args.weight_dtype, args.n);
  else
    for (int64_t j = 0; j < args.n; ++j) memory[j] = 1.0f;
  return memory;
}

// Returns the sum of a[j] * b[j], accumulated in four independent sums.
static float dot(const float* a, const float* b, int64_t n) {
  vf sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * VL <= n; j += 4 * VL)
    for (int i = 0; i < 4; ++i) sums[i] = fma(load(a + j + i * VL), load(b + j + i * VL), sums[i]);
  for (; j < n; j += VL) sums[0] = fma(load_up_to(a + j, n - j), load_up_to(b + j, n - j), sums[0]);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static float inverse_rms(const float* x, int64_t n, float eps) { return 1.0f / sqrtf(dot(x, x, n) / float(n) + eps); }

// Returns `row` itself if it is fp32, and otherwise `buffer`, to which it converts the row.
static const float* in_fp32(const void* row, int dtype, int64_t n, float* buffer) {
  if (dtype == MLXEFF_F32) return static_cast<const float*>(row);
  to_floats(buffer, row, dtype, n);
  return buffer;
}

// Computes y = x * r * weight. y may be x.
static void scale_row(float* y, const float* x, float r, const float* weight, int64_t n) {
  int64_t j = 0;
  for (; j + VL <= n; j += VL) store(y + j, load(x + j) * r * load(weight + j));
  for (; j < n; ++j) y[j] = x[j] * r * weight[j];
}

static bool rows(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.n;
  float* const ones = static_cast<float*>(scratch(Scratch::panel, size_t(n * 2) * 4));
  if (!ones) return false;
  for (int64_t j = 0; !args.weight && j < n; ++j) ones[j] = 1;
  const float* const weight = args.weight ? in_fp32(args.weight, args.weight_dtype, n, ones) : ones;
  float* const buffer = ones + n;
  for (int64_t row = begin; row < end; ++row) {
    char *const source = row_of(args.x, row, args.inner), *const target = row_of(args.y, row, args.inner);
    const float* const x = in_fp32(source, args.x.dtype, n, buffer);
    float* const y = args.y.dtype == MLXEFF_F32 ? reinterpret_cast<float*>(target) : buffer;
    scale_row(y, x, inverse_rms(x, n, args.eps), weight, n);
    if (y == buffer) from_floats(target, args.y.dtype, buffer, n);
  }
  return true;
}

static bool gradient_rows(const NormBackwardArgs& args, int64_t begin, int64_t end) {
  const NormArgs& forward = args.forward;
  const int64_t n = forward.n, width = round_up(n, VL);
  float* const weight = norm_buffers(forward, 3);
  if (!weight) return false;
  float *const x = weight + width, *const dy = x + width;
  for (int64_t row = begin; row < end; ++row) {
    to_floats(x, row_of(forward.x, row, forward.inner), forward.x.dtype, n);
    to_floats(dy, row_of(args.dy, row, forward.inner), args.dy.dtype, n);
    const float r = inverse_rms(x, n, forward.eps);
    for (int64_t j = 0; j < width; j += VL) store(dy + j, load(dy + j) * load(weight + j));
    const float along = dot(dy, x, width) * r * r / float(n);
    for (int64_t j = 0; j < width; j += VL) store(dy + j, (load(dy + j) - load(x + j) * along) * r);
    from_floats(row_of(args.dx, row, forward.inner), args.dx.dtype, dy, n);
    args.inverse_rms[row] = r;
  }
  return true;
}

static bool gradient_weight(const NormBackwardArgs& args, int64_t begin, int64_t end) {
  const NormArgs& forward = args.forward;
  const int64_t n = end - begin, width = round_up(n, VL);
  float* const total = static_cast<float*>(scratch(Scratch::panel, size_t(width * 3) * 4));
  if (!total) return false;
  memset(total, 0, size_t(width * 3) * 4);
  float *const x = total + width, *const dy = x + width;
  for (int64_t row = 0; row < args.rows; ++row) {
    to_floats(x, row_of(forward.x, row, forward.inner) + begin * int64_t(dtype_size(forward.x.dtype)), forward.x.dtype,
              n);
    to_floats(dy, row_of(args.dy, row, forward.inner) + begin * int64_t(dtype_size(args.dy.dtype)), args.dy.dtype, n);
    const float r = args.inverse_rms[row];
    for (int64_t j = 0; j < width; j += VL) store(total + j, fma(load(dy + j), load(x + j) * r, load(total + j)));
  }
  memcpy(args.dw + begin, total, size_t(n) * 4);
  return true;
}

const NormKernels& norm_kernels() {
  static const NormKernels table = {rows, gradient_rows, gradient_weight};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
