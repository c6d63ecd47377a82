// SeedLM products with few rows of x in fp32. They process one row of W at a time, with VL of its blocks in the lanes,
// and add up the lanes of the sums at the end of the row. x is stored as [chunk of VL blocks][column of the
// block][lane], with zeros beyond K.
//
// One row of x: y = sum over blocks of 2^e / 32767 * sum over p of q[p] * (sum over c of x[c] * (V[c][p] - 32768)),
// computed without forming a weight. In the stored x, the columns of a chunk are followed by P vectors of -centre * sum
// of x[c] (see seedlm_decode.h), which are the initial values of the sums over c. The sums add products of x and
// factors up to 5, although the effective factors lie between -1/2 and 1/2, so their rounding error is several times
// larger than that of a product with decoded weights.
//
// More rows: weights are decoded to exact fp32 and multiplied with all rows of x while they are in registers.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "products/product_output.h"
#include "seedlm/seedlm_decode.h"
#include "seedlm/seedlm_kernels.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// The number of windows that share one shift in the product with one row of x. More windows need fewer shifts but give
// larger factors, and hence more rounding error.
template <int P>
constexpr int shared_shift = P == 3 ? 3 : 2;

// The number of vectors that a chunk of VL blocks occupies in the stored x.
MLXEFF_INLINE int64_t chunk_vectors(const SeedArgs& args) { return args.w.columns + (args.M == 1 ? args.w.states : 0); }
MLXEFF_INLINE int64_t chunks_a_row(const SeedArgs& args) { return ceil_div(seed_row_blocks(args.w).used, VL); }

// Calls body(chunk, columns) for each chunk of one row of x; `columns` holds the chunk's part of x as [C][VL].
template <class Body>
MLXEFF_INLINE void each_chunk(const SeedArgs& args, const void* x, Body body) {
  const int C = args.w.columns;
  const int64_t step = C * VL, size = int64_t(dtype_size(args.x_dtype)), chunks = chunks_a_row(args);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t k = i * step;
    float natural[12 * VL] = {}, columns[12 * VL];
    if (k < args.w.K)
      to_floats(natural, static_cast<const char*>(x) + k * size, args.x_dtype, min_of(step, args.w.K - k));
    for (int lane = 0; lane < VL; ++lane)
      for (int c = 0; c < C; ++c) columns[c * VL + lane] = natural[lane * C + c];
    body(i, columns);
  }
}

static void prepare_few(const SeedArgs& args, const void* x, float* out) {
  const int C = args.w.columns, P = args.w.states;
  const int64_t stride = chunk_vectors(args) * VL;
  each_chunk(args, x, [&](int64_t i, const float* columns) {
    float* const chunk = out + i * stride;
    vf total = zero();
    for (int c = 0; c < C; ++c) total += load(columns + c * VL);
    memcpy(chunk, columns, size_t(C * VL) * 4);
    for (int p = 0; p < P && args.M == 1; ++p)
      store(chunk + (C + p) * VL, total * -(P == 3 ? centre<3>(p) : centre<2>(p % 2)));
  });
}

template <int C, int P>
static int run_one(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  constexpr int G = shared_shift<P>;
  const mlxeff_seedlm_weight w = args.w;
  const SeedRowBlocks a_row = seed_row_blocks(w);
  for (int64_t n = n_begin; n < n_end; ++n) {
    vf total = zero();
    const float* x = args.x_f32;
    for (int64_t j = 0; j < a_row.used; j += VL, x += (C + P) * VL) {
      const Blocks<C, P> blocks = Blocks<C, P>::of_row(w, n, j, a_row);
      vf sums[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[p] = load(x + (C + p) * VL);
#pragma GCC unroll 12
      for (int c = 0; c < C; ++c) {
        const vf value = load(x + c * VL);
        vu windows;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          if (p % G == 0) windows = blocks.template windows<G>(c * P + p);
          sums[p] = fma(blocks.template fraction<G>(windows, p % G), value, sums[p]);
        }
      }
      vf sum = blocks.coefficient(0) * sums[0];
#pragma GCC unroll 4
      for (int p = 1; p < P; ++p) sum = fma(blocks.coefficient(p), sums[p], sum);
      total = fma(sum, blocks.scale(w), total);
    }
    store_sum(sum(total), args.y, 0, n);
  }
  return MLXEFF_OK;
}

template <int C, int P, int M>
static int run_few(const SeedArgs& args, int64_t n_begin, int64_t n_end) {
  if constexpr (M == 1) return run_one<C, P>(args, n_begin, n_end);
  const mlxeff_seedlm_weight w = args.w;
  const SeedRowBlocks a_row = seed_row_blocks(w);
  const int64_t ldx = args.ldx_few;
  for (int64_t n = n_begin; n < n_end; ++n) {
    vf sums[M][2] = {};
    const float* x = args.x_f32;
    for (int64_t j = 0; j < a_row.used; j += VL, x += C * VL) {
      const Blocks<C, P> blocks = Blocks<C, P>::of_row(w, n, j, a_row);
      decode_columns<C, P>(blocks, w, [&](int c, vf weight) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m][c % 2] = fma(weight, load(x + m * ldx + c * VL), sums[m][c % 2]);
      });
    }
    for (int m = 0; m < M; ++m) store_sum(sum(sums[m][0] + sums[m][1]), args.y, m, n);
  }
  return MLXEFF_OK;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
