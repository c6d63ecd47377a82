// How one pass of a decoder computes.
#pragma once
#include "base/common.h"

namespace mlxeff {

// Handed down to every store of keys and values and to every feed-forward; each looks at what concerns it.
struct RunOptions {
  int mode = MLXEFF_EXACT;  // of the matrix products: MLXEFF_EXACT, MLXEFF_COMPUTE_BF16 or MLXEFF_COMPUTE_INT8
};

}  // namespace mlxeff
