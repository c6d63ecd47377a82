#include "kv/kv_store.h"

#include <math.h>

#include "decoder/decoder_kernels.h"
#include "rows/rope_kernels.h"

namespace mlxeff {

void NewRows::rotate(int64_t r, const NewRow& row, const mlxeff_heads& to) const {
  const int64_t half = sizes.size / 2, token = r % span.length;
  const mlxeff_heads from = {const_cast<float*>(row.keys), 0, row.key_step, 0, MLXEFF_F32};
  MLXEFF_DISPATCH(rope_kernels)
      .rows({from, to, 1, sizes.groups, 1, sizes.size, sizes.size, cosines + token * half, sines + token * half, false},
            0, sizes.groups);
}

void NewRows::store(Team& team, void* keys, void* values, int dtype, int64_t capacity) const {
  const int64_t groups = sizes.groups, size = sizes.size, stride = capacity * size, width = int64_t(dtype_size(dtype));
  const DecoderKernels& row_kernels = MLXEFF_DISPATCH(decoder_kernels);
  team.for_rows(span.rows(), [&](int64_t r) {
    const NewRow row = finish(r);
    const int64_t token = span.position(r % span.length);
    const int64_t place = (r / span.length * groups * stride + token * size) * width;
    rotate(r, row, {static_cast<char*>(keys) + place, 0, stride, 0, dtype});
    for (int64_t g = 0; g < groups; ++g)
      row_kernels.store(static_cast<char*>(values) + place + g * stride * width, dtype, row.values + g * row.value_step,
                        size);
  });
}

AttentionArgs attention_args(const Span& span, const AttentionSizes& sizes, const RunOptions& options) {
  AttentionArgs args = {};
  args.B = span.batch;
  args.H = sizes.heads;
  args.G = sizes.groups;
  args.S = span.length;
  args.T = span.end;
  args.E = sizes.size;
  args.scale = 1.0f / sqrtf(float(sizes.size));
  args.window = sizes.window;
  args.mode = options.mode == MLXEFF_EXACT ? MLXEFF_EXACT : MLXEFF_COMPUTE_BF16;
  return args;
}

}  // namespace mlxeff
