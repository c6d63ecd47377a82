// The vectors of the kernels of qmatmul_row.h and qmatmul_rows.h: weights of a row of W, the scales that belong to
// their lanes, and products with x in the forms that qmatmul_row.h describes.
//
// To be included by per-level sources only.
#pragma once
#include "products/gemm_tile.h"
#include "products/qmatmul_int8.h"
#include "products/qmatmul_kernels.h"
#include "products/qmatmul_spread.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// Bits that a weight takes in a vector.
template <int bits>
constexpr int held_bits = bits == 5 || bits == 6 ? 8 : bits;
// Values of K that one vector holds, and that a row is padded to (with x = 0).
template <int bits>
constexpr int row_step = VL * 32 / held_bits<bits>;
constexpr int64_t prefetch_distance = 4096;  // bytes in use between what is read and what is asked for
// Bytes between a row and the page that is touched with it. A page's first access waits for its address to be
// translated and for the hardware to recognise the stream: eight pages of 4 KiB ahead, that is hidden (6 to 16 % of a
// product with one row and weights in memory, 20 % where rows have gaps).
constexpr int64_t page_distance = 32768;
constexpr int64_t row_padding = 128;  // the largest step

// Whether EXACT reads x as integers of three bytes. AVX2's products of bytes saturate beyond 6 bits.
constexpr int digits = 3;
#if defined(__AVX512F__) || defined(__ARM_FEATURE_DOTPROD)
template <int bits>
constexpr bool by_digits = true;
#elif defined(__AVX2__)
template <int bits>
constexpr bool by_digits = bits <= 6;
#else
template <int bits>
constexpr bool by_digits = false;
#endif

// Whether qmatmul_row.h and qmatmul_rows.h have kernels.
template <int bits>
constexpr bool row_kernels = bits == 4 || bits == 8 || ((bits == 5 || bits == 6) && by_digits<bits>);

// The first `count` of a vector of words, a multiple of 4; the rest are zero, and nothing beyond is read.
MLXEFF_INLINE vu load_words_up_to(const char* p, int64_t count) {
  vu v = {};
  if (count >= VL) {
    memcpy(&v, p, sizeof v);
    return v;
  }
#if defined(__AVX512F__)
  return (vu)_mm512_maskz_loadu_epi32(first_lanes(count), p);
#else
  if (count > 0) memcpy(&v, p, 16);  // of 8 words
  return v;
#endif
}

// In the form of x that the row kernels read: the bytes between two rows, each value of K taking `size` bytes; and the
// groups of a row of x_sum and x_scale, which end with zeros up to a whole vector.
MLXEFF_INLINE int64_t row_x_bytes(int64_t K, int64_t size) { return padded_stride(round_up(K, row_padding) * size, 1); }
MLXEFF_INLINE int64_t row_groups(const mlxeff_qweight& w) { return round_up(w.K / w.group, VL); }

// The weights of a row from value k on, `held_bits` each; zeros from value K on.
template <int bits>
MLXEFF_INLINE vu load_codes(const char* row, int64_t k, int64_t K) {
  if constexpr (held_bits<bits> == bits) return load_words_up_to(row + k * bits / 8, (K - k) * bits / 32);
  else return load_spread<bits>(row, k, K);
}

// Lane i = scale of the group that word first + i belongs to, a group having `group_words` words; first is a multiple
// of VL.
template <int group_words>
MLXEFF_INLINE vf spread_scales(const float* scales, int64_t first) {
#if defined(__AVX512F__)  // no more is loaded than is needed, which would often lie in two cache lines
  if constexpr (group_words < VL) {
    const float* const p = scales + first / group_words;
    const __m128 few = group_words == 4 ? _mm_loadu_ps(p) : _mm_castpd_ps(_mm_load_sd((const double*)p));
    const __m512i lanes = group_words == 4 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                           : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return (vf)_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(few));
  }
#elif defined(__AVX2__)
  if constexpr (group_words == 4) {
    const __m256d pair = _mm256_broadcast_sd((const double*)(scales + first / 4));
    return (vf)_mm256_permutevar_ps(_mm256_castpd_ps(pair), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  }
#endif
  return broadcast(scales[first / group_words]);
}

template <int bits>
MLXEFF_INLINE vf word_value(vu words, int j) {
  return __builtin_convertvector((vi)((words >> (bits * j)) & ((1u << bits) - 1)), vf);
}

// acc + products of the unsigned bytes of w and the signed bytes at x, four to a lane.
template <int bits>
MLXEFF_INLINE vi dot_wide(vi acc, vu w, const int8_t* x) {
#if defined(__AVX512F__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_loadu_si512(x));
#elif defined(__AVX2__)
  return (vi)dot_quads<bits>((__m256i)acc, (__m256i)w, _mm256_loadu_si256((const __m256i*)x));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (vi)dot_quads<bits>((int32x4_t)acc, (uint8x16_t)w, vld1q_s8(x));
#else
  int32_t factors[VL];
  memcpy(factors, x, sizeof factors);
  const vu packed = {uint32_t(factors[0]), uint32_t(factors[1]), uint32_t(factors[2]), uint32_t(factors[3])};
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) acc += (vi)(w >> (8 * b) & 0xffu) * ((vi)(packed << (24 - 8 * b)) >> 24);
  return acc;
#endif
}
// The same for the nibbles of 4-bit weights, eight to a lane.
MLXEFF_INLINE vi dot_nibbles(vi acc, vu even, vu odd, const int8_t* x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i first = _mm256_maddubs_epi16((__m256i)even, _mm256_loadu_si256((const __m256i*)x));
  const __m256i second = _mm256_maddubs_epi16((__m256i)odd, _mm256_loadu_si256((const __m256i*)(x + VL * 4)));
  return acc + (vi)_mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1));
#else
  return dot_wide<4>(dot_wide<4>(acc, even, x), odd, x + VL * 4);
#endif
}

// A vector of weights in the bytes that are multiplied: of 4 bits, the even and the odd ones.
template <int bits>
struct Codes {
  vu first, odd;
};
template <int bits>
MLXEFF_INLINE Codes<bits> split_codes(vu q) {
  if constexpr (bits == 4) return {q & 0x0f0f0f0fu, (q >> 4) & 0x0f0f0f0fu};
  else return {q, q};
}

// Lane by lane sum(q * x), x in the form of arrange_digits. Sums of eight products of 4 and 24 bits fit 32 bits; of
// four products of 8 and 24 bits, only those of the two higher bytes do.
template <int bits>
MLXEFF_INLINE vf dot_digits(const Codes<bits>& q, const int8_t* x) {
  constexpr int step = row_step<bits>;
  if constexpr (bits == 4) {
    vi sum = dot_nibbles(vi{}, q.first, q.odd, x);
    sum = dot_nibbles((vi)((vu)sum << 8), q.first, q.odd, x + step);
    sum = dot_nibbles((vi)((vu)sum << 8), q.first, q.odd, x + 2 * step);
    return __builtin_convertvector(sum, vf);
  } else {
    const vi high = dot_wide<bits>((vi)((vu)dot_wide<bits>(vi{}, q.first, x) << 8), q.first, x + step);
    const vi low = dot_wide<bits>(vi{}, q.first, x + 2 * step);
    return fma(__builtin_convertvector(high, vf), broadcast(256), __builtin_convertvector(low, vf));
  }
}

// Lane by lane sum(q * x) of a vector of weights and rounded values of x.
template <int bits>
MLXEFF_INLINE vf dot_int8(const Codes<bits>& q, const int8_t* x) {
  const vi first = dot_wide<bits>(vi{}, q.first, x);
  return __builtin_convertvector(bits == 4 ? dot_wide<bits>(first, q.odd, x + VL * 4) : first, vf);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
