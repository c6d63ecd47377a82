#include "products/weight_matrix.h"

#include "decoder/decoder_kernels.h"
#include "products/qmatmul_kernels.h"
#include "seedlm/seedlm_kernels.h"

namespace mlxeff {

void read_row(const WeightMatrix& w, int64_t n, float* out) {
  switch (w.kind()) {
    case WeightMatrix::Kind::quantised:
      MLXEFF_DISPATCH(qmatmul_kernels).dequantize_row(w.quantised, n, out, MLXEFF_F32);
      break;
    case WeightMatrix::Kind::seeds: MLXEFF_DISPATCH(seedlm_kernels).decode_row(w.seeds, n, out, MLXEFF_F32); break;
    case WeightMatrix::Kind::dense:
      MLXEFF_DISPATCH(decoder_kernels)
          .load(out, static_cast<const char*>(w.dense) + n * w.K * int64_t(dtype_size(w.dtype)), w.dtype, w.K);
  }
}

}  // namespace mlxeff
