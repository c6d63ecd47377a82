// Cache lines of a matrix, asked for ahead of their use in the order of their addresses: of each row, the part in use.
//
// To be included by per-level sources only.
#pragma once
#include "base/common.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// `gaps`: there may be some between rows. Rows without gaps share their lines.
template <bool gaps>
struct RowLines {
  const char* next = nullptr;
  int64_t left = 0, lines = 0;  // in this row; in a row
  int64_t gap = 0;              // bytes from the end of a row's last line to the next row

  // From `row` on, a row of `bytes` bytes in use; rows are `stride` bytes apart.
  inline __attribute__((always_inline)) void start(const char* row, int64_t bytes, int64_t stride) {
    next = row;
    left = lines = bytes == stride ? INT64_MAX : ceil_div(bytes, 64);
    gap = bytes == stride ? 0 : stride - lines * 64;
  }
  inline __attribute__((always_inline)) void fetch() {
    __builtin_prefetch(next, 0, 3);
    next += 64;
    if (!gaps || --left > 0) return;
    next += gap;
    left = lines;
  }
};

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
