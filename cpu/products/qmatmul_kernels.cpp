// Kernels of the affine-quantised matmul at one instruction-set level: the form of x that each regime reads, and the
// choice of the regime by M, mode and bit width. qmatmul_row.h (one row), qmatmul_strip.h (few) and
// qmatmul_panel.h (many) hold the products.
#include "products/qmatmul_panel.h"
#include "products/qmatmul_row.h"

namespace mlxeff {
namespace MLXEFF_ISA {
namespace {

bool few_rows(const QmmArgs& args) { return args.M <= (args.w.bits == 4 || args.w.bits == 8 ? direct_rows : 1); }

bool one_row(const QmmArgs& args) {
  const int bits = args.w.bits;
  return args.M == 1 && (bits == 4 || bits == 8 || (bits == 5 && row_kernels<5>) || (bits == 6 && row_kernels<6>));
}

bool reads_digits(const QmmArgs& args) {
  return one_row(args) && args.mode != MLXEFF_COMPUTE_INT8 && (args.w.bits == 8 ? by_digits<8> : by_digits<4>);
}

bool uses_amx(const QmmArgs& args) { return amx_mode(args.mode) && !few_rows(args); }

bool reads_x_in_place(const QmmArgs& args) {
  return args.mode != MLXEFF_COMPUTE_INT8 && !uses_amx(args) && args.x_dtype == MLXEFF_F32 && args.M == 1 &&
         !one_row(args);
}

struct Layout {
  size_t values, sums, scales, total;  // byte offsets
};

Layout layout(const QmmArgs& args) {
  const int64_t rows = rows_read(args.M, few_rows(args), uses_amx(args)), groups = args.w.K / args.w.group;
  const bool int8 = args.mode == MLXEFF_COMPUTE_INT8, amx = uses_amx(args), three_bytes = reads_digits(args);
  const int64_t element = int8 ? 1 : three_bytes ? digits : amx ? 2 : 4;
  Layout at = {};
  const int64_t columns = one_row(args) ? round_up(args.w.K, row_padding) : padded_stride(args.w.K, element);
  const size_t values = reads_x_in_place(args) ? 0 : size_t(rows * columns * element);
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

typedef int8_t Bytes32 __attribute__((vector_size(32)));

// The bytes of a block in the order in which Block<bits>::bytes gives the weights.
void store_in_decoder_order(const int8_t natural[32], int bits, int8_t* out) {
  Bytes32 v;
  memcpy(&v, natural, 32);
  if (bits == 4)
    v = __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 16, 18, 20, 22, 17, 19, 21,
                                23, 24, 26, 28, 30, 25, 27, 29, 31);
  if (bits == 2)
    v = __builtin_shufflevector(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 16, 20, 24, 28, 17, 21, 25,
                                29, 18, 22, 26, 30, 19, 23, 27, 31);
  memcpy(out, &v, 32);
}

// x = xq * scale with |xq| <= 127, rounded to nearest: adding 1.5 * 2^23 leaves the integer in the low bits of the sum.
void round_to_int8(const float* x, int count, int bits, int8_t* out, float* scale, float* sum) {
  vf most = zero();
  for (int k = 0; k < count; k += VL) most = max(most, abs(load(x + k)));
  const float largest = max(most);
  const vf inverse = broadcast(largest > 0 ? 127.0f / largest : 0.0f), magic = broadcast(0x1.8p23f);
  vi total = {};
  for (int block = 0; block < count; block += 32) {
    int32_t values[32];
    int8_t natural[32];
#pragma GCC unroll 8
    for (int i = 0; i < 32; i += VL) {
      const vi rounded = (vi)(load(x + block + i) * inverse + magic) - (vi)magic;
      total += rounded;
      memcpy(values + i, &rounded, sizeof rounded);
    }
    for (int i = 0; i < 32; ++i) natural[i] = int8_t(values[i]);
    store_in_decoder_order(natural, bits, out + block);
  }
  *scale = largest / 127.0f;
  *sum = *scale * MLXEFF_ISA::sum(__builtin_convertvector(total, vf));
}

// x = xd * scale, rounded to nearest, with |xd| as large as three signed bytes allow; where all x are below 2^-100, as
// if one were not. `not_zero` is not 0 any more where an x is not finite.
void round_to_digits(const float* x, int count, int32_t* out, float* scale, float* sum, vf* not_zero) {
  constexpr float limit = 8355700;
  vf most = broadcast(0x1p-100f);
  for (int k = 0; k < count; k += VL) most = max(most, abs(load(x + k)));
  const float largest = max(most);
  const vf inverse = broadcast(limit / largest);
  vi total = {};
  for (int k = 0; k < count; k += VL) {
    *not_zero += load(x + k) - load(x + k);
    const vf v = load(x + k) * inverse, half = (vf)(((vu)v & 0x80000000u) | float_to_bits(0.5f));
    const vi rounded = __builtin_convertvector(v + half, vi);
    total += rounded;
    memcpy(out + k, &rounded, sizeof rounded);
  }
  *scale = largest / limit;
  *sum = *scale * MLXEFF_ISA::sum(__builtin_convertvector(total, vf));
}

// The forms that the kernels of qmatmul_row.h read; x_sum and x_scale end with zeros up to a whole vector.
template <int bits>
void prepare_one_row(const QmmArgs& args) {
  const int64_t K = args.w.K, group = args.w.group, groups = K / group;
  const bool int8 = args.mode == MLXEFF_COMPUTE_INT8;
  if (int8 || by_digits<bits>) memset(args.x_int8, 0, size_t(round_up(K, row_padding) * (int8 ? 1 : digits)));
  if constexpr (!by_digits<bits>)
    if (!int8) arrange_exact<bits>(args.x, args.x_dtype, K, const_cast<float*>(args.x_f32));
  vf not_zero = zero();
  for (int64_t g = 0; g < groups; ++g) {
    float values[128];
    to_floats(values, static_cast<const char*>(args.x) + g * group * int64_t(dtype_size(args.x_dtype)), args.x_dtype,
              group);
    if (int8) {
      int8_t rounded[128];
      round_to_int8(values, int(group), 8, rounded, args.x_scale + g, args.x_sum + g);
      for (int64_t i = 0; i < group; i += 32) arrange_int8<bits>(rounded + i, g * group + i, args.x_int8);
    } else if (by_digits<bits>) {
      int32_t rounded[128];
      round_to_digits(values, int(group), rounded, args.x_scale + g, args.x_sum + g, &not_zero);
      for (int64_t i = 0; i < group; i += 32) arrange_digits<bits>(rounded + i, g * group + i, args.x_int8);
    } else {
      vf total = zero();
      for (int64_t i = 0; i < group; i += VL) total += load(values + i);
      args.x_sum[g] = sum(total);
    }
  }
  const float poison = sum(not_zero);
  for (int64_t g = 0; poison != 0 && g < groups; ++g) args.x_sum[g] = args.x_scale[g] = poison;
  for (int64_t g = groups; g % VL != 0; ++g) {
    args.x_sum[g] = 0;
    if (int8 || by_digits<bits>) args.x_scale[g] = 0;
  }
}

void prepare_row(const QmmArgs& args, int64_t m) {
  if (one_row(args)) {  // the forms for 5 and 6 bits are those for 8
    if (args.w.bits == 4) return prepare_one_row<4>(args);
    if constexpr (row_kernels<5>)
      if (args.w.bits == 5 || args.w.bits == 6) return prepare_one_row<5>(args);
    return prepare_one_row<8>(args);
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
    for (int64_t m = args.M; m < rows_read(args.M, few_rows(args), uses_amx(args)); ++m) clear_row(args, m);
}

int64_t piece(const QmmArgs& args, int threads) {
  return few_rows(args) ? direct_piece(args.w.N, row_bytes(args.w), threads)
                        : panel_piece(args.w.N, uses_amx(args), threads);
}

template <int bits>
int run_bits(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  if constexpr (row_kernels<bits>)
    if (args.M == 1) return run_rows<bits>(args, n_begin, n_end);
  if (few_rows(args)) return run_strips<bits>(args, n_begin, n_end);
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
