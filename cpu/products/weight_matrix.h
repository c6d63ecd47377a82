// WeightMatrix: a weight matrix that is quantised, SeedLM-encoded or dense, and functions to slice it and to read a
// row.
#pragma once
#include "base/common.h"

namespace mlxeff {

// A weight matrix W (N, K): affine-quantised, in SeedLM blocks, or dense and row-major. Its kind is that of the one
// data pointer (quantised.packed, seeds.seeds or dense) that is not null. `ld` is the number of values between the
// starts of two rows: K for a whole matrix, and more for a slice of its columns. A quantised matrix may be the sum of
// two with the same shape, bits and group: if lower.packed is not null, `lower` is the second one.
struct WeightMatrix {
  int64_t N, K, ld;
  mlxeff_qweight quantised;
  const void* dense;
  int dtype;  // of dense
  mlxeff_seedlm_weight seeds;
  mlxeff_qweight lower;

  static WeightMatrix of(const mlxeff_qweight& w) { return {w.N, w.K, w.ld, w, nullptr, 0, {}, {}}; }
  static WeightMatrix of(const mlxeff_seedlm_weight& w) { return {w.N, w.K, w.ld, {}, nullptr, 0, w, {}}; }
  static WeightMatrix of(const void* dense, int dtype, int64_t N, int64_t K) {
    return {N, K, K, {}, dense, dtype, {}, {}};
  }

  enum class Kind { quantised, seeds, dense };
  Kind kind() const { return quantised.packed ? Kind::quantised : seeds.seeds ? Kind::seeds : Kind::dense; }
};

// Sets `part` to the rows, or the columns, [begin, begin + count) of W, without copying data; `part` may point to w.
// Returns MLXEFF_BAD_ARGUMENT if the range is empty or exceeds W, or if columns split a unit of storage. Columns of a
// quantised matrix must begin and end at a group boundary. Columns of a SeedLM matrix must begin at a block boundary
// and, with four states, at an even block, because two blocks share a byte of exponents; they may end anywhere.
int slice_rows(const WeightMatrix& w, int64_t begin, int64_t count, WeightMatrix* part);
int slice_columns(const WeightMatrix& w, int64_t begin, int64_t count, WeightMatrix* part);

// The bytes that a row of W takes in memory, with the scales and biases of its groups or the exponents of its blocks.
int64_t bytes_of_row(const WeightMatrix& w);

// Writes row n of W to out (K) in fp32.
void read_row(const WeightMatrix& w, int64_t n, float* out);

}  // namespace mlxeff
