// RunOptions: the options of one pass of a decoder.
#pragma once
#include "base/common.h"

namespace mlxeff {

// Passed to every key/value store and every feed-forward, each of which reads the options that concern it.
struct RunOptions {
  int mode = MLXEFF_EXACT;  // of the matrix products: MLXEFF_EXACT, MLXEFF_COMPUTE_BF16 or MLXEFF_COMPUTE_INT8
  bool routed = false;      // dynamic feed-forwards choose an expert for each row; else all rows take the widest
  float dial = 0;           // with `routed`: what a router weighs quality and cost by (decoder/expert_router.h)
};

}  // namespace mlxeff
