// Where the blocks of a matrix's rows lie.
#pragma once
#include "base/common.h"

namespace mlxeff {

struct SeedRowBlocks {
  int64_t used;    // blocks of a row that hold its K columns, the last one perhaps in part
  int64_t stride;  // between the first blocks of two rows; even where there are four states
};
static inline SeedRowBlocks seed_row_blocks(const mlxeff_seedlm_weight& w) {
  const int64_t stride = ceil_div(w.ld, w.columns);
  return {ceil_div(w.K, w.columns), w.states == 3 ? stride : round_up(stride, 2)};
}

}  // namespace mlxeff
