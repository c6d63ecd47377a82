// The table of SiLU and SwiGLU kernels. Each call processes n contiguous elements on one thread.
#pragma once
#include "base/isa.h"

namespace mlxeff {

struct SwigluKernels {
  // Computes y = silu(gate) * up, or y = silu(gate) if `up` is null. All arrays have the same dtype; y may be gate or
  // up.
  void (*forward)(const void* gate, const void* up, void* y, int64_t n, int dtype);
  // Computes dgate and dup from dy, or only dgate if `up` is null. All arrays have the same dtype; the gradients may
  // overwrite dy, gate or up.
  void (*backward)(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n, int dtype);
};
MLXEFF_DECLARE_FAMILY(SwigluKernels, swiglu_kernels)

}  // namespace mlxeff
