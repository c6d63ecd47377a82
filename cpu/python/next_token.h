// The binding of next_token.cpp.
#pragma once
#include "python/mlx_ops.h"

namespace mlxeff {

void bind_next_token(nb::module_& m);

}  // namespace mlxeff
