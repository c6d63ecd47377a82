// Quantised matmul, few rows of x (1 < M <= direct_rows), for the widths of qmatmul_row.h: the products of a step that
// verifies a draft. Forms of x and operations are those of qmatmul_row.h, for each row of x in the same order, so that
// its products have the same bits as alone.
//
// W is read once, in the order of its addresses, a block of rows at a time. A tile of the kernels is the block with
// one, two or four rows of x; further rows of x read the block again from the L1 cache.
//
// To be included by per-level sources only.
#pragma once
#include "products/qmatmul_row.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int row_block = 4;  // rows of W in a block

// A block of rows of W with a tile of rows of x. Row r of the tile begins at byte r * x_step of x. Its product with row
// i of the block is put at sums[r * stored_rows + i]; the scales are at scales + r * x_scale_step + i * scale_step, and
// the lanes of biases[r * row_block + i] are added.
struct RowTile {
  const char* packed[row_block];
  int64_t K, distance;  // distance: bytes between what is read and what is asked for
  const char* x;
  int64_t x_step;
  const float* scales;
  int64_t x_scale_step, scale_step;
  const vf* biases;
  float* sums;
};
typedef void RowKernel(const RowTile& tile);

// The scales of a row of W for each row of x: scales[m * scale_step + g] = scale of group g, times the factor of x if
// there are any (else there is one row of scales). Sets biases[m * row_block] to bias * x_sum, whose lanes are to be
// summed. The rows of x_sum and of the factors are `step` elements apart.
template <class T>
MLXEFF_INLINE void load_block_scales(const T* row_scales, const T* row_biases, int64_t groups, const float* x_sum,
                                     float bias_shift, const float* factors, int64_t M, int64_t step, float* scales,
                                     int64_t scale_step, vf* biases) {
  for (int64_t m = 0; m < M; ++m) biases[m * row_block] = zero();
  for (int64_t g = 0; g < groups; g += VL) {
    const vf scale = load_up_to(row_scales + g, groups - g);
    const vf bias = bias_shift * scale + load_up_to(row_biases + g, groups - g);
    if (!factors) store(scales + g, scale);
    for (int64_t m = 0; m < M; ++m) {
      biases[m * row_block] = fma(bias, load(x_sum + m * step + g), biases[m * row_block]);
      if (factors) store(scales + m * scale_step + g, scale * load(factors + m * step + g));
    }
  }
}

template <int bits, int group, int rows>
static void rows_exact(const RowTile& tile) {
  const int64_t words = tile.K * bits / 32;
  for (int column = 0; column < row_block; ++column) {
    const char *const packed = tile.packed[column], *x = tile.x;
    const float* const scales = tile.scales + column * tile.scale_step;
    vf total[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) total[r] = tile.biases[r * row_block + column];
    for (int64_t i = 0; i < words; i += VL, x += row_step<bits> * 4) {
      __builtin_prefetch(packed + i * 4 + tile.distance, 0, 3);
      const vu q = load_words_up_to(packed + i * 4, words - i);
      vf even[rows], odd[rows];
#pragma GCC unroll 4
      for (int j = 0; j < 32 / bits; j += 2) {
        const vf first = word_value<bits>(q, j), second = word_value<bits>(q, j + 1);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          const float* const values = reinterpret_cast<const float*>(x + r * tile.x_step) + j * VL;
          even[r] = j ? fma(first, load(values), even[r]) : first * load(values);
          odd[r] = j ? fma(second, load(values + VL), odd[r]) : second * load(values + VL);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const vf scale = spread_scales<bits * group / 32>(scales + r * tile.x_scale_step, i);
        total[r] = fma(even[r] + odd[r], scale, total[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) tile.sums[r * stored_rows + column] = sum(total[r]);
  }
}

// `columns` rows of the block, from the one with index `first` on. Each vector of x is loaded once for all of them: the
// loads of x would otherwise take longer than the products.
template <int bits, int group, int rows, int columns>
MLXEFF_INLINE void digit_sums(const RowTile& tile, int first) {
  constexpr int held = held_bits<bits>;
  const int8_t* x = reinterpret_cast<const int8_t*>(tile.x);
  vf total[rows][columns];
#pragma GCC unroll 4
  for (int i = 0; i < rows * columns; ++i)
    total[i / columns][i % columns] = tile.biases[i / columns * row_block + first + i % columns];
  for (int64_t k = 0; k < tile.K; k += row_step<bits>, x += digits * row_step<bits>) {
    Codes<bits> q[columns];
#pragma GCC unroll 4
    for (int i = 0; i < columns; ++i) {
      const char* const packed = tile.packed[first + i];
      __builtin_prefetch(packed + k * bits / 8 + tile.distance, 0, 3);
      q[i] = split_codes<bits>(load_codes<bits>(packed, k, tile.K));
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      vf dot[columns];
#pragma GCC unroll 4
      for (int i = 0; i < columns; ++i) dot[i] = dot_digits<bits>(q[i], x + r * tile.x_step);
#pragma GCC unroll 4
      for (int i = 0; i < columns; ++i) {
        const float* const scales = tile.scales + r * tile.x_scale_step + (first + i) * tile.scale_step;
        total[r][i] = fma(dot[i], spread_scales<held * group / 32>(scales, k * held / 32), total[r][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows * columns; ++i)
    tile.sums[i / columns * stored_rows + first + i % columns] = sum(total[i / columns][i % columns]);
}
template <int bits, int group, int rows>
static void rows_digits(const RowTile& tile) {
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int columns = rows == 1 ? 1 : row_block;
#else
  constexpr int columns = rows == 1 ? 1 : row_block / 2;
#endif
  for (int first = 0; first < row_block; first += columns) digit_sums<bits, group, rows, columns>(tile, first);
}

template <int bits, int group, int rows>
static void rows_int8(const RowTile& tile) {
  constexpr int held = held_bits<bits>;
  for (int column = 0; column < row_block; ++column) {
    const char* const packed = tile.packed[column];
    const float* const scales = tile.scales + column * tile.scale_step;
    const int8_t* x = reinterpret_cast<const int8_t*>(tile.x);
    vf total[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) total[r] = tile.biases[r * row_block + column];
    for (int64_t k = 0; k < tile.K; k += row_step<bits>, x += row_step<bits>) {
      __builtin_prefetch(packed + k * bits / 8 + tile.distance, 0, 3);
      const Codes<bits> q = split_codes<bits>(load_codes<bits>(packed, k, tile.K));
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const vf scale = spread_scales<held * group / 32>(scales + r * tile.x_scale_step, k * held / 32);
        total[r] = fma(dot_int8<bits>(q, x + r * tile.x_step), scale, total[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) tile.sums[r * stored_rows + column] = sum(total[r]);
  }
}

// The kernels for tiles of 1, 2 and, where the registers suffice, 4 rows of x.
template <int bits, int group>
struct RowKernels {
  template <int rows>
  static constexpr RowKernel* exact() {
    if constexpr (by_digits<bits>) return rows_digits<bits, group, rows>;
    else return rows_exact<bits, group, rows>;
  }
  static int64_t tile(int64_t M, bool int8) { return M >= 4 && (int8 || !by_digits<bits>) ? 4 : M >= 2 ? 2 : 1; }
  static RowKernel* of(int64_t tile, bool int8) {
    if (tile == 1) return int8 ? rows_int8<bits, group, 1> : exact<1>();
    if constexpr (!by_digits<bits>)
      if (tile == 4 && !int8) return exact<4>();
    return !int8 ? exact<2>() : tile == 4 ? rows_int8<bits, group, 4> : rows_int8<bits, group, 2>;
  }
};

template <int bits, int group, class T>
static int run_block_rows(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_qweight& w = args.w;
  const bool int8 = args.mode == MLXEFF_COMPUTE_INT8, integers = int8 || by_digits<bits>;
  const float shift = integers ? byte_offset<bits> : 0;
  const float* const factors = integers ? args.x_scale : nullptr;
  const int64_t M = args.M, groups = w.K / group, w_scale_step = w.ld / group, step = row_groups(w);
  const int64_t x_size = int8 ? 1 : digits, x_step = row_x_bytes(w.K, integers ? x_size : 4),
                x_scale_step = factors ? row_block * step : 0;
  // What is asked for is the same place of a later block.
  const int64_t stride = row_stride(w), ahead = row_block * ceil_div(prefetch_distance, row_block * row_bytes(w));
  // The last read of the scales goes beyond their end.
  const size_t scale_bytes = size_t((factors ? M : 1) * row_block * step + VL) * 4;
  float* const scales = static_cast<float*>(scratch(Scratch::strip, scale_bytes));
  if (!scales) return MLXEFF_NO_MEMORY;
  memset(scales, 0, scale_bytes);
  const char* const x = reinterpret_cast<const char*>(args.x_int8);  // or x_f32, at the same place
  vf biases[direct_rows][row_block];
  float out[direct_rows][stored_rows];
  for (int64_t n = n_begin; n < n_end; n += row_block) {
    const int64_t slot = (n - n_begin) % stored_rows, count = min_of(row_block, n_end - n);
    RowTile tile = {{}, w.K, ahead * stride, x, x_step, scales, x_scale_step, step, biases[0], out[0]};
    for (int64_t i = 0; i < row_block; ++i) {
      const int64_t row = n + min_of(i, count - 1);  // the last block is completed by its last row
      tile.packed[i] = reinterpret_cast<const char*>(w.packed) + row * stride;
      const T* const row_scales = static_cast<const T*>(w.scales) + row * w_scale_step;
      const T* const row_biases = static_cast<const T*>(w.biases) + row * w_scale_step;
      for (int64_t g = ahead * w_scale_step; g < ahead * w_scale_step + groups; g += 64 / int64_t(sizeof(T))) {
        __builtin_prefetch(row_scales + g, 0, 3);
        __builtin_prefetch(row_biases + g, 0, 3);
      }
      load_block_scales(row_scales, row_biases, groups, args.x_sum, shift, factors, M, step, scales + i * step,
                        x_scale_step, biases[0] + i);
    }
    for (int64_t m = 0, rows; m < M; m += rows) {
      rows = RowKernels<bits, group>::tile(M - m, int8);
      tile.x = x + m * x_step;
      tile.scales = scales + m * x_scale_step;
      tile.biases = biases[m];
      tile.sums = out[m] + slot;
      RowKernels<bits, group>::of(rows, int8)(tile);
    }
    if (slot + row_block == stored_rows || n + row_block >= n_end)
      store_block(out[0], stored_rows, M, slot + count, args.y, 0, n - slot);
  }
  return MLXEFF_OK;
}

template <int bits, int group, class T>
static int run_rows_as(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  return args.M == 1 ? run_one_row<bits, group, T>(args, n_begin, n_end)
                     : run_block_rows<bits, group, T>(args, n_begin, n_end);
}

template <int bits, int group>
static int run_rows_of_group(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  if (args.w.scale_dtype == MLXEFF_F32) return run_rows_as<bits, group, float>(args, n_begin, n_end);
  if (args.w.scale_dtype == MLXEFF_F16) return run_rows_as<bits, group, f16>(args, n_begin, n_end);
  return run_rows_as<bits, group, bf16>(args, n_begin, n_end);
}

template <int bits>
static int run_rows(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  if (args.w.group == 32) return run_rows_of_group<bits, 32>(args, n_begin, n_end);
  if (args.w.group == 64) return run_rows_of_group<bits, 64>(args, n_begin, n_end);
  return run_rows_of_group<bits, 128>(args, n_begin, n_end);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
