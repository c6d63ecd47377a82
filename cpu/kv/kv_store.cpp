#include "kv/kv_store.h"

#include "rows/rope_kernels.h"

namespace mlxeff {

void NewRows::rotate(int64_t r, const NewRow& row, const mlxeff_heads& to) const {
  const int64_t half = sizes.size / 2, token = r % span.length;
  const mlxeff_heads from = {const_cast<float*>(row.keys), 0, row.key_step, 0, MLXEFF_F32};
  MLXEFF_DISPATCH(rope_kernels)
      .rows({from, to, 1, sizes.groups, 1, sizes.size, sizes.size, cosines + token * half, sines + token * half, false},
            0, sizes.groups);
}

}  // namespace mlxeff
