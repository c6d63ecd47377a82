// SeedLM products y = x W^T at one instruction-set level: the form of x that each regime reads, and the choice of the regime.
//
// Few rows of x: a row of W at a time, VL of its blocks in the lanes, decoded to exact fp32 and used for all rows of x while in registers;
// the lanes of the sums are added at the row's end. x is stored as [chunk of VL blocks][column of the block][lane]. Many rows of x:
// seedlm_panel.h.
#include "seedlm_panel.h"

namespace mlxeff {
namespace MLXEFF_ISA {
namespace {

constexpr int few_rows = 8;

bool uses_amx(const SeedArgs& args) {
#if defined(MLXEFF_AMX)
  return args.mode == MLXEFF_COMPUTE_BF16 && args.M > few_rows;
#else
  (void)args;
  return false;
#endif
}

int64_t few_stride(const SeedArgs& args) { return round_up(blocks_a_row(args.w), VL) * args.w.columns; }

size_t workspace_bytes(const SeedArgs& args) {
  if (uses_amx(args)) return size_t(round_up(args.M, 32) * amx_panel_stride(args)) * 2;
  return size_t(args.M * (args.M > few_rows ? panel_stride(args) : few_stride(args))) * 4;
}

void bind(SeedArgs& args, void* workspace) {
  args.x_f32 = static_cast<float*>(workspace);
  args.x_bf16 = static_cast<bf16*>(workspace);
}

// One row of x in the order of the few-rows kernel, padded with zeros.
void arrange(const void* x, int dtype, int64_t K, int C, int64_t stride, float* out) {
  const int64_t step = C * VL, size = int64_t(dtype_size(dtype));
  for (int64_t k = 0; k < stride; k += step, out += step) {
    float natural[12 * VL] = {};
    if (k < K) to_floats(natural, static_cast<const char*>(x) + k * size, dtype, min_of(step, K - k));
    for (int lane = 0; lane < VL; ++lane)
      for (int c = 0; c < C; ++c) out[c * VL + lane] = natural[lane * C + c];
  }
}

void to_bf16_row(bf16* out, const void* x, int dtype, int64_t K, int64_t stride) {
  if (dtype == MLXEFF_BF16) memcpy(out, x, size_t(K) * 2);
  else if (dtype == MLXEFF_F16) convert(out, static_cast<const f16*>(x), K);
  else convert(out, static_cast<const float*>(x), K);
  memset(out + K, 0, size_t(stride - K) * 2);
}

// Whoever prepares the last row also clears the rows that exist only in the workspace.
void prepare(const SeedArgs& args, int64_t m_begin, int64_t m_end) {
  const int64_t K = args.w.K;
  for (int64_t m = m_begin; m < m_end; ++m) {
    const char* const x = static_cast<const char*>(args.x) + m * args.ldx * int64_t(dtype_size(args.x_dtype));
    if (uses_amx(args)) to_bf16_row(args.x_bf16 + m * amx_panel_stride(args), x, args.x_dtype, K, amx_panel_stride(args));
    else if (args.M > few_rows) to_floats(args.x_f32 + m * panel_stride(args), x, args.x_dtype, K);
    else arrange(x, args.x_dtype, K, args.w.columns, few_stride(args), args.x_f32 + m * few_stride(args));
  }
  if (uses_amx(args) && m_end == args.M)
    memset(args.x_bf16 + args.M * amx_panel_stride(args), 0, size_t((round_up(args.M, 32) - args.M) * amx_panel_stride(args)) * 2);
}

int64_t piece(const SeedArgs& args, int threads) {
  if (args.M > few_rows) return panel_width;
  const int64_t weights = 1 << 17;  // enough to hide the cost of sharing
  return max_of(1, min_of(weights / max_of(1, args.w.K), args.w.N / (threads * 4)));
}

template <int C, int P, int M>
int run_few(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_seedlm_weight w = args.w;
  const int64_t per_row = blocks_a_row(w), ldx = few_stride(args);
  for (int64_t n = n_begin; n < n_end; ++n) {
    vf sums[M][2] = {};
    const float* x = args.x_f32;
    for (int64_t j = 0; j < per_row; j += VL, x += C * VL) {
      const Blocks<C, P> blocks = Blocks<C, P>::of_row(w, n, j, per_row);
      decode_columns<C, P>(blocks, w, [&](int c, vf weight) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m][c % 2] = fma(weight, load(x + m * ldx + c * VL), sums[m][c % 2]);
      });
    }
    for (int m = 0; m < M; ++m) store_value(args.y, args.y_dtype, m * args.ldy + n, sum(sums[m][0] + sums[m][1]));
  }
  return MLXEFF_OK;
}

template <int C, int P>
int run_blocks(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  switch (args.M) {
    case 1: return run_few<C, P, 1>(args, n_begin, n_end);
    case 2: return run_few<C, P, 2>(args, n_begin, n_end);
    case 3: return run_few<C, P, 3>(args, n_begin, n_end);
    case 4: return run_few<C, P, 4>(args, n_begin, n_end);
    case 5: return run_few<C, P, 5>(args, n_begin, n_end);
    case 6: return run_few<C, P, 6>(args, n_begin, n_end);
    case 7: return run_few<C, P, 7>(args, n_begin, n_end);
    case 8: return run_few<C, P, 8>(args, n_begin, n_end);
  }
#if defined(MLXEFF_AMX)
  if (uses_amx(args)) return run_panel_amx<C, P>(args, n_begin, n_end);
#endif
  return run_panel<C, P>(args, n_begin, n_end);
}

int run(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  if (args.w.states == 3) return run_blocks<8, 3>(args, n_begin, n_end);
  if (args.w.columns == 8) return run_blocks<8, 4>(args, n_begin, n_end);
  return run_blocks<12, 4>(args, n_begin, n_end);
}

template <int C, int P>
void decode_row_blocks(const mlxeff_seedlm_weight& w, int64_t n, void* out, int out_dtype) {
  const int64_t per_row = blocks_a_row(w), size = int64_t(dtype_size(out_dtype));
  for (int64_t j = 0; j * C < w.K; j += VL) {
    float columns[C][VL], values[C * VL];
    decode_columns<C, P>(Blocks<C, P>::of_row(w, n, j, per_row), w, [&](int c, vf weight) { store(columns[c], weight); });
    for (int i = 0; i < VL; ++i)
      for (int c = 0; c < C; ++c) values[i * C + c] = columns[c][i];
    from_floats(static_cast<char*>(out) + j * C * size, out_dtype, values, min_of(C * VL, w.K - j * C));
  }
}

void decode_row(const mlxeff_seedlm_weight& w, int64_t n, void* out, int out_dtype) {
  if (w.states == 3) return decode_row_blocks<8, 3>(w, n, out, out_dtype);
  if (w.columns == 8) return decode_row_blocks<8, 4>(w, n, out, out_dtype);
  decode_row_blocks<12, 4>(w, n, out, out_dtype);
}

}  // namespace

const SeedlmKernels& seedlm_kernels() {
  static const SeedlmKernels table = {workspace_bytes, bind, prepare, piece, run, decode_row};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
