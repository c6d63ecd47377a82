// The kernels of softmax, logsumexp and cross-entropy over long rows. Each call runs on one thread.
#pragma once
#include "base/isa.h"

namespace mlxeff {

struct SoftmaxKernels {
  // max and sum = sum of exp(x - max) of n elements, in one pass. NaN among them makes sum NaN.
  void (*statistics)(const void* x, int dtype, int64_t n, float* max, float* sum);
  // y = exp((x - shift)) * factor
  void (*exponentials)(const void* x, int dtype, void* y, int y_dtype, int64_t n, float shift, float factor);
  // Index of the first of the largest elements; the first NaN if there is one. n >= 1.
  int64_t (*argmax)(const void* x, int dtype, int64_t n);
};
MLXEFF_DECLARE_FAMILY(SoftmaxKernels, softmax_kernels)

}  // namespace mlxeff
