// The table of kernels of matrices in columns. Each function runs on the calling thread.
#pragma once
#include "base/isa.h"
#include "columns/column_matrix.h"

namespace mlxeff {

struct ColumnKernels {
  // Lists in `kept` the inputs of block `block` that count: x is the first input of the block, `weights` the factors of
  // its inputs, and an input counts unless |x| * weight < threshold. Inputs that are not numbers count. The block has
  // at most kept.unit of the K inputs. Returns how many count.
  int64_t (*keep)(const float* x, const float* weights, float threshold, int64_t K, int64_t block,
                  const KeptInputs& kept);
  // y [width_of(piece)] = the product of the kept inputs with the outputs of a piece.
  void (*piece)(const ColumnMatrix& w, int64_t number, const KeptInputs& kept, float* y);
  // y [rows][n_begin, n_end) = the product of all inputs of many rows. n_begin and n_end are multiples of 64. Returns
  // an MLXEFF_* code.
  int (*all_inputs)(const ColumnMatrix& w, const float* x, int64_t ldx, int64_t rows, int64_t n_begin, int64_t n_end,
                    float* y, int64_t ldy);
};

MLXEFF_DECLARE_FAMILY(ColumnKernels, column_kernels)

}  // namespace mlxeff
