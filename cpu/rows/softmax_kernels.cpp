// The softmax kernels at one instruction-set level. Arithmetic is fp32 for every dtype, and results are rounded once
// when they are stored.
//
// `statistics` processes the row in blocks that fit the L1 cache, so that the row is read from memory once. For each
// block it finds the maximum, rescales the earlier sum to the new running maximum, and adds the sum of exp(x - maximum)
// of the block. Within a block the lanes are summed in fp32, and the sums of the blocks are added in fp64, so the
// relative error of the sum is below 1e-6 for any n.
#include "rows/softmax_kernels.h"

#include <math.h>

#include "base/simd_math.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int64_t block = 2048;

static const float* floats(const void* x, int dtype, int64_t begin, int64_t n, float* buffer) {
  if (dtype == MLXEFF_F32) return static_cast<const float*>(x) + begin;
  to_floats(buffer, static_cast<const char*>(x) + begin * 2, dtype, n);
  return buffer;
}

static float largest(const float* x, int64_t n) {
  vf most[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
  int64_t j = 0;
  for (; j + 2 * VL <= n; j += 2 * VL) most[0] = max(load(x + j), most[0]), most[1] = max(load(x + j + VL), most[1]);
  float result = max(max(most[0], most[1]));
  for (; j < n; ++j) result = x[j] > result ? x[j] : result;
  return result;
}

static void statistics(const void* x, int dtype, int64_t n, float* max_out, float* sum_out) {
  float buffer[block], peak = -INFINITY;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t count = min_of(block, n - begin);
    const float *values = floats(x, dtype, begin, count, buffer), most = largest(values, count);
    if (most > peak) {
      total *= exp(double(peak) - double(most));
      peak = most;
    }
    const float base = peak == -INFINITY ? 0.0f : peak;
    vf sums[2] = {};
    int64_t j = 0;
    for (; j + 2 * VL <= count; j += 2 * VL)
      sums[0] += vexp(load(values + j) - base), sums[1] += vexp(load(values + j + VL) - base);
    float tail = 0;
    for (; j < count; j += VL) {
      const int64_t left = min_of(VL, count - j);
      const vf e = vexp(load_first(values + j, left) - base);
      for (int i = 0; i < left; ++i) tail += e[i];
    }
    total += double(sum(sums[0] + sums[1])) + double(tail);
  }
  *max_out = peak;
  *sum_out = float(total);
}

// y = map(x) in lanes, for any two of the types.
template <class From, class To, class Map>
static void each_of(const From* x, To* y, int64_t n, Map map) {
  int64_t j = 0;
  for (; j + VL <= n; j += VL) store(y + j, map(load(x + j)));
  if (j < n) store_first(y + j, map(load_first(x + j, n - j)), n - j);
}
template <class From, class Map>
static void each_to(const From* x, void* y, int y_dtype, int64_t n, Map map) {
  if (y_dtype == MLXEFF_F32) each_of(x, static_cast<float*>(y), n, map);
  else if (y_dtype == MLXEFF_F16) each_of(x, static_cast<f16*>(y), n, map);
  else each_of(x, static_cast<bf16*>(y), n, map);
}
template <class Map>
static void each(const void* x, int dtype, void* y, int y_dtype, int64_t n, Map map) {
  if (dtype == MLXEFF_F32) each_to(static_cast<const float*>(x), y, y_dtype, n, map);
  else if (dtype == MLXEFF_F16) each_to(static_cast<const f16*>(x), y, y_dtype, n, map);
  else each_to(static_cast<const bf16*>(x), y, y_dtype, n, map);
}
static void exponentials(const void* x, int dtype, void* y, int y_dtype, int64_t n, float shift, float factor) {
  each(x, dtype, y, y_dtype, n, [=](vf value) { return vexp(value - shift) * factor; });
}
static void differences(const void* x, int dtype, void* y, int y_dtype, int64_t n, float shift) {
  each(x, dtype, y, y_dtype, n, [=](vf value) { return value - shift; });
}

static int64_t argmax(const void* x, int dtype, int64_t n) {
  float buffer[block], peak = -INFINITY;
  int64_t best = 0;  // the result for a row whose elements are all -inf
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t count = min_of(block, n - begin);
    const float* const values = floats(x, dtype, begin, count, buffer);
    vi unordered = {};
    int64_t j = 0;
    for (; j + VL <= count; j += VL) unordered |= load(values + j) != load(values + j);
    int32_t nan = 0;
    for (int i = 0; i < VL; ++i) nan |= unordered[i];
    for (; j < count; ++j) nan |= values[j] != values[j];
    if (nan) {
      for (j = 0; values[j] == values[j];) ++j;
      return begin + j;
    }
    const float most = largest(values, count);
    if (!(most > peak)) continue;
    peak = most;
    for (j = 0; values[j] != most;) ++j;
    best = begin + j;
  }
  return best;
}

const SoftmaxKernels& softmax_kernels() {
  static const SoftmaxKernels table = {statistics, exponentials, differences, argmax};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
