// RowLines: prefetches the cache lines of a matrix in the order of their addresses. Only the part of each row that the
// product reads is prefetched.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/common.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// `gaps` is true if unused bytes may lie between the rows. Rows without gaps can share a cache line.
template <bool gaps>
struct RowLines {
  const char* next = nullptr;
  int64_t left = 0, lines = 0;  // lines left in this row; lines in a whole row
  int64_t gap = 0;              // bytes from the end of a row's last line to the next row

  // Starts at the address `row`. Each row uses `bytes` bytes, and rows are `stride` bytes apart.
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
