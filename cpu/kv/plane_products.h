// Products of the codes of planes with integers of 16 bits, summed exactly in 32 bits: the same sums at every level.
//
// An integer is 256 high + low, two signed digits of 8 bits. A code c of 8 bits counts as c - 128. A coarse code has
// the lower half 0.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/simd_math.h"

namespace mlxeff {
namespace MLXEFF_ISA {

typedef uint32_t vu __attribute__((vector_size(VL * 4)));

// Codes: VL lanes of four codes from the low halves of bytes, and as many from the high halves. `load_codes` reads VL
// * 4 bytes of each plane, no lower one unless `full`. `add_products` returns sum + the products of each lane's four
// low codes with the four digits of `low`, and of its four high codes with those of `high`. Sums have to begin with
// -code_offset times the sum of all digits.
#if defined(__AVX512F__)
constexpr int32_t code_offset = 128;
template <bool full>
struct Codes {
  __m512i low, high;
};
template <bool full>
MLXEFF_INLINE Codes<full> load_codes(const uint8_t* upper, const uint8_t* lower) {
  const __m512i mask = _mm512_set1_epi8(char(0xf0)), u = _mm512_loadu_si512(upper), shifted = _mm512_slli_epi16(u, 4);
  if constexpr (full) {
    const __m512i l = _mm512_loadu_si512(lower);  // 0xca: bits of the second argument where the mask is set
    return {_mm512_ternarylogic_epi32(mask, shifted, l, 0xca),
            _mm512_ternarylogic_epi32(mask, u, _mm512_srli_epi16(l, 4), 0xca)};
  }
  return {_mm512_and_si512(shifted, mask), _mm512_and_si512(u, mask)};
}
template <bool full>
MLXEFF_INLINE vi add_products(vi sum, const Codes<full>& codes, int32_t low, int32_t high) {
  return (vi)_mm512_dpbusd_epi32(_mm512_dpbusd_epi32((__m512i)sum, codes.low, _mm512_set1_epi32(low)), codes.high,
                                 _mm512_set1_epi32(high));
}
#elif defined(__AVX2__)
// The halves stay apart, since products of larger codes could exceed the 16 bits of vpmaddubsw.
constexpr int32_t code_offset = 128;
template <bool full>
struct Codes {
  __m256i upper_low, upper_high, lower_low, lower_high;
};
template <bool full>
MLXEFF_INLINE Codes<full> load_codes(const uint8_t* upper, const uint8_t* lower) {
  const __m256i mask = _mm256_set1_epi8(15), u = _mm256_loadu_si256((const __m256i*)upper);
  Codes<full> codes;
  codes.upper_low = _mm256_and_si256(u, mask);
  codes.upper_high = _mm256_and_si256(_mm256_srli_epi16(u, 4), mask);
  if constexpr (full) {
    const __m256i l = _mm256_loadu_si256((const __m256i*)lower);
    codes.lower_low = _mm256_and_si256(l, mask);
    codes.lower_high = _mm256_and_si256(_mm256_srli_epi16(l, 4), mask);
  }
  return codes;
}
template <bool full>
MLXEFF_INLINE vi add_products(vi sum, const Codes<full>& codes, int32_t low, int32_t high) {
  const __m256i l = _mm256_set1_epi32(low), h = _mm256_set1_epi32(high);
  const __m256i upper =
      _mm256_add_epi16(_mm256_maddubs_epi16(codes.upper_low, l), _mm256_maddubs_epi16(codes.upper_high, h));
  __m256i total = _mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(upper, _mm256_set1_epi16(16)));
  if constexpr (full) {
    const __m256i lower =
        _mm256_add_epi16(_mm256_maddubs_epi16(codes.lower_low, l), _mm256_maddubs_epi16(codes.lower_high, h));
    total = _mm256_add_epi32(total, _mm256_madd_epi16(lower, _mm256_set1_epi16(1)));
  }
  return (vi)total;
}
#elif defined(__ARM_NEON)
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int32_t code_offset = 128;
typedef uint8x16_t CodeBytes;
MLXEFF_INLINE CodeBytes code_bytes(uint8x16_t codes) { return codes; }
MLXEFF_INLINE int32x4_t add_quads(int32x4_t sum, CodeBytes codes, int8x16_t digits) {
  return vusdotq_s32(sum, codes, digits);
}
#else
constexpr int32_t code_offset = 0;  // the codes lose their offset when they become signed
typedef int8x16_t CodeBytes;
MLXEFF_INLINE CodeBytes code_bytes(uint8x16_t codes) { return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80))); }
MLXEFF_INLINE int32x4_t add_quads(int32x4_t sum, CodeBytes codes, int8x16_t digits) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, codes, digits);
#else
  const int32x4_t first = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(digits)));
  return vaddq_s32(sum, vpaddq_s32(first, vpaddlq_s16(vmull_s8(vget_high_s8(codes), vget_high_s8(digits)))));
#endif
}
#endif
template <bool full>
struct Codes {
  CodeBytes low, high;
};
template <bool full>
MLXEFF_INLINE Codes<full> load_codes(const uint8_t* upper, const uint8_t* lower) {
  const uint8x16_t u = vld1q_u8(upper);
  if constexpr (full) {
    const uint8x16_t l = vld1q_u8(lower);
    return {code_bytes(vsliq_n_u8(l, u, 4)), code_bytes(vsriq_n_u8(u, l, 4))};
  }
  return {code_bytes(vshlq_n_u8(u, 4)), code_bytes(vandq_u8(u, vdupq_n_u8(0xf0)))};
}
template <bool full>
MLXEFF_INLINE vi add_products(vi sum, const Codes<full>& codes, int32_t low, int32_t high) {
  const int32x4_t first = add_quads((int32x4_t)sum, codes.low, vreinterpretq_s8_s32(vdupq_n_s32(low)));
  return (vi)add_quads(first, codes.high, vreinterpretq_s8_s32(vdupq_n_s32(high)));
}
#else
constexpr int32_t code_offset = 128;
template <bool full>
struct Codes {
  vu low, high;
};
template <bool full>
MLXEFF_INLINE Codes<full> load_codes(const uint8_t* upper, const uint8_t* lower) {
  vu u, l = {};
  memcpy(&u, upper, sizeof u);
  if (full) memcpy(&l, lower, sizeof l);
  return {(u << 4 & 0xf0f0f0f0u) | (l & 0x0f0f0f0fu), (u & 0xf0f0f0f0u) | (l >> 4 & 0x0f0f0f0fu)};
}
template <bool full>
MLXEFF_INLINE vi add_products(vi sum, const Codes<full>& codes, int32_t low, int32_t high) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    sum += (vi)(codes.low >> (8 * i) & 0xffu) * int32_t(int8_t(uint32_t(low) >> (8 * i)));
    sum += (vi)(codes.high >> (8 * i) & 0xffu) * int32_t(int8_t(uint32_t(high) >> (8 * i)));
  }
  return sum;
}
#endif

// Stores the low byte of each lane.
MLXEFF_INLINE void store_bytes(void* to, vi numbers) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)numbers));
#elif defined(__AVX2__)
  const __m256i order = _mm256_set1_epi32(0x0c080400);
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)numbers, order);
  _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
#else
  int8_t bytes[VL];
  for (int i = 0; i < VL; ++i) bytes[i] = int8_t(numbers[i] & 0xff);
  memcpy(to, bytes, sizeof bytes);
#endif
}

MLXEFF_INLINE int32_t load_four(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return four;
}

// The largest integer that the digits have to hold.
constexpr float largest_integer = 127 * 256;

// Writes the digits of the integers x, of at most largest_integer + 127, and adds the digits to the sums.
MLXEFF_INLINE void store_digits(vi x, int8_t* high, int8_t* low, vi sums[2]) {
  const vi upper = (x + 128) >> 8, lower = x - upper * 256;
  store_bytes(high, upper);
  store_bytes(low, lower);
  sums[0] += upper;
  sums[1] += lower;
}

// x, rounded to integers; of at most 2^22.
MLXEFF_INLINE vi to_integers(vf x) { return (vi)(x + round_magic) - (vi)broadcast(round_magic); }

MLXEFF_INLINE int32_t sum(vi v) {
  int32_t total = 0;
  for (int i = 0; i < VL; ++i) total += v[i];
  return total;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
