// Quantised matmul, few rows of x (M <= direct_rows), where qmatmul_row.h has no kernels: weights are decoded into
// registers, used for a tile of rows, and never stored. One strip of VL rows of W at a time:
//
//   EXACT  y[m][n] = sum over groups of scale * sum(q * x) + bias * sum(x), everything in fp32
//   INT8   x is rounded to xq * x_scale with one x_scale a group, |xq| <= 127;
//          y[m][n] = sum over groups of scale * x_scale * sum(q * xq) + bias * x_scale * sum(xq), the inner sums in
//          integers. The second term uses the rounded values too, so the error is that of w * (x - xq * x_scale).
//
// While a strip is computed the next one is prefetched, in the order of its addresses.
//
// To be included by per-level sources only.
#pragma once
#include "products/panel_product.h"
#include "products/qmatmul_int8.h"
#include "products/qmatmul_kernels.h"
#include "products/row_lines.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// One strip as the kernels read it: packed rows, and scales and biases with a group's VL values side by side.
struct Strip {
  const char* packed;
  int64_t stride;  // bytes between packed rows
  const float* scales;
  const float* biases;
};

// Bytes of packed words in use in a row, and between two rows; values between two rows of scales.
MLXEFF_INLINE int64_t row_bytes(const mlxeff_qweight& w) { return w.K * w.bits / 8; }
MLXEFF_INLINE int64_t row_stride(const mlxeff_qweight& w) { return w.ld * w.bits / 8; }
MLXEFF_INLINE int64_t scale_stride(const mlxeff_qweight& w) { return w.ld / w.group; }
MLXEFF_INLINE int64_t strip_floats(const mlxeff_qweight& w) {  // scratch that load_strip needs
  return 2 * VL * round_up(w.K / w.group, 4) + VL * round_up(w.K / w.group, 4) + VL * row_bytes(w) / 4;
}

// Fetches the next strip while the present one is read and computed, in the order of its addresses. Lines are asked for
// at an even pace over all of that time, reading the scales included: a core has few outstanding misses, and memory
// that is left waiting once is not caught up with. There are kernels for rows with gaps and for rows without: counting
// the lines of a row costs the latter up to 8 %.
template <bool gaps>
struct Prefetcher {
  RowLines<gaps> packed;
  const char *scales = nullptr, *biases = nullptr;
  int64_t group_bytes = 0;    // of scales, with the gaps between rows
  int64_t pace = 0, due = 0;  // sixteenths of a line a block of 32 values

  static constexpr int lines_with_scales = 2;  // for each four groups of scales or biases
  inline __attribute__((always_inline)) void start(const mlxeff_qweight& w, int64_t n) {
    const int64_t bytes = row_bytes(w), stride = row_stride(w), groups = w.K / w.group,
                  step = scale_stride(w) * int64_t(dtype_size(w.scale_dtype));
    const int64_t lines = bytes == stride ? VL * bytes / 64 : VL * ceil_div(bytes, 64);
    packed.start(reinterpret_cast<const char*>(w.packed) + n * stride, bytes, stride);
    scales = static_cast<const char*>(w.scales) + n * step;
    biases = static_cast<const char*>(w.biases) + n * step;
    group_bytes = VL * step / groups;
    pace = max_of(0, 16 * (lines - ceil_div(groups, 4) * 2 * lines_with_scales)) / (w.K / 32) + 1;
  }
  inline __attribute__((always_inline)) void fetch(int lines) {
    for (int i = 0; i < lines; ++i) packed.fetch();
  }
  inline __attribute__((always_inline)) void block() {
    for (due += pace; due >= 16; due -= 16) packed.fetch();
  }
  inline __attribute__((always_inline)) void group() {
    __builtin_prefetch(scales, 0, 3);
    __builtin_prefetch(biases, 0, 3);
    scales += group_bytes;
    biases += group_bytes;
  }
};

// out [groups][VL] = VL rows of the scale or bias matrix of w, transposed and converted; rows beyond `rows` repeat the
// last.
template <bool gaps>
static inline void load_scales(const mlxeff_qweight& w, const void* matrix, int64_t n, int64_t rows, float* rows_f32,
                               float* out, Prefetcher<gaps>& next) {
  const int64_t groups = w.K / w.group, padded = round_up(groups, 4);
  const int64_t step = scale_stride(w) * int64_t(dtype_size(w.scale_dtype));
  for (int r = 0; r < VL; ++r) {
    const char* const row = static_cast<const char*>(matrix) + (n + min_of(r, rows - 1)) * step;
    to_floats(rows_f32 + r * padded, row, w.scale_dtype, groups);
    for (int64_t g = groups; g < padded; ++g) rows_f32[r * padded + g] = 0;
  }
  for (int64_t g = 0; g < padded; g += 4) {
    next.fetch(Prefetcher<gaps>::lines_with_scales);
    vu quad[4];
    load_words4(reinterpret_cast<const char*>(rows_f32 + g), padded * 4, quad);
    for (int i = 0; i < 4; ++i) store(out + (g + i) * VL, (vf)quad[i]);
  }
}

// Rows [n, n + rows) of W, rows <= VL, in the strip form. `bias_shift` times the scale is added to each bias.
template <bool gaps>
static inline Strip load_strip(const mlxeff_qweight& w, int64_t n, int64_t rows, float bias_shift, float* buffer,
                               Prefetcher<gaps>& next) {
  const int64_t groups = w.K / w.group, padded = round_up(groups, 4), bytes = row_bytes(w), stride = row_stride(w);
  float *scales = buffer, *biases = scales + VL * padded, *rows_f32 = biases + VL * padded;
  load_scales(w, w.scales, n, rows, rows_f32, scales, next);
  load_scales(w, w.biases, n, rows, rows_f32, biases, next);
  if (bias_shift != 0)
    for (int64_t i = 0; i < VL * groups; i += VL) store(biases + i, load(biases + i) + load(scales + i) * bias_shift);
  const char* packed = reinterpret_cast<const char*>(w.packed) + n * stride;
  if (rows == VL) return {packed, stride, scales, biases};
  // The last strip of W is completed by copies of its last row.
  char* const copy = reinterpret_cast<char*>(rows_f32 + VL * padded);
  for (int r = 0; r < VL; ++r) memcpy(copy + r * bytes, packed + min_of(r, rows - 1) * stride, size_t(bytes));
  return {copy, bytes, scales, biases};
}

// Rows of x in a tile, whose sums fill half of the vector registers; one row is a tile of its own.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int strip_tile = 4;
#else
constexpr int strip_tile = 2;
#endif

// The sums of a group's products, in chains: one row of x alone does not keep the arithmetic units busy. Tiles of all
// heights have as many chains, so that the products of a row of x have the same bits in all of them.
template <int rows, bool int8>
struct Part {
  static constexpr int chains = 4;
  vf sum[rows][chains] = {};

  // A block of 32 values, from value k of a row on, with the tile of rows of x that begins with row `first`.
  template <int bits>
  inline __attribute__((always_inline)) void add(const QmmArgs& args, const Block<bits>& block, int64_t first,
                                                 int64_t k) {
    const float* const x = args.x_f32 + first * args.ldx_f32 + k;
#pragma GCC unroll 32
    for (int i = 0; i < 32; ++i) {
      const vf q = block.value_f32(i);
#pragma GCC unroll 4
      for (int m = 0; m < rows; ++m)
        sum[m][i % chains] = fma(q, broadcast(x[m * args.ldx_f32 + i]), sum[m][i % chains]);
    }
  }
  inline __attribute__((always_inline)) vf dot(const QmmArgs&, int m, int64_t) const {
    return (sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3]);
  }
};
template <int rows>
struct Part<rows, true> {
  Int8Sums<rows> sums;
  Part() { sums.clear(); }

  template <int bits>
  inline __attribute__((always_inline)) void add(const QmmArgs& args, const Block<bits>& block, int64_t first,
                                                 int64_t k) {
    const int64_t ldx = padded_stride(args.w.K, 1);
    const int8_t* const x = args.x_int8 + first * ldx + k;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums.template add<bits>(eight_values(block, i), x + 8 * i, ldx);
  }
  inline __attribute__((always_inline)) vf dot(const QmmArgs& args, int m, int64_t group_index) const {
    return sums.row(m) * broadcast(args.x_scale[group_index]);
  }
};

template <int bits, int rows, bool int8, bool gaps>
static void strip_product(const QmmArgs& args, const Strip& strip, int64_t first, Prefetcher<gaps> next, vf y[]) {
  const int64_t group = args.w.group, groups = args.w.K / group, of_tile = first * groups;
  vf sum[rows];
#pragma GCC unroll 4
  for (int m = 0; m < rows; ++m) sum[m] = zero();
  for (int64_t g = 0; g < groups; ++g) {
    Part<rows, int8> part;
    for (int64_t k = g * group; k < (g + 1) * group; k += 32) {
      next.block();
      part.template add<bits>(args, Block<bits>::load(strip.packed + k * bits / 8, strip.stride), first, k);
    }
    next.group();
    const vf scale = load(strip.scales + g * VL), bias = load(strip.biases + g * VL);
#pragma GCC unroll 4
    for (int m = 0; m < rows; ++m)
      sum[m] = fma(scale, part.dot(args, m, of_tile + m * groups + g),
                   fma(bias, broadcast(args.x_sum[of_tile + m * groups + g]), sum[m]));
  }
#pragma GCC unroll 4
  for (int m = 0; m < rows; ++m) y[m] = sum[m];
}

template <bool gaps>
using StripKernel = void(const QmmArgs&, const Strip&, int64_t, Prefetcher<gaps>, vf*);

template <int bits, bool gaps>
static StripKernel<gaps>* strip_kernel(bool one_row, bool int8) {
  if (one_row) return int8 ? strip_product<bits, 1, true, gaps> : strip_product<bits, 1, false, gaps>;
  return int8 ? strip_product<bits, strip_tile, true, gaps> : strip_product<bits, strip_tile, false, gaps>;
}

template <int bits, bool gaps>
static int run_strips_of(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  const bool int8 = args.mode == MLXEFF_COMPUTE_INT8;
  StripKernel<gaps>* const kernel = strip_kernel<bits, gaps>(args.M == 1, int8);
  float* const buffer = static_cast<float*>(scratch(Scratch::strip, size_t(strip_floats(args.w)) * 4));
  if (!buffer) return MLXEFF_NO_MEMORY;
  const float bias_shift = int8 ? byte_offset<bits> : 0;
  for (int64_t n = n_begin; n < n_end; n += VL) {
    const int64_t rows = min_of(VL, n_end - n);
    Prefetcher<gaps> next;
    next.start(args.w, min_of(n + VL, args.w.N - 1));
    const Strip strip = load_strip(args.w, n, rows, bias_shift, buffer, next);
    vf y[direct_rows];
    for (int64_t m = 0; m < args.M; m += strip_tile) kernel(args, strip, m, next, y + m);
    store_strip(y, args.M, rows, args.y, n);
  }
  return MLXEFF_OK;
}

template <int bits>
static int run_strips(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  return args.w.K == args.w.ld ? run_strips_of<bits, false>(args, n_begin, n_end)
                               : run_strips_of<bits, true>(args, n_begin, n_end);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
