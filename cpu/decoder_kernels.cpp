// Row-wise kernels of a decoder, compiled once a level. All arithmetic is fp32.
#include "decoder_kernels.h"

#include "simd.h"
#include "simd_math.h"

namespace mlxeff {
namespace MLXEFF_ISA {

static void add_term(float* x, const float* term, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(x + i, load(x + i) + load(term + i));
  for (; i < n; ++i) x[i] += term[i];
}

static void add(float* x, const float* residual, const float* bias, int64_t n) {
  if (residual) add_term(x, residual, n);
  if (bias) add_term(x, bias, n);
}

static void rms_norm(float* out, const float* x, const float* weight, float eps, int64_t n) {
  vf squares = zero(), more = zero();
  int64_t i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    const vf a = load(x + i), b = load(x + i + VL);
    squares = fma(a, a, squares);
    more = fma(b, b, more);
  }
  float total = sum(squares + more);
  for (; i < n; ++i) total += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(total / float(n) + eps);
  for (i = 0; i + VL <= n; i += VL) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

static void rotate(float* x, const float* cosines, const float* sines, float magnitude, int64_t half) {
  float* const y = x + half;
  int64_t i = 0;
  for (; i + VL <= half; i += VL) {
    const vf a = load(x + i) * magnitude, b = load(y + i) * magnitude, c = load(cosines + i), s = load(sines + i);
    store(x + i, a * c - b * s);
    store(y + i, a * s + b * c);
  }
  for (; i < half; ++i) {
    const float a = x[i] * magnitude, b = y[i] * magnitude;
    x[i] = a * cosines[i] - b * sines[i];
    y[i] = a * sines[i] + b * cosines[i];
  }
}

static void swiglu(float* gate, const float* up, const float* gate_bias, const float* up_bias, int64_t n) {
  int64_t i = 0;
  for (; i < n; i += VL) {
    const int64_t left = n - i < VL ? n - i : VL;
    vf g = zero(), u = zero(), gb = zero(), ub = zero();
    memcpy(&g, gate + i, size_t(left) * 4);
    memcpy(&u, up + i, size_t(left) * 4);
    if (gate_bias) memcpy(&gb, gate_bias + i, size_t(left) * 4);
    if (up_bias) memcpy(&ub, up_bias + i, size_t(left) * 4);
    g = g + gb;
    const vf y = g * sigmoid(g) * (u + ub);
    memcpy(gate + i, &y, size_t(left) * 4);
  }
}

static void store_row(void* out, int dtype, const float* x, int64_t n) { from_floats(out, dtype, x, n); }

const DecoderKernels& decoder_kernels() {
  static const DecoderKernels table = {add, rms_norm, rotate, swiglu, store_row};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
