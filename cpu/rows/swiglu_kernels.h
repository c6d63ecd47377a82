// The kernels of SiLU and SwiGLU. Each call runs on one thread over n contiguous elements.
#pragma once
#include "base/isa.h"

namespace mlxeff {

struct SwigluKernels {
  // y = silu(gate) * up; with up null, y = silu(gate). All of one dtype; y may be gate or up.
  void (*forward)(const void* gate, const void* up, void* y, int64_t n, int dtype);
  // dgate, dup from dy; with up null, dgate only. All of one dtype; gradients may overwrite dy, gate or up.
  void (*backward)(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n, int dtype);
};
MLXEFF_DECLARE_FAMILY(SwigluKernels, swiglu_kernels)

}  // namespace mlxeff
