// Vector versions of exp, exp2 and sigmoid, and the reductions and the transpose that the attention kernels need.
//
// exp2 splits its argument into n + r and exp splits it into n * ln 2 + r, with n an integer; both evaluate a
// polynomial of degree 6 in r and multiply it by 2^n. The error is below 2 ulp for every argument whose result is a
// normal number (checked by tests/test_cpu_elementwise.py). exp(-inf) is 0, large arguments give inf, small ones give
// subnormal results and then 0, and NaN gives NaN.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/simd.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// 1.5 * 2^23: adding it to |x| < 2^22 rounds x to an integer, which the low bits of the sum then hold.
constexpr float round_magic = 12582912.0f;

// p * 2^n, where shifted = n + round_magic.
MLXEFF_INLINE vf scale_by_power(vf p, vf shifted) {
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)(shifted - round_magic));
#else
  // Multiplies by 2^n in two steps, since 2^n itself may lie outside the range of normal numbers.
  const vi n = (vi)shifted - (vi)broadcast(round_magic), half = n >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
#endif
}

MLXEFF_INLINE vf clamp(vf x, float low, float high) {  // NaN is returned unchanged
  x = x < low ? broadcast(low) : x;
  return x > high ? broadcast(high) : x;
}

MLXEFF_INLINE vf vexp2(vf x) {
  x = clamp(x, -151.0f, 129.0f);
  const vf shifted = x + round_magic, r = x - (shifted - round_magic);
  vf p = broadcast(1.535336188319500e-4f);
  p = fma(p, r, broadcast(1.339887440266574e-3f));
  p = fma(p, r, broadcast(9.618437357674640e-3f));
  p = fma(p, r, broadcast(5.550332471162809e-2f));
  p = fma(p, r, broadcast(2.402264791363012e-1f));
  p = fma(p, r, broadcast(6.931472028550421e-1f));
  return scale_by_power(fma(p, r, broadcast(1.0f)), shifted);
}

MLXEFF_INLINE vf vexp(vf x) {
  x = clamp(x, -105.0f, 89.5f);
  const vf shifted = fma(x, broadcast(1.44269504f), broadcast(round_magic)), n = shifted - round_magic;
  // ln 2 is split into two constants, so that n times the larger one is exact.
  const vf r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  vf p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  return scale_by_power(fma(p * r, r, r) + 1.0f, shifted);
}

MLXEFF_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

// Loads the first n < VL elements at p; the remaining lanes are zero.
template <class T>
MLXEFF_INLINE vf load_first(const T* p, int64_t n) {
  float lanes[VL] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}
template <class T>
MLXEFF_INLINE void store_first(T* p, vf v, int64_t n) {
  float lanes[VL];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) from_float(lanes[i], p + i);
}

// Returns the vector 0, 1, 2, ...
MLXEFF_INLINE vi lane_numbers() {
  vi lanes;
  for (int i = 0; i < VL; ++i) lanes[i] = i;
  return lanes;
}

// Stores the sums over the lanes of a, b, c and d in out[0..4).
MLXEFF_INLINE void store_sums(float* out, vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

#if defined(__clang__)
#define MLXEFF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MLXEFF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
MLXEFF_INLINE void interleave(vf a, vf b, vf* low, vf* high) {  // low = a0 b0 a1 b1 ...
#if defined(__AVX512F__)
  *low = MLXEFF_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *high = MLXEFF_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  *low = MLXEFF_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  *high = MLXEFF_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  *low = MLXEFF_SHUFFLE(a, b, 0, 4, 1, 5);
  *high = MLXEFF_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}
#undef MLXEFF_SHUFFLE

// Transposes a VL x VL matrix in log2(VL) rounds, each of which interleaves row i with row i + VL / 2.
MLXEFF_INLINE void transpose(vf rows[VL]) {
  for (int size = 1; size < VL; size *= 2) {
    vf next[VL];
    for (int i = 0; i < VL / 2; ++i) interleave(rows[i], rows[i + VL / 2], &next[2 * i], &next[2 * i + 1]);
    for (int i = 0; i < VL; ++i) rows[i] = next[i];
  }
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
