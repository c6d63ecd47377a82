// The decoder of SeedLM blocks: Blocks holds one block in each vector lane.
//
// A weight of a block is 2^e / 32767 * sum over i of q[i] * (V[i] - 32768), where each state V[i] is a window of 16
// bits of the seed's bit stream (seedlm_stream.h). The P windows of a column begin at adjacent bits, so one shift moves
// G = P of them into the mantissa of a float, with the last window at the most significant bit. Clearing the other bits
// and setting an exponent turns window i into the float f[i] = 2^(G - 1 - i) + V[i] / 65536. Subtracting centre(i), the
// value of f[i] for V[i] = 32768, leaves (V[i] - 32768) / 65536. Every partial sum of q[i] * f[i] and -q[i] * centre(i)
// is an integer below 2^24 in units of 2^-16 and therefore exact in fp32. One multiplication by 65536 * fl32(2^e /
// 32767) then gives the weight, with a single rounding.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/simd.h"
#include "seedlm/seedlm_layout.h"
#include "seedlm/seedlm_stream.h"

namespace mlxeff {
namespace MLXEFF_ISA {

typedef uint32_t vu __attribute__((vector_size(VL * 4)));

#if defined(__AVX512F__)
constexpr StreamTables<4> stream_tables;
#elif defined(__AVX2__)
constexpr StreamTables<3> stream_tables;
#else
constexpr StreamTables<8> stream_tables;
#endif

// Returns, for the seed in the low 16 bits of each lane, 32 bits of its stream; StreamTables defines which bits each
// `word` holds.
template <int word>
MLXEFF_INLINE vu stream_word(vu seeds) {
  const auto& table = stream_tables.word[word];
#if defined(__AVX512F__)
  const __m512i r = (__m512i)seeds;
  const __m512i a = _mm512_permutexvar_epi32(r, _mm512_load_si512(table[0]));
  const __m512i b = _mm512_permutexvar_epi32(_mm512_srli_epi32(r, 4), _mm512_load_si512(table[1]));
  const __m512i c = _mm512_permutexvar_epi32(_mm512_srli_epi32(r, 8), _mm512_load_si512(table[2]));
  const __m512i d = _mm512_permutexvar_epi32(_mm512_srli_epi32(r, 12), _mm512_load_si512(table[3]));
  return (vu)_mm512_xor_si512(_mm512_ternarylogic_epi32(a, b, c, 0x96), d);
#elif defined(__AVX2__)
  vu bits = {};
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    const vu group = i == 5 ? seeds >> 15 & 1u
                            : seeds >> (3 * i);  // the permute instruction uses only the low three bits of the index
    bits ^= (vu)_mm256_permutevar8x32_epi32(_mm256_load_si256((const __m256i*)table[i]), (__m256i)group);
  }
  return bits;
#else
  vu bits;
  for (int i = 0; i < VL; ++i) bits[i] = table[0][seeds[i] & 255] ^ table[1][seeds[i] >> 8 & 255];
  return bits;
#endif
}

// Loads `count` 16-bit values into the lanes, zero-extended; the remaining lanes are zero.
MLXEFF_INLINE vu load_u16(const uint16_t* p, int64_t count) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), p));
#else
  uint16_t values[VL] = {};
  if (count >= VL) memcpy(values, p, sizeof values);
  else memcpy(values, p, size_t(count) * 2);
  vu out;
  for (int i = 0; i < VL; ++i) out[i] = values[i];
  return out;
#endif
}
MLXEFF_INLINE vu load_u32(const uint32_t* p, int64_t count) {
#if defined(__AVX512F__)
  return (vu)_mm512_maskz_loadu_epi32(first_lanes(count), p);
#else
  vu out = {};
  if (count >= VL) memcpy(&out, p, sizeof out);
  else memcpy(&out, p, size_t(count) * 4);
  return out;
#endif
}
// Loads `count` nibbles, the low nibble of a byte first, into the low four bits of the lanes. The higher bits are
// undefined.
MLXEFF_INLINE vu load_nibbles(const uint8_t* p, int64_t count) {
  uint8_t bytes[VL / 2] = {};
  if (count >= VL) memcpy(bytes, p, sizeof bytes);
  else memcpy(bytes, p, size_t(count + 1) / 2);
#if defined(__AVX512F__)
  uint64_t all;
  memcpy(&all, bytes, 8);
  const __m128i once = _mm_cvtsi64_si128(int64_t(all));
  const __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(once, once));
  return (vu)_mm512_mask_srli_epi32(twice, 0xaaaa, twice, 4);
#else
  vu out;
  for (int i = 0; i < VL; ++i) out[i] = uint32_t(bytes[i / 2]) >> (i % 2 * 4);
  return out;
#endif
}

// The value of f[i] for V[i] = 32768.
template <int G>
constexpr float centre(int i) {
  return float(1 << (G - 1 - i)) + 0.5f;
}

template <int C, int P>
struct Blocks {
  static constexpr int stride = P == 3 ? 8 : 16, words = P == 3 ? 2 : C / 4;
  vu word[words];  // word[j] = bits stride * j … stride * j + 31 of the stream
  vu packed;       // coefficient p at bit 4 p
  vu code;         // exponent code in the low four bits

  // Loads the blocks [j, j + VL) of row n; j must be even. Lanes beyond the row's last block have coefficients 0.
  MLXEFF_INLINE Blocks of_row(const mlxeff_seedlm_weight& w, int64_t n, int64_t j, const SeedRowBlocks& a_row) {
    const int64_t at = n * a_row.stride + j, count = min_of(VL, a_row.used - j);
    if constexpr (P == 3) {
      const vu block = load_u32(static_cast<const uint32_t*>(w.seeds) + at, count);
      return unpack(block, block >> 16, block >> 28);
    }
    return unpack(load_u16(static_cast<const uint16_t*>(w.seeds) + at, count), load_u16(w.coefficients + at, count),
                  load_nibbles(w.exponents + at / 2, count));
  }
  // Loads block j of the rows n, n + 1, …; lanes from `rows` on repeat the last row.
  MLXEFF_INLINE Blocks of_rows(const mlxeff_seedlm_weight& w, int64_t n, int64_t rows, int64_t j,
                               const SeedRowBlocks& a_row) {
    uint32_t seeds[VL], packed[VL], code[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      const int64_t at = (n + min_of(i, rows - 1)) * a_row.stride + j;
      if constexpr (P == 3) {
        seeds[i] = static_cast<const uint32_t*>(w.seeds)[at];
      } else {
        seeds[i] = static_cast<const uint16_t*>(w.seeds)[at];
        packed[i] = w.coefficients[at];
        code[i] = uint32_t(w.exponents[at / 2]) >> (at % 2 * 4);
      }
    }
    const vu first = from_array(seeds);
    if constexpr (P == 3) return unpack(first, first >> 16, first >> 28);
    return unpack(first, from_array(packed), from_array(code));
  }

  // Returns the stream shifted so that window n begins at bit 8 - G. Window n + G - 1 then begins at bit 7 and fills
  // the leading 16 of the 23 mantissa bits. All G windows must belong to one column.
  template <int G>
  inline __attribute__((always_inline)) vu windows(int n) const {
    const int holder = P == 3 ? n / 15 : n / 16, shift = n - holder * stride - (8 - G);
    return shift < 0 ? word[holder] << -shift : word[holder] >> shift;
  }
  // Returns f[i], given the result of windows().
  template <int G>
  static inline __attribute__((always_inline)) vf fraction(vu windows, int i) {
    const int mask = 0xffff << (8 - G + i), exponent = (127 + G - 1 - i) << 23;
#if defined(__AVX512F__)
    return (vf)_mm512_ternarylogic_epi32((__m512i)windows, _mm512_set1_epi32(mask), _mm512_set1_epi32(exponent), 0xea);
#else
    return (vf)((windows & uint32_t(mask)) | uint32_t(exponent));
#endif
  }
  inline __attribute__((always_inline)) vf coefficient(int p) const {
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return (vf)_mm512_permutexvar_ps((__m512i)(packed >> (4 * p)), table);
#else
    return __builtin_convertvector((vi)(packed << (28 - 4 * p)) >> 28, vf);
#endif
  }
  // Returns fl32(2^e / 32767) * unit, where `unit` is a power of two.
  inline __attribute__((always_inline)) vf scale(const mlxeff_seedlm_weight& w, float unit = 65536.0f) const {
    const uint32_t lowest = uint32_t(w.exponent_bias - 8 + 127);
#if defined(__AVX512F__)
    const vu codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vf table =
        (vf)((codes + lowest) << 23) *
        (unit * (1.0f / 32767.0f));  // the scales of the exponent codes, the same for all blocks of a matrix
    return (vf)_mm512_permutexvar_ps((__m512i)code, (__m512)table);
#else
    return (vf)(((code & 15u) + lowest) << 23) * (unit * (1.0f / 32767.0f));
#endif
  }

 private:
  MLXEFF_INLINE vu from_array(const uint32_t* values) {
    vu v;
    memcpy(&v, values, sizeof v);
    return v;
  }
  MLXEFF_INLINE Blocks unpack(vu seeds, vu packed, vu code) {
    Blocks b;
    b.packed = packed;
    b.code = code;
    b.word[1] = stream_word<P == 3 ? 0 : 1>(seeds);
    b.word[0] = b.word[1] << stride | (seeds & ((1u << stride) - 1));
    if constexpr (words == 3) b.word[2] = stream_word<2>(seeds);
    return b;
  }
};

// Calls body(c, weights) for each column c of a block; `weights` holds the decoded weights of that column in all lanes.
template <int C, int P, class Body>
MLXEFF_INLINE void decode_columns(const Blocks<C, P>& blocks, const mlxeff_seedlm_weight& w, Body body) {
  vf q[P], offset = zero();
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    q[p] = blocks.coefficient(p);
    offset = fma(q[p], broadcast(-centre<P>(p)), offset);
  }
  const vf scale = blocks.scale(w);
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) {
    const vu windows = blocks.template windows<P>(c * P);
    vf sum = offset;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum = fma(q[p], blocks.template fraction<P>(windows, p), sum);
    body(c, sum * scale);
  }
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
