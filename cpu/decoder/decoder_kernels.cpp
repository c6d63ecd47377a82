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

static void load_row(float* out, const void* x, int dtype, int64_t n) { to_floats(out, x, dtype, n); }
static void store_row(void* out, int dtype, const float* x, int64_t n) { from_floats(out, dtype, x, n); }

const DecoderKernels& decoder_kernels() {
  static const DecoderKernels table = {add, load_row, store_row};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
