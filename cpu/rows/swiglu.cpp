// The C entry points of SiLU, SwiGLU and their gradients on matrices of `rows` rows of n elements: argument checks and
// threading. Long rows are split into pieces, so that even a single row uses all threads.
#include "rows/swiglu_kernels.h"

#include <type_traits>

#include "base/pool.h"

namespace mlxeff {
namespace {

constexpr int64_t piece = 8192;  // in elements: work for about the time that waking a thread takes

// Calls body(row, first column, number of columns) for the pieces of all rows.
template <class Body>
void for_pieces(int64_t rows, int64_t n, Body body) {
  const int64_t cuts = ceil_div(n, piece), columns = round_up(ceil_div(n, cuts), 64),
                rows_together = max_of(1, piece / n);
  parallel_for(rows * cuts, rows_together, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % cuts * columns;
      if (first < n) body(index / cuts, first, min_of(columns, n - first));
    }
  });
}

template <class Pointer>
Pointer* at(Pointer* p, int64_t ld, int dtype, int64_t row, int64_t column) {
  using Byte = typename std::conditional<std::is_const<Pointer>::value, const char, char>::type;
  return p ? static_cast<Byte*>(p) + (row * ld + column) * int64_t(dtype_size(dtype)) : nullptr;
}

}  // namespace
}  // namespace mlxeff

using namespace mlxeff;

extern "C" {

int mlxeff_swiglu(const void* gate, int64_t ldg, const void* up, int64_t ldu, void* y, int64_t ldy, int64_t rows,
                  int64_t n, int dtype) {
  if (!gate || !y || rows < 0 || n < 1) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(dtype)) return MLXEFF_BAD_DTYPE;
  const SwigluKernels& kernels = MLXEFF_DISPATCH(swiglu_kernels);
  for_pieces(rows, n, [&](int64_t row, int64_t column, int64_t columns) {
    kernels.forward(at(gate, ldg, dtype, row, column), at(up, ldu, dtype, row, column), at(y, ldy, dtype, row, column),
                    columns, dtype);
  });
  return MLXEFF_OK;
}

int mlxeff_swiglu_backward(const void* gate, int64_t ldg, const void* up, int64_t ldu, const void* dy, int64_t lddy,
                           void* dgate, int64_t lddg, void* dup, int64_t lddu, int64_t rows, int64_t n, int dtype) {
  if (!gate || !dy || !dgate || (dup && !up) || rows < 0 || n < 1) return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(dtype)) return MLXEFF_BAD_DTYPE;
  const SwigluKernels& kernels = MLXEFF_DISPATCH(swiglu_kernels);
  for_pieces(rows, n, [&](int64_t row, int64_t column, int64_t columns) {
    kernels.backward(at(gate, ldg, dtype, row, column), at(up, ldu, dtype, row, column),
                     at(dy, lddy, dtype, row, column), at(dgate, lddg, dtype, row, column),
                     at(dup, lddu, dtype, row, column), columns, dtype);
  });
  return MLXEFF_OK;
}
}
