// Weights of 5 and 6 bits as bytes, read from the packed words of a row.
//
// To be included by per-level sources only.
#pragma once
#include "products/qmatmul_decode.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// Weights of 5 or 6 bits are spread 16 at a time: the two of each pair, which lie within two bytes, go to the two bytes
// of a 16-bit lane, by a shuffle of bytes, a shift in each lane and two masks. Of 32 weights, 4 * bits bytes, the first
// 16 are taken from the first 16 bytes and the others from the last 16, so that nothing else is read.
constexpr int pair_byte(int bits, int byte) { return byte / 2 * 2 * bits / 8 + byte % 2; }
constexpr int late_byte(int bits, int byte) { return pair_byte(bits, byte) + 16 - 2 * bits; }
#define MLXEFF_PAIR_BYTES(f, bits)                                                                            \
  f(bits, 0), f(bits, 1), f(bits, 2), f(bits, 3), f(bits, 4), f(bits, 5), f(bits, 6), f(bits, 7), f(bits, 8), \
      f(bits, 9), f(bits, 10), f(bits, 11), f(bits, 12), f(bits, 13), f(bits, 14), f(bits, 15)
#if defined(__AVX2__)
template <int bits>
MLXEFF_INLINE __m256i spread_codes(const char* p) {
  const __m256i places = _mm256_setr_epi8(MLXEFF_PAIR_BYTES(pair_byte, bits), MLXEFF_PAIR_BYTES(late_byte, bits));
  const __m128i first = _mm_loadu_si128((const __m128i*)p), last = _mm_loadu_si128((const __m128i*)(p + 4 * bits - 16));
  __m256i v = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(first), last, 1), places);
  constexpr uint64_t lifts = bits == 5 ? 0x0001000400100040u : 0x0001001000010010u;  // 2^(6 or 4 - shift)
  v = _mm256_srli_epi16(_mm256_mullo_epi16(v, _mm256_set1_epi64x(int64_t(lifts))), bits == 5 ? 6 : 4);
  const __m256i low = _mm256_and_si256(v, _mm256_set1_epi16((1 << bits) - 1));
  const __m256i high = _mm256_and_si256(_mm256_slli_epi16(v, 8 - bits), _mm256_set1_epi16(((1 << bits) - 1) << 8));
  return _mm256_or_si256(low, high);
}
#endif
// A vector of the weights of a row, from value k on, a multiple of their number; zeros from value K on.
template <int bits>
MLXEFF_INLINE vu load_spread(const char* row, int64_t k, [[maybe_unused]] int64_t K) {
  const char* const p = row + k / 32 * 4 * bits;
#if defined(__AVX512F__)
  const __m256i first = spread_codes<bits>(p), second = k + 32 < K ? spread_codes<bits>(p + 4 * bits) : __m256i{};
  return (vu)_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
#elif defined(__AVX2__)
  return (vu)spread_codes<bits>(p);
#elif defined(__ARM_FEATURE_DOTPROD)
  static const uint8_t early[16] = {MLXEFF_PAIR_BYTES(pair_byte, bits)};
  static const uint8_t late[16] = {MLXEFF_PAIR_BYTES(late_byte, bits)};
  const bool odd = k % 32 != 0;
  const uint8x16_t bytes = vld1q_u8((const uint8_t*)p + (odd ? 4 * bits - 16 : 0));
  const uint16x8_t pairs = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(odd ? late : early)));
  constexpr uint64_t places = bits == 5 ? 0x0006000400020000u : 0x0004000000040000u;  // of the pairs in their two bytes
  const int16x8_t shifts = vnegq_s16(vreinterpretq_s16_u64(vdupq_n_u64(places)));
  const uint16x8_t v = vshlq_u16(pairs, shifts);
  const uint16x8_t low = vandq_u16(v, vdupq_n_u16((1 << bits) - 1));
  const uint16x8_t high = vandq_u16(vshlq_n_u16(v, 8 - bits), vdupq_n_u16(((1 << bits) - 1) << 8));
  return (vu)vorrq_u16(low, high);
#else
  return vu{};  // without byte products there are no row kernels for these weights
#endif
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
