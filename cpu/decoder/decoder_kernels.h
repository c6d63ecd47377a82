// The table of the decoder's small row kernels: addition, dot product, and conversion to and from fp32. Each kernel
// processes one row of n elements on the calling thread.
#pragma once
#include "base/isa.h"

namespace mlxeff {

struct DecoderKernels {
  // x += term.
  void (*add)(float* x, const float* term, int64_t n);
  // Returns the sum of a[i] * b[i].
  float (*dot)(const float* a, const float* b, int64_t n);
  // Converts x, of type `dtype`, to fp32.
  void (*load)(float* out, const void* x, int dtype, int64_t n);
  // Converts the fp32 x to `dtype`.
  void (*store)(void* out, int dtype, const float* x, int64_t n);
};

MLXEFF_DECLARE_FAMILY(DecoderKernels, decoder_kernels)

}  // namespace mlxeff
