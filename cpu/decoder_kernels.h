// Table of the row-wise kernels between the matrix products of a decoder. Each works on one row, on the calling thread.
#pragma once
#include "isa.h"

namespace mlxeff {

struct DecoderKernels {
  // x += residual (+ bias), where these are not null.
  void (*add)(float* x, const float* residual, const float* bias, int64_t n);
  // out = x / rms(x) * weight, the mean square in fp32. `out` may be `x`.
  void (*rms_norm)(float* out, const float* x, const float* weight, float eps, int64_t n);
  // Rotate the pairs (x[i], x[i + half]) by the angles whose cosines and sines are given, times `magnitude`.
  void (*rotate)(float* x, const float* cosines, const float* sines, float magnitude, int64_t half);
  // gate = silu(gate + gate_bias) * (up + up_bias); biases may be null.
  void (*swiglu)(float* gate, const float* up, const float* gate_bias, const float* up_bias, int64_t n);
  // out = x as `dtype`.
  void (*store)(void* out, int dtype, const float* x, int64_t n);
};

MLXEFF_DECLARE_FAMILY(DecoderKernels, decoder_kernels)

}  // namespace mlxeff
