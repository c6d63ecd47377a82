// Decoding of MLX's packed weights with one row of W in each vector lane.
//
// A strip is VL consecutive rows. Words at the same position of the VL rows are brought into one vector by 4 x 4
// transpositions inside the 128-bit parts, after which every bit width is shifts and masks by constants, and the
// products of a strip need no horizontal sums. The unit is a block of 32 values: `bits` words of a row.
//
// To be included by per-level sources only.
#pragma once
#include "base/simd.h"

namespace mlxeff {
namespace MLXEFF_ISA {

typedef uint32_t vu __attribute__((vector_size(VL * 4)));

#if defined(__AVX512F__)
MLXEFF_INLINE vu load_quads(const char* p, int64_t stride, int i) {
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(p + i * stride)));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, _mm_loadu_si128((const __m128i*)(p + (4 + i) * stride)));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, _mm_loadu_si128((const __m128i*)(p + (8 + i) * stride)));
  return (vu)_mm512_mask_broadcast_i32x4(v, 0xf000, _mm_loadu_si128((const __m128i*)(p + (12 + i) * stride)));
}
MLXEFF_INLINE void transpose_quads(vu v[4]) {
  const __m512i a = _mm512_unpacklo_epi32((__m512i)v[0], (__m512i)v[1]),
                b = _mm512_unpackhi_epi32((__m512i)v[0], (__m512i)v[1]);
  const __m512i c = _mm512_unpacklo_epi32((__m512i)v[2], (__m512i)v[3]),
                d = _mm512_unpackhi_epi32((__m512i)v[2], (__m512i)v[3]);
  v[0] = (vu)_mm512_unpacklo_epi64(a, c), v[1] = (vu)_mm512_unpackhi_epi64(a, c);
  v[2] = (vu)_mm512_unpacklo_epi64(b, d), v[3] = (vu)_mm512_unpackhi_epi64(b, d);
}
#elif defined(__AVX2__)
MLXEFF_INLINE vu load_quads(const char* p, int64_t stride, int i) {
  const __m128i low = _mm_loadu_si128((const __m128i*)(p + i * stride));
  return (vu)_mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                     _mm_loadu_si128((const __m128i*)(p + (4 + i) * stride)), 1);
}
MLXEFF_INLINE void transpose_quads(vu v[4]) {
  const __m256i a = _mm256_unpacklo_epi32((__m256i)v[0], (__m256i)v[1]),
                b = _mm256_unpackhi_epi32((__m256i)v[0], (__m256i)v[1]);
  const __m256i c = _mm256_unpacklo_epi32((__m256i)v[2], (__m256i)v[3]),
                d = _mm256_unpackhi_epi32((__m256i)v[2], (__m256i)v[3]);
  v[0] = (vu)_mm256_unpacklo_epi64(a, c), v[1] = (vu)_mm256_unpackhi_epi64(a, c);
  v[2] = (vu)_mm256_unpacklo_epi64(b, d), v[3] = (vu)_mm256_unpackhi_epi64(b, d);
}
#else
MLXEFF_INLINE vu load_quads(const char* p, int64_t stride, int i) {
  vu v;
  memcpy(&v, p + i * stride, sizeof v);
  return v;
}
MLXEFF_INLINE void transpose_quads(vu v[4]) {
  const vu a = {v[0][0], v[1][0], v[2][0], v[3][0]}, b = {v[0][1], v[1][1], v[2][1], v[3][1]};
  const vu c = {v[0][2], v[1][2], v[2][2], v[3][2]}, d = {v[0][3], v[1][3], v[2][3], v[3][3]};
  v[0] = a, v[1] = b, v[2] = c, v[3] = d;
}
#endif

// words[j] lane r = word j of row r, for 4 words of each row at p + r * stride (bytes).
MLXEFF_INLINE void load_words4(const char* p, int64_t stride, vu words[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) words[i] = load_quads(p, stride, i);
  transpose_quads(words);
}

// Fewer than four words, which may be the last of the matrix: no byte beyond them is read.
template <int count>
MLXEFF_INLINE void load_words_few(const char* p, int64_t stride, vu* words) {
#pragma GCC unroll 3
  for (int j = 0; j < count; ++j)
#pragma GCC unroll 16
    for (int r = 0; r < VL; ++r) {
      uint32_t word;
      memcpy(&word, p + r * stride + j * 4, 4);
      words[j][r] = word;
    }
}

template <int bits>
struct Block {
  static constexpr uint32_t mask = (1u << bits) - 1;
  vu words[bits];

  MLXEFF_INLINE Block load(const char* p, int64_t stride) {
    Block block;
    if constexpr (bits >= 4) load_words4(p, stride, block.words);
    if constexpr (bits == 8) load_words4(p + 16, stride, block.words + 4);
    else if constexpr (bits % 4 != 0) load_words_few<bits % 4>(p + bits / 4 * 16, stride, block.words + bits / 4 * 4);
    return block;
  }
  // Value i of the block, 0 <= i < 32.
  inline __attribute__((always_inline)) vu value(int i) const {
    const int offset = i * bits, word = offset / 32, shift = offset % 32;
    vu v = words[word] >> shift;
    if (shift + bits > 32) v |= words[word + 1] << (32 - shift);
    return shift + bits == 32 ? v : v & mask;
  }
  inline __attribute__((always_inline)) vf value_f32(int i) const {
#if defined(__AVX512F__)
    if constexpr (bits == 4) {  // the lookup reads the low four bits of the index only, so no mask is needed
      const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      return (vf)_mm512_permutexvar_ps((__m512i)(words[i / 8] >> (i % 8 * 4)), table);
    }
#endif
    return __builtin_convertvector((vi)value(i), vf);
  }
  // Four values as four bytes of each lane, 0 <= i < 8. Byte b is value 8 * (i / 2) + i % 2 + 2 * b for 4 bits,
  // 16 * (i / 4) + i % 4 + 4 * b for 2 bits, else 4 * i + b.
  inline __attribute__((always_inline)) vu bytes(int i) const {
    if constexpr (bits == 8) return words[i];
    if constexpr (bits == 4) return (words[i / 2] >> (i % 2 * 4)) & 0x0f0f0f0fu;
    if constexpr (bits == 2) return (words[i / 4] >> (i % 4 * 2)) & 0x03030303u;
    return value(4 * i) | value(4 * i + 1) << 8 | value(4 * i + 2) << 16 | value(4 * i + 3) << 24;
  }
};

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
