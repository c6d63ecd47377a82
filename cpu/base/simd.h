// `vf`, a vector of VL fp32 lanes, as wide as the registers of the instruction-set level being compiled, with loads and
// stores that convert from and to fp16 and bf16. `vf` is a vector type of the compiler, so the operators + - * / < and
// ?: work on it; the compiler contracts a * b + c to a fused multiply-add if the level has one. On ARM and at the level
// `scalar` a vector has 4 lanes.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace mlxeff {
namespace MLXEFF_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

MLXEFF_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
MLXEFF_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
MLXEFF_INLINE vf zero() { return vf{}; }
MLXEFF_INLINE vf broadcast(float x) { return x - vf{}; }

#if defined(__AVX512F__)
MLXEFF_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
MLXEFF_INLINE float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
MLXEFF_INLINE float max(vf v) { return _mm512_reduce_max_ps((__m512)v); }
MLXEFF_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
MLXEFF_INLINE vf abs(vf v) { return (vf)_mm512_abs_ps((__m512)v); }
MLXEFF_INLINE vf load(const f16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
MLXEFF_INLINE void store(f16* p, vf v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 8)); }
MLXEFF_INLINE vf load(const bf16* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
// Rounds to nearest even, with integer arithmetic or, where it exists, with an instruction that also flushes subnormals
// to zero.
MLXEFF_INLINE __m256i to_bf16(vf v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);
#else
  const __m512i bits = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  rounded = _mm512_mask_set1_epi32(rounded, nan, 0x7fc0);
  return _mm512_cvtepi32_epi16(rounded);
#endif
}
MLXEFF_INLINE void store(bf16* p, vf v) { _mm256_storeu_si256((__m256i*)p, to_bf16(v)); }
#elif defined(__AVX2__)
MLXEFF_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
MLXEFF_INLINE float sum(vf v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
MLXEFF_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
MLXEFF_INLINE vf abs(vf v) { return (vf)_mm256_andnot_ps(_mm256_set1_ps(-0.0f), (__m256)v); }
MLXEFF_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
MLXEFF_INLINE void store(f16* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 8)); }
MLXEFF_INLINE vf load(const bf16* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
MLXEFF_INLINE void store(bf16* p, vf v) {
  const __m256i bits = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  rounded = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(rounded));
}
#else
MLXEFF_INLINE float sum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#if defined(__ARM_NEON)
MLXEFF_INLINE vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
MLXEFF_INLINE vf max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
MLXEFF_INLINE vf abs(vf v) { return (vf)vabsq_f32((float32x4_t)v); }
MLXEFF_INLINE vf load(const f16* p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
MLXEFF_INLINE void store(f16* p, vf v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v))); }
#else
MLXEFF_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
MLXEFF_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
MLXEFF_INLINE vf abs(vf v) { return v < 0 ? -v : v; }
MLXEFF_INLINE vf load(const f16* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
MLXEFF_INLINE void store(f16* p, vf v) {
  for (int i = 0; i < 4; ++i) from_float(v[i], p + i);
}
#endif
MLXEFF_INLINE vf load(const bf16* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
MLXEFF_INLINE void store(bf16* p, vf v) {
  for (int i = 0; i < 4; ++i) from_float(v[i], p + i);
}
#endif

#if !defined(__AVX512F__)
MLXEFF_INLINE float max(vf v) {
  float most = v[0];
  for (int i = 1; i < VL; ++i) most = v[i] > most ? v[i] : most;
  return most;
}
#endif

// Loads the first n elements, n >= 0. The remaining lanes are zero, and no memory beyond the n elements is read.
#if defined(__AVX512F__)
MLXEFF_INLINE __mmask16 first_lanes(int64_t n) { return __mmask16((1u << min_of(n, VL)) - 1); }
MLXEFF_INLINE vf load_up_to(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p); }
MLXEFF_INLINE vf load_up_to(const f16* p, int64_t n) {
  return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
MLXEFF_INLINE vf load_up_to(const bf16* p, int64_t n) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16);
}
#else
template <class T>
MLXEFF_INLINE vf load_up_to(const T* p, int64_t n) {
  if (n >= VL) return load(p);
  T block[VL] = {};
  for (int64_t i = 0; i < n; ++i) block[i] = p[i];
  return load(block);
}
#endif

// Converts src[0, n) to dst[0, n). The last vector overlaps the one before it; if n is less than a vector, elements are
// converted one at a time.
template <class To, class From>
MLXEFF_INLINE void convert(To* MLXEFF_RESTRICT dst, const From* MLXEFF_RESTRICT src, int64_t n) {
  if (n < VL) {
    for (int64_t i = 0; i < n; ++i) from_float(to_float(src[i]), dst + i);
    return;
  }
  for (int64_t i = 0; i + VL <= n; i += VL) store(dst + i, load(src + i));
  if (n % VL) store(dst + n - VL, load(src + n - VL));
}
MLXEFF_INLINE void to_floats(float* dst, const void* src, int dtype, int64_t n) {
  if (dtype == MLXEFF_F32) memcpy(dst, src, size_t(n) * 4);
  else if (dtype == MLXEFF_F16) convert(dst, static_cast<const f16*>(src), n);
  else convert(dst, static_cast<const bf16*>(src), n);
}
MLXEFF_INLINE void from_floats(void* dst, int dtype, const float* src, int64_t n) {
  if (dtype == MLXEFF_F32) memcpy(dst, src, size_t(n) * 4);
  else if (dtype == MLXEFF_F16) convert(static_cast<f16*>(dst), src, n);
  else convert(static_cast<bf16*>(dst), src, n);
}
MLXEFF_INLINE void store_value(void* dst, int dtype, int64_t index, float value) {
  if (dtype == MLXEFF_F32) static_cast<float*>(dst)[index] = value;
  else if (dtype == MLXEFF_F16) from_float(value, static_cast<f16*>(dst) + index);
  else from_float(value, static_cast<bf16*>(dst) + index);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
