// The gradients of attention in fp32. The weights P are recomputed block by block from q, k and the forward pass's
// logsumexp `lse`.
//
//   P = exp(scale q k^T - lse),  dP = dout v^T,  dS = P * (dP - D)  with  D = sum over E of dout * out
//   dv = P^T dout,  dq = scale dS k,  dk = scale dS^T q
//
// One pass over blocks of queries computes dq, and one over blocks of keys computes dk and dv. A single task sums each
// block in a fixed order. P and dS are therefore computed twice, but the result does not depend on the number of
// threads. dk and dv are sums over the query heads of a group. Blocks that are hidden by the causal mask or the window
// are skipped.
#include "attention/attention_products.h"
#include "attention/attention_rows.h"
#include "base/pool.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int64_t tile = row_tile_fp32, block = backward_block;
// The row stride of a block of P or dS, padded so that the product kernel can read whole row tiles of the transposed
// block.
constexpr int64_t block_stride = (block + tile + VL - 1) / VL * VL;

void backward_row_dots(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  const AttentionArgs& a = args.forward;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t i = index % a.S, h = index / a.S % a.H, b = index / a.S / a.H;
    const char *out = head_row(a.out, b, h, i), *dout = head_row(args.dout, b, h, i);
    vf total = zero();
    for (int64_t e = 0; e < a.E; e += VL)
      total =
          fma(load_any_first(out, a.out.dtype, e, a.E - e), load_any_first(dout, args.dout.dtype, e, a.E - e), total);
    args.row_dot[index] = sum(total);
  }
}

// The buffers of one thread. `rows` counts the rows of a block of query positions, for all query heads of a group.
struct BackwardBuffers {
  int64_t rows, width;  // rows rounded up to whole tiles; E rounded up to whole vectors
  float *queries, *douts, *query_panels, *dout_panels, *keys_t, *values_t, *key_panels, *weights, *dscores, *dq, *dk,
      *dv;
  bool valid;

  BackwardBuffers(int64_t R, int64_t E) : rows(round_up(block * R, tile)), width(Panels(E).columns()) {
    const int64_t per_query = rows * width, per_key = (block + tile) * width, square = rows * block_stride;
    float* p = static_cast<float*>(scratch(Scratch::panel, size_t(5 * per_query + 5 * per_key + 2 * square) * 4));
    valid = p != nullptr;
    if (!valid) return;
    float** const of_queries[] = {&queries, &douts, &query_panels, &dout_panels, &dq};
    float** const of_keys[] = {&keys_t, &values_t, &key_panels, &dk, &dv};
    for (float** buffer : of_queries) *buffer = p, p += per_query;
    for (float** buffer : of_keys) *buffer = p, p += per_key;
    weights = p, dscores = p + square;
    memset(weights, 0, size_t(2 * square) * 4);
  }
};

struct QueryBlock {
  int64_t b, g, position, positions, rows;
  QueryBlock(const AttentionArgs& a, int64_t b, int64_t g, int64_t position)
      : b(b), g(g), position(position), positions(min_of(block, a.S - position)), rows(positions * (a.H / a.G)) {}
};

// Loads q * scale * log2(e) to `queries` and dout to `douts`, one row of E elements per query. Rows that pad the last
// tile are zero.
static void load_query_block(const AttentionBackwardArgs& args, const QueryBlock& at, const BackwardBuffers& buffer) {
  const AttentionArgs& a = args.forward;
  const int64_t R = a.H / a.G, padding = (round_up(at.rows, tile) - at.rows) * a.E;
  for (int64_t row = 0; row < at.rows; ++row) {
    const int64_t h = at.g * R + row % R, i = at.position + row / R;
    load_query(buffer.queries + row * a.E, a.E, head_row(a.q, at.b, h, i), a.q.dtype, a.E, a.scale * log2_e);
    to_floats(buffer.douts + row * a.E, head_row(args.dout, at.b, h, i), args.dout.dtype, a.E);
  }
  memset(buffer.queries + at.rows * a.E, 0, size_t(padding) * 4);
  memset(buffer.douts + at.rows * a.E, 0, size_t(padding) * 4);
}

// Computes c (m, n) = A @ b, or adds the product to c if `accumulate`; b holds (depth, n) in packed panels. Writes
// whole row tiles, so c needs room for m rounded up to a whole tile.
static void multiply_all(const float* a, int64_t a_row, int64_t a_step, int64_t m, const float* b, int64_t depth,
                         int64_t n, float* c, int64_t ldc, bool accumulate) {
  const Panels panels(n);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t column = p * panels.width * VL;
    for (int64_t i = 0; i < m; i += tile)
      Fp32Product::multiply(a + i * a_row, a_row, a_step, b + column * depth, panels.width_of(p), depth,
                            c + i * ldc + column, ldc, accumulate);
  }
}

// Computes weights = P and dscores = dS for a block of rows and the keys [key, key + count), whose transposed keys and
// values are already packed.
static void recompute(const AttentionBackwardArgs& args, const QueryBlock& at, int64_t key, int64_t count,
                      const BackwardBuffers& buffer) {
  const AttentionArgs& a = args.forward;
  const int64_t R = a.H / a.G;
  multiply_all(buffer.queries, a.E, 1, at.rows, buffer.keys_t, a.E, count, buffer.weights, block_stride, false);
  multiply_all(buffer.douts, a.E, 1, at.rows, buffer.values_t, a.E, count, buffer.dscores, block_stride, false);
  for (int64_t row = 0; row < at.rows; ++row) {
    const int64_t i = at.position + row / R, index = (at.b * a.H + at.g * R + row % R) * a.S + i;
    const KeyRange seen = visible_keys(a, i);
    const float lse = a.lse[index] * log2_e, dot = args.row_dot[index];
    float *const weights = buffer.weights + row * block_stride, *const dscores = buffer.dscores + row * block_stride;
    for (int64_t j = 0; j < count; j += VL) {
      const vi column = lane_numbers() + int32_t(j);
      const vi hidden = (column < int32_t(seen.first - key)) | (column >= int32_t(min_of(count, seen.last - key)));
      const vf weight = hidden ? zero() : vexp2(load(weights + j) - lse);
      store(weights + j, weight);
      store(dscores + j, hidden ? zero() : weight * (load(dscores + j) - dot));
    }
  }
}

static void store_rows(const Heads& dst, int64_t b, int64_t h, int64_t token, float* row, int64_t E, float factor) {
  for (int64_t e = 0; e < E; ++e) row[e] *= factor;
  from_floats(head_row(dst, b, h, token), dst.dtype, row, E);
}

static Source tokens_from(const Heads& x, int64_t b, int64_t g, int64_t token) {
  return {head_row(x, b, g, token), x.token, x.dtype};
}

bool backward_queries(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  const AttentionArgs& a = args.forward;
  const int64_t R = a.H / a.G, blocks = ceil_div(a.S, block);
  const BackwardBuffers buffer(R, a.E);
  if (!buffer.valid) return false;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task % (a.B * a.G) / a.G, g = task % a.G;
    const QueryBlock at(a, b, g, (blocks - 1 - task / (a.B * a.G)) * block);
    load_query_block(args, at, buffer);
    memset(buffer.dq, 0, size_t(buffer.rows * buffer.width) * 4);
    const int64_t last = visible_keys(a, at.position + at.positions - 1).last;
    for (int64_t key = visible_keys(a, at.position).first; key < last; key += block) {
      const int64_t count = min_of(block, last - key);
      Fp32Product::pack_transposed(buffer.keys_t, tokens_from(a.k, b, g, key), a.E, count);
      Fp32Product::pack_transposed(buffer.values_t, tokens_from(a.v, b, g, key), a.E, count);
      Fp32Product::pack_columns(buffer.key_panels, tokens_from(a.k, b, g, key), count, a.E);
      recompute(args, at, key, count, buffer);
      multiply_all(buffer.dscores, block_stride, 1, at.rows, buffer.key_panels, count, a.E, buffer.dq, buffer.width,
                   true);
    }
    for (int64_t row = 0; row < at.rows; ++row)
      store_rows(args.dq, b, g * R + row % R, at.position + row / R, buffer.dq + row * buffer.width, a.E, a.scale);
  }
  return true;
}

bool backward_keys(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  const AttentionArgs& a = args.forward;
  const int64_t R = a.H / a.G;
  const BackwardBuffers buffer(R, a.E);
  if (!buffer.valid) return false;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task % (a.B * a.G) / a.G, g = task % a.G, key = task / (a.B * a.G) * block,
                  count = min_of(block, a.T - key);
    Fp32Product::pack_transposed(buffer.keys_t, tokens_from(a.k, b, g, key), a.E, count);
    Fp32Product::pack_transposed(buffer.values_t, tokens_from(a.v, b, g, key), a.E, count);
    memset(buffer.dk, 0, size_t((block + tile) * buffer.width) * 4);
    memset(buffer.dv, 0, size_t((block + tile) * buffer.width) * 4);
    // The loop starts at the first position that sees any of these keys, and ends where the keys lie outside the
    // window.
    for (int64_t position = max_of(0, key - (a.T - a.S)); position < a.S; position += block) {
      if (visible_keys(a, position).first >= key + count) break;
      const QueryBlock at(a, b, g, position);
      load_query_block(args, at, buffer);
      Fp32Product::pack_columns(buffer.query_panels, {reinterpret_cast<const char*>(buffer.queries), a.E, MLXEFF_F32},
                                at.rows, a.E);
      Fp32Product::pack_columns(buffer.dout_panels, {reinterpret_cast<const char*>(buffer.douts), a.E, MLXEFF_F32},
                                at.rows, a.E);
      recompute(args, at, key, count, buffer);
      multiply_all(buffer.weights, 1, block_stride, count, buffer.dout_panels, at.rows, a.E, buffer.dv, buffer.width,
                   true);
      multiply_all(buffer.dscores, 1, block_stride, count, buffer.query_panels, at.rows, a.E, buffer.dk, buffer.width,
                   true);
    }
    for (int64_t j = 0; j < count; ++j) {
      store_rows(args.dk, b, g, key + j, buffer.dk + j * buffer.width, a.E, ln_2);  // the queries carry scale * log2(e)
      store_rows(args.dv, b, g, key + j, buffer.dv + j * buffer.width, a.E, 1.0f);
    }
  }
  return true;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
