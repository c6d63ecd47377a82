// Quantised matmul, many rows of x: weights are decoded once into a panel of 2 * VL columns in the cache, which then
// meets all rows of x in register-blocked tiles.
//
//   EXACT  panel of fp32 weights q * scale + bias, 256 values of K at a time; products and sums in fp32
//   INT8   panel of the integers q, eight values of K together; sums of a group in integers, over groups in fp32 (the
//   formula
//          and the rounding of x are those of qmatmul_strip.h)
//   BF16   (AMX) panel of weights rounded to bf16, x rounded to bf16, sums in fp32
//
// To be included by per-level sources only.
#pragma once
#include "products/qmatmul_strip.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// The strips of the columns [n, n_end), at most two; `count` tells how many hold columns.
struct StripPair {
  Strip strip[2];
  int count;
};
static StripPair load_strip_pair(const mlxeff_qweight& w, int64_t n, int64_t n_end, float bias_shift, float* buffer) {
  StripPair pair = {};
  Prefetcher<true> next;
  next.start(w, n);
  for (; pair.count < 2 && n + pair.count * VL < n_end; ++pair.count) {
    const int64_t first = n + pair.count * VL;
    pair.strip[pair.count] =
        load_strip(w, first, min_of(VL, n_end - first), bias_shift, buffer + pair.count * strip_floats(w), next);
  }
  if (pair.count == 1) pair.strip[1] = pair.strip[0];  // computed twice, stored once
  return pair;
}

// Calls body(k, value k, value k + 1) for even k in [k_begin, k_end): the dequantised weights of one strip.
template <int bits, class Body>
MLXEFF_INLINE void decode_strip(const mlxeff_qweight& w, const Strip& strip, int64_t k_begin, int64_t k_end,
                                Body body) {
  for (int64_t k = k_begin; k < k_end; k += 32) {
    const vf scale = load(strip.scales + k / w.group * VL), bias = load(strip.biases + k / w.group * VL);
    const Block<bits> block = Block<bits>::load(strip.packed + k * bits / 8, strip.stride);
#pragma GCC unroll 16
    for (int i = 0; i < 32; i += 2)
      body(k + i, fma(block.value_f32(i), scale, bias), fma(block.value_f32(i + 1), scale, bias));
  }
}

template <int bits>
static int run_panel_exact(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_qweight& w = args.w;
  float* const strips = static_cast<float*>(scratch(Scratch::strip, size_t(2 * strip_floats(w)) * 4));
  if (!strips) return MLXEFF_NO_MEMORY;
  StripPair pair = {};
  return panel_product(args.x_f32, args.ldx_f32, args.M, w.K, n_begin, n_end, args.y,
                       [&](int64_t n, int64_t k, int64_t k_end, float* panel) {
                         if (k == 0) pair = load_strip_pair(w, n, n_end, 0, strips);
                         for (int j = 0; j < 2; ++j)
                           decode_strip<bits>(w, pair.strip[j], k, k_end, [&](int64_t i, vf even, vf odd) {
                             store(panel + (i - k) * panel_width + j * VL, even);
                             store(panel + (i + 1 - k) * panel_width + j * VL, odd);
                           });
                       });
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int int8_tile_rows = 6;
#else
constexpr int int8_tile_rows = 2;
#endif

// y [rows][panel_width] = the int8 products of `rows` rows of x, from row m on, with a panel of bytes.
template <int bits, int rows>
static void int8_tile(const QmmArgs& args, int64_t m, const char* panel, const StripPair& pair, float* y) {
  const int64_t group = args.w.group, groups = args.w.K / group, ldx = padded_stride(args.w.K, 1);
  const int8_t* const x = args.x_int8 + m * ldx;
  vf sum[rows][2];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = zero();
  for (int64_t g = 0; g < groups; ++g) {
    Int8Sums<rows> part[2];
    part[0].clear(), part[1].clear();
    for (int64_t k = g * group; k < (g + 1) * group; k += 8) {
      part[0].template add<bits>(load_eight(panel + k * panel_width), x + k, ldx);
      part[1].template add<bits>(load_eight(panel + k * panel_width + VL * 8), x + k, ldx);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const vf scale = load(pair.strip[j].scales + g * VL), bias = load(pair.strip[j].biases + g * VL);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const vf product = part[j].row(r) * broadcast(args.x_scale[(m + r) * groups + g]);
        sum[r][j] = fma(scale, product, fma(bias, broadcast(args.x_sum[(m + r) * groups + g]), sum[r][j]));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < 2; ++j) store(y + r * panel_width + j * VL, sum[r][j]);
}

typedef void Int8Tile(const QmmArgs&, int64_t, const char*, const StripPair&, float*);

template <int bits>
static int run_panel_int8(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  static Int8Tile* const tiles[] = {int8_tile<bits, 1>, int8_tile<bits, 2>,
#if defined(__AVX512F__) || defined(__aarch64__)
                                    int8_tile<bits, 3>, int8_tile<bits, 4>, int8_tile<bits, 5>,
                                    int8_tile<bits, 6>
#endif
  };
  const mlxeff_qweight& w = args.w;
  float* const strips = static_cast<float*>(scratch(Scratch::strip, size_t(2 * strip_floats(w)) * 4));
  char* const panel = static_cast<char*>(scratch(Scratch::panel, size_t(w.K * panel_width)));
  if (!strips || !panel) return MLXEFF_NO_MEMORY;
  const int64_t height = ceil_div(args.M, ceil_div(args.M, int8_tile_rows));
  for (int64_t n = n_begin; n < n_end; n += panel_width) {
    const StripPair pair = load_strip_pair(w, n, n_end, byte_offset<bits>, strips);
    for (int j = 0; j < 2; ++j)
      for (int64_t k = 0; k < w.K; k += 32) {
        const Block<bits> block = Block<bits>::load(pair.strip[j].packed + k * bits / 8, pair.strip[j].stride);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Eight q = eight_values(block, i);
          memcpy(panel + (k + i * 8) * panel_width + j * int64_t(sizeof q), &q, sizeof q);
        }
      }
    for (int64_t m = 0; m < args.M; m += height) {
      float y[int8_tile_rows * panel_width];
      const int64_t rows = min_of(height, args.M - m);
      tiles[rows - 1](args, m, panel, pair, y);
      store_block(y, panel_width, rows, min_of(panel_width, n_end - n), args.y, m, n);
    }
  }
  return MLXEFF_OK;
}

#if defined(MLXEFF_AMX)
template <int bits>
static int run_panel_amx(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_qweight& w = args.w;
  float* const strips = static_cast<float*>(scratch(Scratch::strip, size_t(2 * strip_floats(w)) * 4));
  if (!strips) return MLXEFF_NO_MEMORY;
  return amx_product(args.x_bf16, padded_stride(w.K, 2), args.M, w.K, n_begin, n_end, args.y,
                     [&](int64_t n, int64_t k, int64_t k_end, bf16* panel) {
                       const StripPair pair = load_strip_pair(w, n, n_end, 0, strips);
                       for (int j = 0; j < 2; ++j)
                         decode_strip<bits>(w, pair.strip[j], k, k_end, [&](int64_t i, vf even, vf odd) {
                           store_pairs(panel + (i - k) * panel_width + j * VL * 2, even, odd);
                         });
                     });
}
#endif

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
