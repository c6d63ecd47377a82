// Products of unsigned weight bytes and signed activation bytes, summed in 32-bit integers.
//
// To be included by per-level sources only.
#pragma once
#include "products/qmatmul_decode.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// Where the instruction multiplies signed bytes only, 8-bit weights count from 128 and the caller corrects the bias.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
template <int bits>
constexpr int byte_offset = bits == 8 ? 128 : 0;
#else
template <int bits>
constexpr int byte_offset = 0;
#endif

#if defined(__ARM_FEATURE_DOTPROD)
template <int bits>
MLXEFF_INLINE int32x4_t dot_quads(int32x4_t acc, uint8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return vusdotq_s32(acc, w, x);
#else
  return vdotq_s32(acc, vreinterpretq_s8_u8(bits == 8 ? veorq_u8(w, vdupq_n_u8(0x80)) : w), x);
#endif
}
#elif defined(__AVX2__)
template <int bits>
MLXEFF_INLINE __m256i dot_quads(__m256i acc, __m256i w, __m256i x) {
#if defined(__AVX512VNNI__)
  return _mm256_dpbusd_epi32(acc, w, x);
#else
  if constexpr (bits <= 6) {  // 2 * 63 * 127 fits 16 bits
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
  } else {
    const __m256i nibbles = _mm256_set1_epi8(15);
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(w, nibbles), x);
    const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), nibbles), x);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
#endif
}
#endif

// acc + the dot product of the four unsigned bytes of each lane of w and the four signed bytes x.
template <int bits>
MLXEFF_INLINE vi dot_bytes(vi acc, vu w, int32_t x) {
#if defined(__AVX512F__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  return (vi)dot_quads<bits>((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (vi)dot_quads<bits>((int32x4_t)acc, (uint8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#else
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) acc += (vi)(w >> (8 * b) & 0xffu) * int32_t(int8_t(uint32_t(x) >> (8 * b)));
  return acc;
#endif
}

// Eight values of K of each row of a strip, in the form that Int8Sums adds: two vectors of four bytes a lane; for the
// matrix instruction of ARM, the eight bytes of lanes 0 and 1, and of lanes 2 and 3.
struct Eight {
  vu half[2];
};
template <int bits>
MLXEFF_INLINE Eight eight_values(const Block<bits>& block, int i) {  // of the 32, from 8 * i on, 0 <= i < 4
  const vu first = block.bytes(2 * i), second = block.bytes(2 * i + 1);
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return {{__builtin_shufflevector(first, second, 0, 4, 1, 5), __builtin_shufflevector(first, second, 2, 6, 3, 7)}};
#else
  return {{first, second}};
#endif
}
MLXEFF_INLINE Eight load_eight(const char* p) {
  vu first, second;  // one copy of both would go through the stack
  memcpy(&first, p, sizeof first);
  memcpy(&second, p + sizeof first, sizeof second);
  return {{first, second}};
}

// Sums of products of one strip of W and `rows` rows of x.
#if defined(__ARM_FEATURE_MATMUL_INT8)
template <int rows>
struct Int8Sums {
  static constexpr int pairs = (rows + 1) / 2;
  int32x4_t sum[pairs][2];  // of two lanes with two rows of x: lane 0 row 0, lane 0 row 1, lane 1 row 0, lane 1 row 1

  inline __attribute__((always_inline)) void clear() {
    for (int p = 0; p < pairs; ++p) sum[p][0] = sum[p][1] = vdupq_n_s32(0);
  }
  template <int bits>
  inline __attribute__((always_inline)) void add(const Eight& w, const int8_t* x, int64_t ldx) {
#pragma GCC unroll 4
    for (int p = 0; p < pairs; ++p) {
      const int8x8_t even = vld1_s8(x + 2 * p * ldx), odd = 2 * p + 1 < rows ? vld1_s8(x + (2 * p + 1) * ldx) : even;
      const int8x16_t both = vcombine_s8(even, odd);
      sum[p][0] = vusmmlaq_s32(sum[p][0], (uint8x16_t)w.half[0], both);
      sum[p][1] = vusmmlaq_s32(sum[p][1], (uint8x16_t)w.half[1], both);
    }
  }
  inline __attribute__((always_inline)) vf row(int r) const {
    const int32x4_t low = sum[r / 2][0], high = sum[r / 2][1];
    return (vf)vcvtq_f32_s32(r % 2 ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high));
  }
};
#else
template <int rows>
struct Int8Sums {
  static constexpr int chains = rows == 1 ? 2 : 1;  // one row alone does not keep the arithmetic units busy
  vi sum[rows][chains];

  inline __attribute__((always_inline)) void clear() { memset(sum, 0, sizeof sum); }
  template <int bits>
  inline __attribute__((always_inline)) void add(const Eight& w, const int8_t* x, int64_t ldx) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        int32_t four;
        memcpy(&four, x + r * ldx + i * 4, 4);
        sum[r][i % chains] = dot_bytes<bits>(sum[r][i % chains], w.half[i], four);
      }
  }
  inline __attribute__((always_inline)) vf row(int r) const {
    return __builtin_convertvector(chains == 2 ? sum[r][0] + sum[r][chains - 1] : sum[r][0], vf);
  }
};
#endif

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
