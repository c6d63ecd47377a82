// The sampling kernels at one instruction-set level. All arithmetic is fp32; `weights` sums a block of n elements in
// fp32 lanes. x and w must have room for whole vectors, and x must be -inf beyond n.
#include "rows/sampling_kernels.h"

#include <math.h>

#include "base/simd_math.h"

namespace mlxeff {
namespace MLXEFF_ISA {

static bool any(vi lanes) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)lanes) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)lanes) != 0;
#else
  return (lanes[0] | lanes[1] | lanes[2] | lanes[3]) != 0;
#endif
}

static void group_maxima(const float* x, int64_t n, float* out) {
  for (int64_t begin = 0; begin < n; begin += sampling_group) {
    vf most = broadcast(-INFINITY);
    for (int64_t j = begin; j < min_of(n, begin + sampling_group); j += VL) most = max(load(x + j), most);
    *out++ = max(most);
  }
}

static int64_t gather(const float* x, int64_t n, int32_t first_id, float floor, Candidate* out) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += VL) {
    if (!any(load(x + j) >= floor)) continue;
    const int64_t lanes = min_of(VL, n - j);
    for (int64_t i = j; i < j + lanes; ++i)
      if (x[i] >= floor) out[count++] = {x[i], first_id + int32_t(i)};
  }
  return count;
}

static double weights(const float* x, float* w, int64_t n, float max, float inverse_temperature, float floor) {
  vf total = zero();
  for (int64_t j = 0; j < n; j += VL) {
    const vf value = load(x + j);
    const vi kept = value >= floor;
    vf weight = zero();
    if (any(kept)) weight = kept ? vexp((value - max) * inverse_temperature) : zero();
    store(w + j, weight);
    total += weight;
  }
  return sum(total);
}

const SamplingKernels& sampling_kernels() {
  static const SamplingKernels table = {group_maxima, gather, weights};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
