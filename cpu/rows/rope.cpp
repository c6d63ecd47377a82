// The C entry points of rotary position embedding (RoPE): the tables of cosines and sines, argument checks, and
// threading. The scaled variants (linear, Llama 3, YaRN) differ only in the inverse frequencies and the scale from
// which the tables are computed.
#include "rows/rope_kernels.h"

#include <cmath>

#include "base/pool.h"

using namespace mlxeff;

extern "C" {

int mlxeff_rope_table(const double* inverse_frequencies, int64_t half, int64_t first_position, int64_t count,
                      double scale, float* cos, float* sin) {
  if (!inverse_frequencies || !cos || !sin || half < 1 || count < 0) return MLXEFF_BAD_ARGUMENT;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t j = 0; j < half; ++j) {
      const double angle = double(first_position + t) * inverse_frequencies[j];
      cos[t * half + j] = float(std::cos(angle) * scale);
      sin[t * half + j] = float(std::sin(angle) * scale);
    }
  return MLXEFF_OK;
}

int mlxeff_rope(const mlxeff_heads* x, const mlxeff_heads* y, int64_t B, int64_t H, int64_t S, int64_t E,
                int64_t rotated, const float* cos, const float* sin, int inverse) {
  if (!x || !y || !x->data || !y->data || !cos || !sin || B < 0 || H < 0 || S < 0 || rotated < 2 || rotated % 2 ||
      rotated > E)
    return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(x->dtype) || !dtype_known(y->dtype)) return MLXEFF_BAD_DTYPE;
  if (x->data == y->data && x->dtype != y->dtype) return MLXEFF_BAD_DTYPE;
  const RopeArgs args = {*x, *y, B, H, S, E, rotated, cos, sin, inverse != 0};
  const RopeKernels& kernels = MLXEFF_DISPATCH(rope_kernels);
  parallel_for(B * S * H, max_of(1, 16384 / E), [&](int64_t begin, int64_t end) { kernels.rows(args, begin, end); });
  return MLXEFF_OK;
}
}
