// The table of SeedLM products y = x W^T of one instruction-set level. It selects the product by the number of rows M,
// the mode and the CPU: seedlm_few.h and seedlm_int8.h hold the products for few rows of x, and seedlm_panel.h those
// for many.
#include "seedlm/seedlm_int8.h"
#include "seedlm/seedlm_panel.h"

namespace mlxeff {
namespace MLXEFF_ISA {
namespace {

constexpr int few_rows = 8;

enum class Regime { few, int8, panel, amx };

Regime regime(const SeedArgs& args) {
#if defined(MLXEFF_AMX)
  if (args.mode != MLXEFF_EXACT && args.M > few_rows) return Regime::amx;
#endif
#if defined(__AVX512F__)
  if (args.mode == MLXEFF_COMPUTE_INT8 && args.M <= few_rows && has_byte_permutes()) return Regime::int8;
#endif
  return args.M <= few_rows ? Regime::few : Regime::panel;
}

// The row stride, in bytes, of x in the layout that the kernels read.
int64_t row_bytes(const SeedArgs& args) {
  switch (regime(args)) {
    case Regime::few: return chunks_a_row(args) * chunk_vectors(args) * VL * 4;
#if defined(__AVX512F__)
    case Regime::int8: return chunks_a_row(args) * int8_chunk_bytes(args);
#endif
    case Regime::amx: return amx_panel_stride(args) * 2;
    default: return panel_stride(args) * 4;
  }
}

size_t workspace_bytes(const SeedArgs& args) {
  return size_t(row_bytes(args) * (regime(args) == Regime::amx ? round_up(args.M, 32) : args.M));
}

void bind(SeedArgs& args, void* workspace) {
  args.x_f32 = static_cast<float*>(workspace);
  args.x_bf16 = static_cast<bf16*>(workspace);
  args.x_int8 = static_cast<char*>(workspace);
  args.ldx_few = row_bytes(args) / (regime(args) == Regime::few ? 4 : 1);
}

void to_bf16_row(bf16* out, const void* x, int dtype, int64_t K, int64_t stride) {
  if (dtype == MLXEFF_BF16) memcpy(out, x, size_t(K) * 2);
  else if (dtype == MLXEFF_F16) convert(out, static_cast<const f16*>(x), K);
  else convert(out, static_cast<const float*>(x), K);
  memset(out + K, 0, size_t(stride - K) * 2);
}

// Converts rows [m_begin, m_end) of x. The call that converts the last row also clears the padding rows of the
// workspace.
void prepare(const SeedArgs& args, int64_t m_begin, int64_t m_end) {
  const int64_t K = args.w.K, stride = row_bytes(args);
  const Regime chosen = regime(args);
  for (int64_t m = m_begin; m < m_end; ++m) {
    const char* const x = static_cast<const char*>(args.x) + m * args.ldx * int64_t(dtype_size(args.x_dtype));
    char* const out = args.x_int8 + m * stride;
    if (chosen == Regime::amx) to_bf16_row(reinterpret_cast<bf16*>(out), x, args.x_dtype, K, amx_panel_stride(args));
    else if (chosen == Regime::panel) to_floats(reinterpret_cast<float*>(out), x, args.x_dtype, K);
    else if (chosen == Regime::few) prepare_few(args, x, reinterpret_cast<float*>(out));
#if defined(__AVX512F__)
    else prepare_int8(args, x, out);
#endif
  }
  if (chosen == Regime::amx && m_end == args.M)
    memset(args.x_int8 + args.M * stride, 0, size_t((round_up(args.M, 32) - args.M) * stride));
}

int64_t piece(const SeedArgs& args, int threads) {
  if (args.M > few_rows) return panel_width;
  const int64_t weights = 1 << 17;  // per piece: enough to hide the cost of distributing work
  return max_of(1, min_of(weights / max_of(1, args.w.K), args.w.N / (threads * 4)));
}

template <int C, int P, int M>
int run_rows(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
#if defined(__AVX512F__)
  if (regime(args) == Regime::int8) return run_int8<C, P, M>(args, n_begin, n_end);
#endif
  return run_few<C, P, M>(args, n_begin, n_end);
}

template <int C, int P>
int run_blocks(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  switch (args.M) {
    case 1: return run_rows<C, P, 1>(args, n_begin, n_end);
    case 2: return run_rows<C, P, 2>(args, n_begin, n_end);
    case 3: return run_rows<C, P, 3>(args, n_begin, n_end);
    case 4: return run_rows<C, P, 4>(args, n_begin, n_end);
    case 5: return run_rows<C, P, 5>(args, n_begin, n_end);
    case 6: return run_rows<C, P, 6>(args, n_begin, n_end);
    case 7: return run_rows<C, P, 7>(args, n_begin, n_end);
    case 8: return run_rows<C, P, 8>(args, n_begin, n_end);
  }
#if defined(MLXEFF_AMX)
  if (regime(args) == Regime::amx) return run_panel_amx<C, P>(args, n_begin, n_end);
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
  const SeedRowBlocks a_row = seed_row_blocks(w);
  const int64_t size = int64_t(dtype_size(out_dtype));
  for (int64_t j = 0; j * C < w.K; j += VL) {
    float columns[C][VL], values[C * VL];
    decode_columns<C, P>(Blocks<C, P>::of_row(w, n, j, a_row), w, [&](int c, vf weight) { store(columns[c], weight); });
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
  static const SeedlmKernels table = {{workspace_bytes, bind, prepare, piece, run}, decode_row};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
