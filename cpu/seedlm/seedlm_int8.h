// SeedLM products with few rows of x in the mode INT8, for CPUs with AVX-512 VBMI. They process one row of W at a time,
// with 16 of its blocks in the lanes:
//
//   y = sum over blocks of 2^e / 32767 * s * sum over p of q[p] * T[p]
//   T[p] = sum over c of X[c] * (256 * v[c][p] + 127.5 - 32768)
//
// X is x / s rounded to int8, |X| <= 127, with one scale s for each block of x; v is the leading byte of the state V.
// The instruction vpmultishiftqb extracts the v of four columns from the stream of each block, and vpdpbusd multiplies
// them by X and adds the products to the block's sum. No weight is formed, and only the sums are converted to float. x
// is stored in chunks of 16 blocks:
//
//   int8 X [C / 4][block][4 columns], int32 initial values of the sums [block], float s [block]
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "seedlm/seedlm_few.h"

#if defined(__AVX512F__)
#define MLXEFF_VBMI __attribute__((target("avx512vbmi")))

namespace mlxeff {
namespace MLXEFF_ISA {

MLXEFF_INLINE int64_t int8_chunk_bytes(const SeedArgs& args) { return args.w.columns * VL + 8 * VL; }

MLXEFF_INLINE vi
round_to_int(vf v) {  // rounds |v| < 2^22 to nearest: adding 1.5 * 2^23 leaves the integer in the low bits of the sum
  const vf magic = broadcast(0x1.8p23f);
  return (vi)(v + magic) - (vi)magic;
}

static void prepare_int8(const SeedArgs& args, const void* x, char* out) {
  const int C = args.w.columns;
  each_chunk(args, x, [&](int64_t i, const float* columns) {
    char* const chunk = out + i * int8_chunk_bytes(args);
    vf largest = zero();
    for (int c = 0; c < C; ++c) largest = max(largest, abs(load(columns + c * VL)));
    const vf inverse = largest > 1e-35f ? 127.0f / largest : zero();  // smaller values could make the inverse infinite
    vi total = {};
    for (int c = 0; c < C; c += 4) {
      vi four = {};
      for (int b = 0; b < 4; ++b) {
        const vi rounded = round_to_int(load(columns + (c + b) * VL) * inverse);
        total += rounded;
        four |= (rounded & 255) << (8 * b);
      }
      memcpy(chunk + c * VL, &four, sizeof four);
    }
    const vi start = -round_to_int(__builtin_convertvector(total, vf) * ((32768 - 127.5f) / 256));
    memcpy(chunk + C * VL, &start, sizeof start);
    store(reinterpret_cast<float*>(chunk + C * VL + 4 * VL), largest * (1 / 127.0f));
  });
}

// The bit positions for vpmultishiftqb: where the leading bytes of window p lie in the streams of two blocks, for four
// columns from column 4 * quarter on.
template <int P>
MLXEFF_INLINE __m512i byte_places(int p, int quarter) {
  uint64_t places = 0;
  for (int i = 0; i < 8; ++i) {
    const int column = P == 3 ? 4 * quarter + i % 4 : i % 4,
              begin = P == 3 ? 0 : 8;  // word[1] of P = 3 begins at bit 8
    places |= uint64_t(i / 4 * 32 + column * P + p + begin) << (8 * i);
  }
  return _mm512_set1_epi64(int64_t(places));
}

template <int C, int P, int M>
MLXEFF_VBMI static int run_int8(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  constexpr int quarters = C / 4;
  const mlxeff_seedlm_weight w = args.w;
  const SeedRowBlocks a_row = seed_row_blocks(w);
  const int64_t step = C * VL + 8 * VL, ldx = args.ldx_few;
  for (int64_t n = n_begin; n < n_end; ++n) {
    vf totals[M] = {};
    const char* x = args.x_int8;
    for (int64_t j = 0; j < a_row.used; j += VL, x += step) {
      const Blocks<C, P> blocks = Blocks<C, P>::of_row(w, n, j, a_row);
      __m512i bytes[P][quarters];
      vf q[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        q[p] = blocks.coefficient(p);
#pragma GCC unroll 3
        for (int i = 0; i < quarters; ++i)
          bytes[p][i] =
              _mm512_multishift_epi64_epi8(byte_places<P>(p, P == 3 ? i : 0), (__m512i)blocks.word[P == 3 ? 1 : i]);
      }
      const vf scale = blocks.scale(w, 256.0f);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const char* const row = x + m * ldx;
        vf value = zero();
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          __m512i dot = _mm512_loadu_si512(row + C * VL);
#pragma GCC unroll 3
          for (int i = 0; i < quarters; ++i)
            dot = _mm512_dpbusd_epi32(dot, bytes[p][i], _mm512_loadu_si512(row + i * 4 * VL));
          const vf product = (vf)_mm512_cvtepi32_ps(dot);
          value = p == 0 ? q[0] * product : fma(q[p], product, value);
        }
        totals[m] = fma(value, scale * load(reinterpret_cast<const float*>(row + C * VL + 4 * VL)), totals[m]);
      }
    }
    for (int m = 0; m < M; ++m) store_sum(sum(totals[m]), args.y, m, n);
  }
  return MLXEFF_OK;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
#endif
