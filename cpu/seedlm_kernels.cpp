// SeedLM products y = x W^T at one instruction-set level. Weights are decoded to exact fp32 (seedlm_decode.h):
//
//   few rows   a row of W at a time, VL of its blocks in the lanes, used for all rows of x while in registers; the lanes of the sums are
//              added at the row's end. x is stored as [chunk of VL blocks][column of the block][lane].
//   many rows  2 * VL rows of W, one in each lane, into a panel in the cache that meets all rows of x (gemm_tile.h)
//
// In mode BF16 the panel and x are rounded to bf16 where there are AMX tiles; every other product is exact fp32 products and sums.
#include "seedlm_kernels.h"

#include "amx_tile.h"
#include "gemm_tile.h"
#include "pool.h"
#include "seedlm_decode.h"

namespace mlxeff {
namespace MLXEFF_ISA {
namespace {

constexpr int few_rows = 8;
constexpr int64_t panel_k = 256;        // 256 x 32 fp32 = 32 KiB stay in the first-level cache
constexpr int64_t rows_at_once = 1024;  // of x, before a panel is decoded anew; bounds the accumulators

bool uses_amx(const SeedArgs& args) {
#if defined(MLXEFF_AMX)
  return args.mode == MLXEFF_COMPUTE_BF16 && args.M > few_rows;
#else
  (void)args;
  return false;
#endif
}

int64_t row_floats(const SeedArgs& args) {  // of x
  return args.M > few_rows ? padded_stride(args.w.K, 4) : round_up(blocks_a_row(args.w), VL) * args.w.columns;
}

size_t workspace_bytes(const SeedArgs& args) {
  if (uses_amx(args)) return size_t(round_up(args.M, 32) * padded_stride(round_up(args.w.K, 2), 2) * 2);
  return size_t(args.M * row_floats(args)) * 4;
}

void bind(SeedArgs& args, void* workspace) {
  args.x_f32 = static_cast<float*>(workspace);
  args.x_bf16 = static_cast<bf16*>(workspace);
}

// One row of x in the order of the few-rows kernel.
void arrange(const float* x, int64_t K, int C, int64_t chunks, float* out) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk, out += C * VL)
    for (int lane = 0; lane < VL; ++lane)
      for (int c = 0; c < C; ++c) {
        const int64_t k = (chunk * VL + lane) * C + c;
        out[c * VL + lane] = k < K ? x[k] : 0.0f;
      }
}

void prepare(const SeedArgs& args, int64_t m_begin, int64_t m_end) {
  const int64_t K = args.w.K;
  for (int64_t m = m_begin; m < m_end; ++m) {
    const char* const x = static_cast<const char*>(args.x) + m * args.ldx * int64_t(dtype_size(args.x_dtype));
    float* const out = args.x_f32 + m * row_floats(args);
    if (args.M > few_rows) {
      to_floats(out, x, args.x_dtype, K);
    } else {
      float* const natural = static_cast<float*>(scratch(Scratch::strip, size_t(K) * 4));
      to_floats(natural, x, args.x_dtype, K);
      arrange(natural, K, args.w.columns, ceil_div(blocks_a_row(args.w), VL), out);
    }
  }
}

int64_t piece(const SeedArgs& args, int threads) {
  if (args.M > few_rows) return panel_width;
  const int64_t weights = 1 << 17;  // enough to hide the cost of sharing
  return max_of(1, min_of(weights / max_of(1, args.w.K), args.w.N / (threads * 4)));
}

template <int C, int P, int M>
int run_few(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_seedlm_weight w = args.w;
  const int64_t per_row = blocks_a_row(w), ldx = row_floats(args);
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
int run_panel(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_seedlm_weight w = args.w;
  const int64_t per_row = blocks_a_row(w), ldx = row_floats(args), step = panel_k / C;
  float* const panel = static_cast<float*>(scratch(Scratch::panel, size_t(panel_k * panel_width) * 4));
  float* const sums = static_cast<float*>(scratch(Scratch::accumulator, size_t(min_of(args.M, rows_at_once) * panel_width) * 4));
  if (!panel || !sums) return MLXEFF_NO_MEMORY;
  for (int64_t n = n_begin; n < n_end; n += panel_width)
    for (int64_t m = 0; m < args.M; m += rows_at_once) {
      const int64_t rows = min_of(rows_at_once, args.M - m), columns = min_of(panel_width, n_end - n);
      for (int64_t j = 0; j * C < w.K; j += step) {
        const int64_t j_end = min_of(per_row, j + step);
        for (int half = 0; half < 2 && half * VL < columns; ++half)
          for (int64_t i = j; i < j_end; ++i)
            decode_columns<C, P>(Blocks<C, P>::of_rows(w, n + half * VL, columns - half * VL, i, per_row), w,
                                 [&](int c, vf weight) { store(panel + ((i - j) * C + c) * panel_width + half * VL, weight); });
        gemm_panel(args.x_f32 + m * ldx + j * C, ldx, rows, panel, min_of(step * C, w.K - j * C), sums, j > 0);
      }
      store_columns(sums, panel_width, rows, columns, args.y, args.ldy, args.y_dtype, m * args.ldy + n);
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
