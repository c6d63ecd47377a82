// A weight matrix of any kind.
#pragma once
#include "base/common.h"

namespace mlxeff {

// W (N, K): affine-quantised, or in SeedLM blocks, or dense (row-major). The kind is that of the pointer which is not
// null. Its rows are parts of rows of `ld` values: ld = K for a whole matrix, more for some columns of one.
struct WeightMatrix {
  int64_t N, K, ld;
  mlxeff_qweight quantised;
  const void* dense;
  int dtype;  // of dense
  mlxeff_seedlm_weight seeds;

  static WeightMatrix of(const mlxeff_qweight& w) { return {w.N, w.K, w.ld, w, nullptr, 0, {}}; }
  static WeightMatrix of(const mlxeff_seedlm_weight& w) { return {w.N, w.K, w.ld, {}, nullptr, 0, w}; }
  static WeightMatrix of(const void* dense, int dtype, int64_t N, int64_t K) { return {N, K, K, {}, dense, dtype, {}}; }

  enum class Kind { quantised, seeds, dense };
  Kind kind() const { return quantised.packed ? Kind::quantised : seeds.seeds ? Kind::seeds : Kind::dense; }
};

// part = the rows, or the columns, [begin, begin + count) of W, in W's own memory; `part` may be w. MLXEFF_BAD_ARGUMENT
// for none, for some that W lacks, and for columns that cut what is stored as one: a group of quantised values;
// at the first column, a block of seeds, or two of four states. The last block of seeds may be cut.
int slice_rows(const WeightMatrix& w, int64_t begin, int64_t count, WeightMatrix* part);
int slice_columns(const WeightMatrix& w, int64_t begin, int64_t count, WeightMatrix* part);

// out (K) = row n of W in fp32.
void read_row(const WeightMatrix& w, int64_t n, float* out);

}  // namespace mlxeff
