// The row kernels of decoder_kernels.h, compiled once for each instruction-set level.
#include "decoder/decoder_kernels.h"

#include "base/simd.h"

namespace mlxeff {
namespace MLXEFF_ISA {

static void add(float* x, const float* term, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(x + i, load(x + i) + load(term + i));
  for (; i < n; ++i) x[i] += term[i];
}

static float dot(const float* a, const float* b, int64_t n) {
  vf total[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) total[j] = fma(load(a + i + j * VL), load(b + i + j * VL), total[j]);
  for (; i + VL <= n; i += VL) total[0] = fma(load(a + i), load(b + i), total[0]);
  if (i < n) total[1] = fma(load_up_to(a + i, n - i), load_up_to(b + i, n - i), total[1]);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

static void load_row(float* out, const void* x, int dtype, int64_t n) { to_floats(out, x, dtype, n); }
static void store_row(void* out, int dtype, const float* x, int64_t n) { from_floats(out, dtype, x, n); }

const DecoderKernels& decoder_kernels() {
  static const DecoderKernels table = {add, dot, load_row, store_row};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
