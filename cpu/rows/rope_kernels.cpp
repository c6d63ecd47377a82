// The kernel of rotary position embedding, which rotates the elements j and j + rotated / 2 of a head as a pair:
//
//   y[j] = x[j] cos - x[j + h] sin,   y[j + h] = x[j] sin + x[j + h] cos,   h = rotated / 2
//
// cos and sin are the table entries for the row's token. `inverse` rotates by the negative angle, which also computes
// the gradient. Elements from `rotated` on are copied. Arithmetic is fp32, and results are rounded once. Each pair is
// read before it is written, so y may be x.
#include "rows/rope_kernels.h"

#include "base/simd_math.h"

namespace mlxeff {
namespace MLXEFF_ISA {

template <class To, class From>
static void rotate(const From* x, To* y, const float* cos, const float* sin, float sign, int64_t half) {
  int64_t j = 0;
  for (; j + VL <= half; j += VL) {
    const vf c = load(cos + j), s = load(sin + j) * sign, a = load(x + j), b = load(x + half + j);
    store(y + j, a * c - b * s);
    store(y + half + j, a * s + b * c);
  }
  if (j < half) {
    const int64_t n = half - j;
    const vf c = load_first(cos + j, n), s = load_first(sin + j, n) * sign, a = load_first(x + j, n),
             b = load_first(x + half + j, n);
    store_first(y + j, a * c - b * s, n);
    store_first(y + half + j, a * s + b * c, n);
  }
}

template <class To, class From>
static void row(const RopeArgs& args, const From* x, To* y, int64_t token) {
  const int64_t half = args.rotated / 2;
  rotate(x, y, args.cos + token * half, args.sin + token * half, args.inverse ? -1.0f : 1.0f, half);
  if (static_cast<const void*>(x) != static_cast<const void*>(y))
    convert(y + args.rotated, x + args.rotated, args.E - args.rotated);
}

template <class From>
static void row_to(const RopeArgs& args, const From* x, void* y, int64_t token) {
  if (args.y.dtype == MLXEFF_F32) row(args, x, static_cast<float*>(y), token);
  else if (args.y.dtype == MLXEFF_F16) row(args, x, static_cast<f16*>(y), token);
  else row(args, x, static_cast<bf16*>(y), token);
}

static void rows(const RopeArgs& args, int64_t begin, int64_t end) {
  const auto at = [](const mlxeff_heads& x, int64_t b, int64_t h, int64_t t) -> void* {
    return static_cast<char*>(x.data) + (b * x.batch + h * x.head + t * x.token) * int64_t(dtype_size(x.dtype));
  };
  for (int64_t index = begin; index < end; ++index) {
    const int64_t h = index % args.H, t = index / args.H % args.S, b = index / args.H / args.S;
    void *const x = at(args.x, b, h, t), *const y = at(args.y, b, h, t);
    if (args.x.dtype == MLXEFF_F32) row_to(args, static_cast<const float*>(x), y, t);
    else if (args.x.dtype == MLXEFF_F16) row_to(args, static_cast<const f16*>(x), y, t);
    else row_to(args, static_cast<const bf16*>(x), y, t);
  }
}

const RopeKernels& rope_kernels() {
  static const RopeKernels table = {rows};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
