// Quantised matmul, one row of x, 4- and 8-bit weights, and with byte products 5- and 6-bit ones: the product of a
// decoding step, limited by reading W.
//
// W is read in the order of its addresses, some rows at a time, with the values of K in the lanes and a horizontal sum
// at the end of each row. (The strips of qmatmul_strip.h would need the scales transposed, a third of the work here.)
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

// Rows of W that are multiplied together, as many as the registers have room for: each vector of x is loaded once for
// all of them, and while one row waits for its sums another goes on. A row has the same bits in a block and alone.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int rows_together = 4;
#else
constexpr int rows_together = 2;
#endif
constexpr int stored_rows = 16;  // rows of W whose products are stored together

// Rows of W at `packed`, `stride` bytes apart, with their scales, `scale_step` apart. The lanes of `biases` are added.
struct RowBlock {
  const char* packed;
  int64_t stride, distance;  // distance: bytes between what is read and what is asked for
  const float* scales;
  int64_t scale_step;
  const vf* biases;
};
// out[i] = the product of row i of a block with x.
typedef void BlockKernel(const QmmArgs& args, const RowBlock& block, float* out);

template <int bits, int group, int count>
static void block_exact(const QmmArgs& args, const RowBlock& block, float* out) {
  const int64_t words = args.w.K * bits / 32;
  for (int row = 0; row < count; ++row) {
    const char* const packed = block.packed + row * block.stride;
    const float *x = args.x_f32, *const scales = block.scales + row * block.scale_step;
    vf total = block.biases[row];
    for (int64_t i = 0; i < words; i += VL, x += row_step<bits>) {
      __builtin_prefetch(packed + i * 4 + block.distance, 0, 3);
      const vu q = load_words_up_to(packed + i * 4, words - i);
      vf even = word_value<bits>(q, 0) * load(x), odd = word_value<bits>(q, 1) * load(x + VL);
#pragma GCC unroll 8
      for (int j = 2; j < 32 / bits; j += 2) {
        even = fma(word_value<bits>(q, j), load(x + j * VL), even);
        odd = fma(word_value<bits>(q, j + 1), load(x + (j + 1) * VL), odd);
      }
      total = fma(even + odd, spread_scales<bits * group / 32>(scales, i), total);
    }
    out[row] = sum(total);
  }
}

template <int bits, int group, int count>
static void block_digits(const QmmArgs& args, const RowBlock& block, float* out) {
  constexpr int held = held_bits<bits>;
  const int8_t* x = args.x_int8;
  vf total[count];
#pragma GCC unroll 4
  for (int row = 0; row < count; ++row) total[row] = block.biases[row];
  for (int64_t k = 0; k < args.w.K; k += row_step<bits>, x += digits * row_step<bits>) {
    vf dot[count];
#pragma GCC unroll 4
    for (int row = 0; row < count; ++row) {
      const char* const packed = block.packed + row * block.stride;
      __builtin_prefetch(packed + k * bits / 8 + block.distance, 0, 3);
      dot[row] = dot_digits<bits>(split_codes<bits>(load_codes<bits>(packed, k, args.w.K)), x);
    }
#pragma GCC unroll 4
    for (int row = 0; row < count; ++row) {
      const float* const scales = block.scales + row * block.scale_step;
      total[row] = fma(dot[row], spread_scales<held * group / 32>(scales, k * held / 32), total[row]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < count; ++row) out[row] = sum(total[row]);
}

template <int bits, int group, int count>
static void block_int8(const QmmArgs& args, const RowBlock& block, float* out) {
  constexpr int held = held_bits<bits>;
  const int8_t* x = args.x_int8;
  vf total[count];
#pragma GCC unroll 4
  for (int row = 0; row < count; ++row) total[row] = block.biases[row];
  for (int64_t k = 0; k < args.w.K; k += row_step<bits>, x += row_step<bits>) {
#pragma GCC unroll 4
    for (int row = 0; row < count; ++row) {
      const char* const packed = block.packed + row * block.stride;
      const float* const scales = block.scales + row * block.scale_step;
      __builtin_prefetch(packed + k * bits / 8 + block.distance, 0, 3);
      const vf dot = dot_int8<bits>(split_codes<bits>(load_codes<bits>(packed, k, args.w.K)), x);
      total[row] = fma(dot, spread_scales<held * group / 32>(scales, k * held / 32), total[row]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < count; ++row) out[row] = sum(total[row]);
}

template <int bits, int group, int count>
BlockKernel* block_kernel(int mode) {
  if (mode == MLXEFF_COMPUTE_INT8) return block_int8<bits, group, count>;
  if constexpr (by_digits<bits>) return block_digits<bits, group, count>;
  else return block_exact<bits, group, count>;
}

template <int bits, int group, class T>
static int run_one_row(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_qweight& w = args.w;
  const bool integers = args.mode == MLXEFF_COMPUTE_INT8 || by_digits<bits>;
  const float shift = integers ? byte_offset<bits> : 0;
  const float* const factors = integers ? args.x_scale : nullptr;
  BlockKernel* const together = block_kernel<bits, group, rows_together>(args.mode);
  BlockKernel* const alone = block_kernel<bits, group, 1>(args.mode);
  const int64_t groups = w.K / group, scale_step = w.ld / group, padded = round_up(groups, VL) + VL;
  const int64_t bytes = row_bytes(w), stride = row_stride(w), ahead = max_of(1, prefetch_distance / bytes);
  // Where rows have gaps: the same place of a later row.
  const int64_t distance = bytes == stride ? prefetch_distance : ceil_div(prefetch_distance, bytes) * stride;
  float* const scales = static_cast<float*>(scratch(Scratch::strip, size_t(rows_together * padded) * 4));
  if (!scales) return MLXEFF_NO_MEMORY;
  memset(scales, 0, size_t(rows_together * padded) * 4);
  const T* row_scales = static_cast<const T*>(w.scales) + n_begin * scale_step;
  const T* row_biases = static_cast<const T*>(w.biases) + n_begin * scale_step;
  vf biases[rows_together];
  float out[stored_rows];
  int64_t held = 0;  // products in `out`
  for (int64_t n = n_begin, count; n < n_end; n += count) {
    count = n + rows_together <= n_end ? rows_together : 1;
    for (int64_t row = 0; row < count; ++row, row_scales += scale_step, row_biases += scale_step) {
      for (int64_t g = ahead * scale_step; g < ahead * scale_step + groups; g += 64 / int64_t(sizeof(T))) {
        __builtin_prefetch(row_scales + g, 0, 3);
        __builtin_prefetch(row_biases + g, 0, 3);
      }
      biases[row] = load_row_scales(row_scales, row_biases, groups, args.x_sum, shift, factors, scales + row * padded);
    }
    const char* const packed = reinterpret_cast<const char*>(w.packed) + n * stride;
    __builtin_prefetch(packed + page_distance, 0, 3);
    (count == 1 ? alone : together)(args, {packed, stride, distance, scales, padded, biases}, out + held);
    held += count;
    if (held > stored_rows - rows_together || n + count == n_end) {
      store_block(out, 0, 1, held, args.y, 0, n + count - held);
      held = 0;
    }
  }
  return MLXEFF_OK;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
