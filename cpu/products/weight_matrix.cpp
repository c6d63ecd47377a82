#include "products/weight_matrix.h"

#include <vector>

#include "decoder/decoder_kernels.h"
#include "products/qmatmul_kernels.h"
#include "seedlm/seedlm_kernels.h"
#include "seedlm/seedlm_layout.h"

namespace mlxeff {
namespace {

int64_t in_dtype(int64_t values, int dtype) { return values * int64_t(dtype_size(dtype)); }

// Moves the data pointers of a quantised matrix with `ld` values a row to element (row, column).
void move(mlxeff_qweight& q, int64_t ld, int64_t row, int64_t column) {
  const int64_t scale = (row * ld + column) / q.group;
  q.packed += (row * ld + column) / 32 * q.bits;
  q.scales = static_cast<const char*>(q.scales) + in_dtype(scale, q.scale_dtype);
  q.biases = static_cast<const char*>(q.biases) + in_dtype(scale, q.scale_dtype);
}

// Returns W with its data pointers moved to element (row, column). N and K are unchanged.
WeightMatrix from(WeightMatrix w, int64_t row, int64_t column) {
  switch (w.kind()) {
    case WeightMatrix::Kind::quantised:
      move(w.quantised, w.ld, row, column);
      if (w.lower.packed) move(w.lower, w.ld, row, column);
      break;
    case WeightMatrix::Kind::seeds: {
      mlxeff_seedlm_weight& s = w.seeds;
      const int64_t block = row * seed_row_blocks(s).stride + column / s.columns;
      s.seeds = static_cast<const char*>(s.seeds) + block * (s.states == 3 ? 4 : 2);
      if (s.states == 3) break;
      s.coefficients += block;
      s.exponents += block / 2;
      break;
    }
    case WeightMatrix::Kind::dense:
      w.dense = static_cast<const char*>(w.dense) + in_dtype(row * w.ld + column, w.dtype);
  }
  return w;
}

}  // namespace

int slice_rows(const WeightMatrix& w, int64_t begin, int64_t count, WeightMatrix* part) {
  if (begin < 0 || count < 1 || begin > w.N - count) return MLXEFF_BAD_ARGUMENT;
  *part = from(w, begin, 0);
  part->N = part->quantised.N = part->lower.N = part->seeds.N = count;
  return MLXEFF_OK;
}

int slice_columns(const WeightMatrix& w, int64_t begin, int64_t count, WeightMatrix* part) {
  if (begin < 0 || count < 1 || begin > w.K - count) return MLXEFF_BAD_ARGUMENT;
  const WeightMatrix::Kind kind = w.kind();
  if (kind == WeightMatrix::Kind::quantised && (begin % w.quantised.group != 0 || count % w.quantised.group != 0))
    return MLXEFF_BAD_ARGUMENT;
  if (kind == WeightMatrix::Kind::seeds && begin % (w.seeds.columns * (w.seeds.states == 3 ? 1 : 2)) != 0)
    return MLXEFF_BAD_ARGUMENT;
  *part = from(w, 0, begin);
  part->K = part->quantised.K = part->lower.K = part->seeds.K = count;
  return MLXEFF_OK;
}

int64_t bytes_of_row(const WeightMatrix& w) {
  switch (w.kind()) {
    case WeightMatrix::Kind::quantised: {
      const mlxeff_qweight& q = w.quantised;
      const int64_t bytes = w.K * q.bits / 8 + 2 * in_dtype(w.K / q.group, q.scale_dtype);
      return w.lower.packed ? bytes + w.K * q.bits / 8 + 2 * in_dtype(w.K / q.group, w.lower.scale_dtype) : bytes;
    }
    case WeightMatrix::Kind::seeds: {
      const int64_t blocks = seed_row_blocks(w.seeds).used;
      return w.seeds.states == 3 ? 4 * blocks : 4 * blocks + ceil_div(blocks, 2);
    }
    case WeightMatrix::Kind::dense: break;
  }
  return in_dtype(w.K, w.dtype);
}

void read_row(const WeightMatrix& w, int64_t n, float* out) {
  switch (w.kind()) {
    case WeightMatrix::Kind::quantised: {
      const QmatmulKernels& kernels = MLXEFF_DISPATCH(qmatmul_kernels);
      kernels.dequantize_row(w.quantised, n, out, MLXEFF_F32);
      if (!w.lower.packed) break;
      std::vector<float> rest(size_t(w.K));
      kernels.dequantize_row(w.lower, n, rest.data(), MLXEFF_F32);
      for (int64_t k = 0; k < w.K; ++k) out[k] += rest[size_t(k)];
      break;
    }
    case WeightMatrix::Kind::seeds: MLXEFF_DISPATCH(seedlm_kernels).decode_row(w.seeds, n, out, MLXEFF_F32); break;
    case WeightMatrix::Kind::dense:
      MLXEFF_DISPATCH(decoder_kernels)
          .load(out, static_cast<const char*>(w.dense) + in_dtype(n * w.ld, w.dtype), w.dtype, w.K);
  }
}

}  // namespace mlxeff
