// The kernels of SiLU and SwiGLU and of their gradients, at one instruction-set level. With g = gate, u = up and s = 1
// / (1 + exp(-g)):
//
//   y = g s u,   dg = dy u s (1 + g (1 - s)),   du = dy g s
//
// Arithmetic is fp32, and results are rounded once. The error of exp is below 2 ulp (simd_math.h). A very negative g
// gives -0, and NaN gives NaN.
#include "rows/swiglu_kernels.h"

#include "base/simd_math.h"

namespace mlxeff {
namespace MLXEFF_ISA {

template <class T>
MLXEFF_INLINE vf load_some(const T* p, int64_t n) {
  return n >= VL ? load(p) : load_first(p, n);
}
template <class T>
MLXEFF_INLINE void store_some(T* p, vf v, int64_t n) {
  if (n >= VL) store(p, v);
  else store_first(p, v, n);
}

template <class T>
static void forward_of(const T* gate, const T* up, T* y, int64_t n) {
  for (int64_t j = 0; j < n; j += VL) {
    const vf g = load_some(gate + j, n - j);
    vf value = g / (1.0f + vexp(-g));
    if (up) value *= load_some(up + j, n - j);
    store_some(y + j, value, n - j);
  }
}

template <class T>
static void backward_of(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t n) {
  for (int64_t j = 0; j < n; j += VL) {
    const vf g = load_some(gate + j, n - j), d = load_some(dy + j, n - j), s = sigmoid(g);
    const vf u = up ? load_some(up + j, n - j) : broadcast(1.0f);
    // Clamping g avoids the NaN that 0 * inf gives for an infinite g; g (1 - s) tends to 0 for large g.
    store_some(dgate + j, d * u * s * (1.0f + clamp(g, -1e30f, 1e30f) * (1.0f - s)), n - j);
    if (dup) store_some(dup + j, d * g * s, n - j);
  }
}

static void forward(const void* gate, const void* up, void* y, int64_t n, int dtype) {
  if (dtype == MLXEFF_F32)
    forward_of(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<float*>(y), n);
  else if (dtype == MLXEFF_F16)
    forward_of(static_cast<const f16*>(gate), static_cast<const f16*>(up), static_cast<f16*>(y), n);
  else forward_of(static_cast<const bf16*>(gate), static_cast<const bf16*>(up), static_cast<bf16*>(y), n);
}

template <class T>
static void backward_typed(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n) {
  backward_of(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<const T*>(dy), static_cast<T*>(dgate),
              static_cast<T*>(dup), n);
}
static void backward(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n, int dtype) {
  if (dtype == MLXEFF_F32) backward_typed<float>(gate, up, dy, dgate, dup, n);
  else if (dtype == MLXEFF_F16) backward_typed<f16>(gate, up, dy, dgate, dup, n);
  else backward_typed<bf16>(gate, up, dy, dgate, dup, n);
}

const SwigluKernels& swiglu_kernels() {
  static const SwigluKernels table = {forward, backward};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
