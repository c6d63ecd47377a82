// Table of what a decoder does between its products, norms and rotations. Each works on one row, on the calling thread.
#pragma once
#include "base/isa.h"

namespace mlxeff {

struct DecoderKernels {
  // x += term.
  void (*add)(float* x, const float* term, int64_t n);
  // out = x, of `dtype`, in fp32.
  void (*load)(float* out, const void* x, int dtype, int64_t n);
  // out = x as `dtype`.
  void (*store)(void* out, int dtype, const float* x, int64_t n);
};

MLXEFF_DECLARE_FAMILY(DecoderKernels, decoder_kernels)

}  // namespace mlxeff
