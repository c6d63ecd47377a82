// Kernels of the affine-quantised matmul at one instruction-set level: the form of x that each regime reads, and the
// choice of the regime by M, mode and bit width. qmatmul_row.h (one row), qmatmul_rows.h (few), qmatmul_strip.h (few,
// of other widths) and qmatmul_panel.h (many) hold the products.
#include "products/qmatmul_arrange.h"
#include "products/qmatmul_panel.h"

namespace mlxeff {
namespace MLXEFF_ISA {
namespace {

bool few_rows(const QmmArgs& args) { return args.M <= direct_rows; }

bool by_rows(const QmmArgs& args) {
  const int bits = args.w.bits;
  return few_rows(args) && (bits == 4 || bits == 8 || (bits == 5 && row_kernels<5>) || (bits == 6 && row_kernels<6>));
}

bool reads_digits(const QmmArgs& args) {
  return by_rows(args) && args.mode != MLXEFF_COMPUTE_INT8 && (args.w.bits == 8 ? by_digits<8> : by_digits<4>);
}

bool uses_amx(const QmmArgs& args) { return amx_mode(args.mode) && !few_rows(args); }

bool reads_x_in_place(const QmmArgs& args) {
  return args.mode != MLXEFF_COMPUTE_INT8 && !uses_amx(args) && args.x_dtype == MLXEFF_F32 && args.M == 1 &&
         !by_rows(args);
}

// The number of rows of x that the kernels read; rows beyond M are zeros.
int64_t x_rows(const QmmArgs& args) {
  const bool strips = few_rows(args) && !by_rows(args) && args.M > 1;
  return strips ? round_up(args.M, strip_tile) : rows_read(args.M, uses_amx(args));
}

struct Layout {
  size_t values, sums, scales, total;  // byte offsets
};

Layout layout(const QmmArgs& args) {
  const int64_t K = args.w.K, rows = x_rows(args), groups = by_rows(args) ? row_groups(args.w) : K / args.w.group;
  const bool int8 = args.mode == MLXEFF_COMPUTE_INT8, amx = uses_amx(args), three_bytes = reads_digits(args);
  const int64_t element = int8 ? 1 : three_bytes ? digits : amx ? 2 : 4;
  Layout at = {};
  const int64_t row = by_rows(args) ? row_x_bytes(K, element) : padded_stride(K, element) * element;
  const size_t values = reads_x_in_place(args) ? 0 : size_t(rows * row);
  const size_t group_floats = size_t(round_up(rows * groups * 4, 64));
  at.sums = at.values + values;
  at.scales = at.sums + (amx ? 0 : group_floats);
  at.total = at.scales + (int8 || three_bytes ? group_floats : 0);
  return at;
}

size_t workspace_bytes(const QmmArgs& args) { return layout(args).total; }

void bind(QmmArgs& args, void* workspace) {
  const Layout at = layout(args);
  char* const base = static_cast<char*>(workspace);
  const bool in_place = reads_x_in_place(args);
  args.x_f32 = in_place ? static_cast<const float*>(args.x) : reinterpret_cast<const float*>(base + at.values);
  args.ldx_f32 = in_place ? args.ldx : padded_stride(args.w.K, 4);
  args.x_int8 = reinterpret_cast<int8_t*>(base + at.values);
  args.x_bf16 = reinterpret_cast<bf16*>(base + at.values);
  args.x_sum = reinterpret_cast<float*>(base + at.sums);
  args.x_scale = reinterpret_cast<float*>(base + at.scales);
}

void prepare_row(const QmmArgs& args, int64_t m) {
  if (by_rows(args)) {  // the forms for 5 and 6 bits are those for 8
    if (args.w.bits == 4) return prepare_direct_row<4>(args, m);
    if constexpr (row_kernels<5>)
      if (args.w.bits == 5 || args.w.bits == 6) return prepare_direct_row<5>(args, m);
    return prepare_direct_row<8>(args, m);
  }
  const int64_t K = args.w.K, group = args.w.group, groups = K / group;
  const char* const x = static_cast<const char*>(args.x) + m * args.ldx * int64_t(dtype_size(args.x_dtype));
  if (uses_amx(args)) {
    bf16* const out = args.x_bf16 + m * padded_stride(K, 2);
    if (args.x_dtype == MLXEFF_BF16) memcpy(out, x, size_t(K) * 2);
    else if (args.x_dtype == MLXEFF_F16) convert(out, reinterpret_cast<const f16*>(x), K);
    else convert(out, reinterpret_cast<const float*>(x), K);
    return;
  }
  if (args.mode == MLXEFF_COMPUTE_INT8) {
    for (int64_t g = 0; g < groups; ++g) {
      float values[128];
      to_floats(values, x + g * group * int64_t(dtype_size(args.x_dtype)), args.x_dtype, group);
      round_to_int8(values, int(group), args.w.bits, args.x_int8 + m * padded_stride(K, 1) + g * group,
                    args.x_scale + m * groups + g, args.x_sum + m * groups + g);
    }
    return;
  }
  if (!reads_x_in_place(args)) to_floats(const_cast<float*>(args.x_f32) + m * args.ldx_f32, x, args.x_dtype, K);
  if (!few_rows(args)) return;
  const float* const values = args.x_f32 + m * args.ldx_f32;
  for (int64_t g = 0; g < groups; ++g) {
    vf total = zero();
    for (int64_t k = g * group; k < (g + 1) * group; k += VL) total += load(values + k);
    args.x_sum[m * groups + g] = sum(total);
  }
}

void clear_row(const QmmArgs& args, int64_t m) {
  const int64_t K = args.w.K, groups = K / args.w.group;
  if (uses_amx(args)) {
    memset(args.x_bf16 + m * padded_stride(K, 2), 0, size_t(K) * 2);
    return;
  }
  memset(args.x_sum + m * groups, 0, size_t(groups) * 4);
  if (args.mode == MLXEFF_COMPUTE_INT8) {
    memset(args.x_scale + m * groups, 0, size_t(groups) * 4);
    memset(args.x_int8 + m * padded_stride(K, 1), 0, size_t(K));
  } else {
    memset(const_cast<float*>(args.x_f32) + m * args.ldx_f32, 0, size_t(K) * 4);
  }
}

// Whoever prepares the last row also clears the rows that exist only in the workspace.
void prepare(const QmmArgs& args, int64_t m_begin, int64_t m_end) {
  for (int64_t m = m_begin; m < m_end; ++m) prepare_row(args, m);
  if (m_end == args.M)
    for (int64_t m = args.M; m < x_rows(args); ++m) clear_row(args, m);
}

int64_t piece(const QmmArgs& args, int threads) {
  return few_rows(args) ? direct_piece(args.w.N, row_bytes(args.w), threads)
                        : panel_piece(args.w.N, uses_amx(args), threads);
}

template <int bits>
int run_bits(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  if (few_rows(args)) {
    if constexpr (row_kernels<bits>) return run_rows<bits>(args, n_begin, n_end);
    else return run_strips<bits>(args, n_begin, n_end);
  }
#if defined(MLXEFF_AMX)
  if (args.mode == MLXEFF_COMPUTE_BF16) return run_panel_amx<bits>(args, n_begin, n_end);
#endif
  if (args.mode == MLXEFF_COMPUTE_INT8) return run_panel_int8<bits>(args, n_begin, n_end);
  return run_panel_exact<bits>(args, n_begin, n_end);
}

int run(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  switch (args.w.bits) {
    case 2: return run_bits<2>(args, n_begin, n_end);
    case 3: return run_bits<3>(args, n_begin, n_end);
    case 4: return run_bits<4>(args, n_begin, n_end);
    case 5: return run_bits<5>(args, n_begin, n_end);
    case 6: return run_bits<6>(args, n_begin, n_end);
    case 8: return run_bits<8>(args, n_begin, n_end);
  }
  return MLXEFF_BAD_ARGUMENT;
}

template <int bits>
void dequantize_row_bits(const mlxeff_qweight& w, int64_t n, void* out, int out_dtype) {
  const char* packed = reinterpret_cast<const char*>(w.packed) + n * row_stride(w);
  for (int64_t k = 0; k < w.K; k += 32) {
    uint32_t words[bits + 1] = {};
    memcpy(words, packed + k * bits / 8, bits * 4);
    const int64_t g = n * scale_stride(w) + k / w.group, size = int64_t(dtype_size(w.scale_dtype));
    float scale, bias, values[32];
    to_floats(&scale, static_cast<const char*>(w.scales) + g * size, w.scale_dtype, 1);
    to_floats(&bias, static_cast<const char*>(w.biases) + g * size, w.scale_dtype, 1);
#pragma GCC unroll 32
    for (int i = 0; i < 32; ++i) {
      const int word = i * bits / 32, shift = i * bits % 32;
      const uint64_t pair = words[word] | uint64_t(words[word + 1]) << 32;
      values[i] = float(int32_t(pair >> shift & ((1u << bits) - 1))) * scale + bias;
    }
    from_floats(static_cast<char*>(out) + k * int64_t(dtype_size(out_dtype)), out_dtype, values, 32);
  }
}

void dequantize_row(const mlxeff_qweight& w, int64_t n, void* out, int out_dtype) {
  switch (w.bits) {
    case 2: return dequantize_row_bits<2>(w, n, out, out_dtype);
    case 3: return dequantize_row_bits<3>(w, n, out, out_dtype);
    case 4: return dequantize_row_bits<4>(w, n, out, out_dtype);
    case 5: return dequantize_row_bits<5>(w, n, out, out_dtype);
    case 6: return dequantize_row_bits<6>(w, n, out, out_dtype);
    case 8: return dequantize_row_bits<8>(w, n, out, out_dtype);
  }
}

}  // namespace

const QmatmulKernels& qmatmul_kernels() {
  static const QmatmulKernels table = {{workspace_bytes, bind, prepare, piece, run}, dequantize_row};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
