// The Metal shading language for a C++17 compiler: what a kernel's source includes by itself. Address spaces vanish;
// threadgroup variables are rewritten by the translator (build.py).
#pragma once

#include "simdgroup.h"

using namespace metal;

#define device
#define constant
#define thread
#define threadgroup
#define kernel
#define METAL_FUNC inline
#define MLX_MTL_PRAGMA_UNROLL
