// SeedRowBlocks: the position of a row's blocks in the arrays of a SeedLM matrix.
#pragma once
#include "base/common.h"

namespace mlxeff {

struct SeedRowBlocks {
  int64_t used;    // blocks that hold the K columns of a row; the last one may be partial
  int64_t stride;  // blocks from the start of one row to the next; even with four states
};
static inline SeedRowBlocks seed_row_blocks(const mlxeff_seedlm_weight& w) {
  const int64_t stride = ceil_div(w.ld, w.columns);
  return {ceil_div(w.K, w.columns), w.states == 3 ? stride : round_up(stride, 2)};
}

}  // namespace mlxeff
