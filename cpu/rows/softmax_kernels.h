// The table of kernels for softmax, its logarithm, logsumexp, cross-entropy and argmax on long rows. Each call runs on
// one thread.
#pragma once
#include "base/isa.h"

namespace mlxeff {

struct SoftmaxKernels {
  // Computes *max, the largest of n elements, and *sum, the sum of exp(x - max), in one pass. A NaN element makes *sum
  // NaN.
  void (*statistics)(const void* x, int dtype, int64_t n, float* max, float* sum);
  // Computes y = exp(x - shift) * factor.
  void (*exponentials)(const void* x, int dtype, void* y, int y_dtype, int64_t n, float shift, float factor);
  // Computes y = x - shift.
  void (*differences)(const void* x, int dtype, void* y, int y_dtype, int64_t n, float shift);
  // Returns the index of the largest element, the first one if several are equal, or of the first NaN if there is one.
  // n must be at least 1.
  int64_t (*argmax)(const void* x, int dtype, int64_t n);
};
MLXEFF_DECLARE_FAMILY(SoftmaxKernels, softmax_kernels)

}  // namespace mlxeff
