// Quantised matmul, one row of x, 4- and 8-bit weights, and with byte products 5- and 6-bit ones: the product of a
// decoding step, limited by reading W.
//
// W is read in the order of its addresses, a row at a time, with the values of K in the lanes and a horizontal sum at
// the end of each row. (The strips of qmatmul_strip.h would need the scales transposed, a third of the work here.)
//
//   EXACT  y[n] = sum over groups of scale * sum(q * x) + bias * sum(x). Where there are byte products, x is rounded to
//   24 bits
//          of the group's largest |x|, an error of half a unit in the last place of that, and kept as three signed
//          bytes: sums of four or eight products q * x are exact in integers, and scaled and added in fp32. x is stored
//          as [vector][byte, highest first][even, odd (4 bits)]. Elsewhere in fp32: a vector of VL words holds 32 /
//          bits values a lane, value j of every lane is q[j] = word >> (j * bits), so x is stored as [vector][j][lane].
//   INT8   the formula and rounding of qmatmul_strip.h; sums of 32 values in integers. 4-bit weights give the even
//   values of
//          a vector's bytes by a mask and the odd ones by a shift, so x is stored as [vector][even, odd].
//
// Weights of 5 and 6 bits are spread to bytes as they are read, and are then multiplied like those of 8 bits.
//
// To be included by per-level sources only.
#pragma once
#include "products/qmatmul_lanes.h"
#include "products/qmatmul_strip.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// scales[g] = scale of group g of a row, times its factor if there are any; returns bias * x_sum, whose lanes are to be
// summed.
template <class T>
MLXEFF_INLINE vf load_row_scales(const T* row_scales, const T* row_biases, int64_t groups, const float* x_sum,
                                 float bias_shift, const float* factors, float* scales) {
  vf total = zero();
  for (int64_t g = 0; g < groups; g += VL) {
    const vf scale = load_up_to(row_scales + g, groups - g), bias = load_up_to(row_biases + g, groups - g);
    total = fma(bias_shift * scale + bias, load(x_sum + g), total);
    store(scales + g, factors ? scale * load(factors + g) : scale);
  }
  return total;
}

template <int bits, int group>
static float row_exact(const QmmArgs& args, const char* packed, int64_t distance, const float* scales, vf total) {
  const int64_t words = args.w.K * bits / 32;
  const float* x = args.x_f32;
  for (int64_t i = 0; i < words; i += VL, x += exact_step<bits>) {
    __builtin_prefetch(packed + i * 4 + distance, 0, 3);
    const vu q = load_words_up_to<vu>(packed + i * 4, words - i);
    vf even = word_value<bits>(q, 0) * load(x), odd = word_value<bits>(q, 1) * load(x + VL);
#pragma GCC unroll 8
    for (int j = 2; j < 32 / bits; j += 2) {
      even = fma(word_value<bits>(q, j), load(x + j * VL), even);
      odd = fma(word_value<bits>(q, j + 1), load(x + (j + 1) * VL), odd);
    }
    total = fma(even + odd, spread_scales<bits * group / 32>(scales, i), total);
  }
  return sum(total);
}

template <int bits, int group>
static float row_digits(const QmmArgs& args, const char* packed, int64_t distance, const float* scales, vf total) {
  constexpr int held = held_bits<bits>;
  const int8_t* x = args.x_int8;
  for (int64_t k = 0; k < args.w.K; k += exact_step<bits>, x += digits * exact_step<bits>) {
    __builtin_prefetch(packed + k * bits / 8 + distance, 0, 3);
    const vf dot = dot_digits<bits>(split_codes<bits>(load_codes<bits>(packed, k, args.w.K)), x);
    total = fma(dot, spread_scales<held * group / 32>(scales, k * held / 32), total);
  }
  return sum(total);
}

template <int bits, int group>
static float row_int8(const QmmArgs& args, const char* packed, int64_t distance, const float* scales, vf bias) {
  constexpr int held = held_bits<bits>;
  const int8_t* x = args.x_int8;
  bf total[2] = {};
  for (int64_t k = 0; k < args.w.K; k += 2 * int8_step<bits>, x += 2 * int8_step<bits>) {
    __builtin_prefetch(packed + k * bits / 8 + distance, 0, 3);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = k + half * int8_step<bits>;
      if (at >= args.w.K) break;
      const bu q = load_codes_int8<bits>(packed, at, args.w.K);
      total[half] +=
          dot_int8<bits>(q, x + half * int8_step<bits>) * spread_scales_int8<held * group / 32>(scales, at * held / 32);
    }
  }
  return sum_lanes(total[0] + total[1]) + sum(bias);
}

template <int bits, int group, class T>
static int run_one_row(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_qweight& w = args.w;
  const bool int8 = args.mode == MLXEFF_COMPUTE_INT8;
  const bool integers = int8 || by_digits<bits>;
  const float shift = integers ? byte_offset<bits> : 0;
  const float* const factors = integers ? args.x_scale : nullptr;
  constexpr auto exact_product = [] {
    if constexpr (by_digits<bits>) return row_digits<bits, group>;
    else return row_exact<bits, group>;
  }();
  const auto row_product = int8 ? row_int8<bits, group> : exact_product;
  const int64_t groups = w.K / group, scale_step = w.ld / group, padded = round_up(groups, VL) + VL;
  const int64_t bytes = row_bytes(w), stride = row_stride(w), ahead = max_of(1, prefetch_distance / bytes);
  // Where rows have gaps: the same place of a later row.
  const int64_t distance = bytes == stride ? prefetch_distance : ceil_div(prefetch_distance, bytes) * stride;
  float* const scales = static_cast<float*>(scratch(Scratch::strip, size_t(padded) * 4));
  if (!scales) return MLXEFF_NO_MEMORY;
  memset(scales, 0, size_t(padded) * 4);
  const T* row_scales = static_cast<const T*>(w.scales) + n_begin * scale_step;
  const T* row_biases = static_cast<const T*>(w.biases) + n_begin * scale_step;
  float out[16];
  for (int64_t n = n_begin; n < n_end; ++n, row_scales += scale_step, row_biases += scale_step) {
    for (int64_t g = ahead * scale_step; g < ahead * scale_step + groups; g += 64 / int64_t(sizeof(T))) {
      __builtin_prefetch(row_scales + g, 0, 3);
      __builtin_prefetch(row_biases + g, 0, 3);
    }
    const vf bias = load_row_scales(row_scales, row_biases, groups, args.x_sum, shift, factors, scales);
    const char* const packed = reinterpret_cast<const char*>(w.packed) + n * stride;
    __builtin_prefetch(packed + page_distance, 0, 3);
    const int64_t slot = (n - n_begin) % 16;
    out[slot] = row_product(args, packed, distance, scales, bias);
    if (slot == 15 || n + 1 == n_end) store_block(out, 0, 1, slot + 1, args.y, 0, n - slot);
  }
  return MLXEFF_OK;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
