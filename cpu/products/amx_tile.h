// The bf16 matrix product on Intel AMX tiles: c [32][32] += a [32][K] @ b, in four fp32 tiles of 16 x 16.
//
//   a  row-major bf16; a tile is 16 rows x 32 values
//   b  panel [K / 2][32][2]: the two values of a k-pair lie side by side, as TDPBF16PS wants them
//   c  fp32, rows of ldc
//
// The instruction TDPBF16PS multiplies bf16 values and accumulates in fp32, treating subnormals as zero. If
// MLXEFF_AMX_EMULATED is defined, the tiles are arrays in memory, so that the surrounding code can be tested on any
// machine.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "base/simd.h"

#if defined(__AMX_TILE__)
#define MLXEFF_AMX 1

namespace mlxeff {
namespace MLXEFF_ISA {

#if defined(MLXEFF_AMX_EMULATED)

struct EmulatedTile {
  char rows[16][64];
};
static thread_local EmulatedTile emulated_tiles[8];

MLXEFF_INLINE void amx_begin() {}
MLXEFF_INLINE void amx_end() {}
template <int t>
MLXEFF_INLINE void tile_zero() {
  memset(&emulated_tiles[t], 0, sizeof(EmulatedTile));
}
template <int t>
MLXEFF_INLINE void tile_load(const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(emulated_tiles[t].rows[r], static_cast<const char*>(p) + r * stride, 64);
}
template <int t>
MLXEFF_INLINE void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(p) + r * stride, emulated_tiles[t].rows[r], 64);
}
template <int c, int a, int b>
MLXEFF_INLINE void tile_product() {
  float sum[16][16];
  bf16 left[16][32], right[16][32];
  memcpy(sum, &emulated_tiles[c], 1024), memcpy(left, &emulated_tiles[a], 1024),
      memcpy(right, &emulated_tiles[b], 1024);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n)
      for (int k = 0; k < 32; ++k) sum[m][n] += to_float(left[m][k]) * to_float(right[k / 2][n * 2 + k % 2]);
  memcpy(&emulated_tiles[c], sum, 1024);
}

#else

// Configures eight tiles of 16 rows x 64 bytes. The assembly statement declares the whole configuration as its input,
// because a compiler that sees only the first bytes used removes the stores to the others.
MLXEFF_INLINE void amx_begin() {
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } configuration;
  memset(&configuration, 0, sizeof configuration);
  configuration.palette = 1;
  for (int t = 0; t < 8; ++t) configuration.row_bytes[t] = 64, configuration.rows[t] = 16;
  __asm__ volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
}
MLXEFF_INLINE void amx_end() { __asm__ volatile("tilerelease" : : : "memory"); }
template <int t>
MLXEFF_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
}
template <int t>
MLXEFF_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(t), "r"(p), "r"(stride) : "memory");
}
template <int t>
MLXEFF_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(t), "r"(p), "r"(stride) : "memory");
}
template <int c, int a, int b>
MLXEFF_INLINE void tile_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

#endif

// Must be called between amx_begin and amx_end. K must be a multiple of 32, and a and c must have 32 rows.
static inline void amx_tile(const bf16* a, int64_t lda, const bf16* b, int64_t K, float* c, int64_t ldc,
                            bool accumulate) {
  if (accumulate) {
    tile_load<0>(c, ldc * 4), tile_load<1>(c + 16, ldc * 4);
    tile_load<2>(c + 16 * ldc, ldc * 4), tile_load<3>(c + 16 * ldc + 16, ldc * 4);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (int64_t k = 0; k < K; k += 32) {
    tile_load<4>(a + k, lda * 2);
    tile_load<6>(b + k * 32, 128);
    tile_product<0, 4, 6>();
    tile_load<7>(b + k * 32 + 32, 128);
    tile_product<1, 4, 7>();
    tile_load<5>(a + 16 * lda + k, lda * 2);
    tile_product<2, 5, 6>();
    tile_product<3, 5, 7>();
  }
  tile_store<0>(c, ldc * 4), tile_store<1>(c + 16, ldc * 4);
  tile_store<2>(c + 16 * ldc, ldc * 4), tile_store<3>(c + 16 * ldc + 16, ldc * 4);
}

// Rounds two fp32 vectors, rows k (`even`) and k + 1 (`odd`) of the same 16 columns, to bf16 and stores them
// interleaved, as a panel holds them.
MLXEFF_INLINE void store_pairs(bf16* out, vf even, vf odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd)), 16);
  _mm512_storeu_si512(out, _mm512_or_si512(low, high));
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
#endif
