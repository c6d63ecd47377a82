// The blocked attention kernel, for prefill and for groups with too many rows for the few-row kernel.
//
//   for each block of keys:  scores = Q K^T;  weights = softmax, online;  O = O * factor + weights V
//
// A task has R * plan.block rows, ordered by position. The keys that a tile of rows sees therefore form one range:
// products are limited to this range, and blocks of keys that no row sees are skipped. K and V of a block are converted
// and packed once for all rows. A panel of K or V stays in the L1 cache while all rows are multiplied with it; the
// scores of a block, the queries and the accumulators stay in L2. Arithmetic is fp32, except that the bf16 mode rounds
// queries, keys, weights and values to bf16 before the products.
#include "attention/attention_products.h"
#include "attention/attention_rows.h"
#include "base/pool.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int64_t key_block = 128;

// The buffers of one thread for blocks of `rows` rows, rounded up to whole row tiles.
template <class Product>
struct BlockBuffers {
  using Operand = typename Product::Operand;
  int64_t depth, width;  // E padded for the products that sum over E; E padded for the accumulators
  Operand *queries, *keys, *values;
  float *scores, *sums;
  RowState* states;

  BlockBuffers(int64_t rows, int64_t E) : depth(round_up(E, Product::depth_step)), width(Panels(E).columns()) {
    const int64_t operands = round_up(depth * (rows + key_block) + key_block * width, 16);
    char* const memory = static_cast<char*>(scratch(
        Scratch::panel,
        size_t(operands) * sizeof(Operand) + size_t(rows * (key_block + width)) * 4 + size_t(rows) * sizeof(RowState)));
    queries = reinterpret_cast<Operand*>(memory);
    if (!memory) return;
    keys = queries + depth * rows;
    values = keys + depth * key_block;
    scores = reinterpret_cast<float*>(memory + operands * int64_t(sizeof(Operand)));
    sums = scores + rows * key_block;
    states = reinterpret_cast<RowState*>(sums + rows * width);
  }
};

static void store_query(float* dst, const float* src, int64_t n) { memcpy(dst, src, size_t(n) * 4); }
#if defined(MLXEFF_AMX)
static void store_query(bf16* dst, const float* src, int64_t n) { convert(dst, src, n); }
#endif

template <class Product>
static bool run_task(const AttentionArgs& a, const AttentionPlan& plan, float* workspace, int64_t task) {
  using Operand = typename Product::Operand;
  const int64_t groups = a.B * a.G, R = a.H / a.G, part = task % plan.parts, bg = task / plan.parts % groups;
  const int64_t block =
      plan.blocks - 1 - task / plan.parts / groups;  // later positions, whose tasks take longest, come first
  const int64_t b = bg / a.G, g = bg % a.G, position = block * plan.block;
  const int64_t positions = min_of(plan.block, a.S - position), rows = positions * R, tile = Product::row_tile;
  const BlockBuffers<Product> buffer(round_up(rows, tile), a.E);
  if (!buffer.queries) return false;
  const int64_t depth = buffer.depth, width = buffer.width;

  const auto range = [&](int64_t row) { return visible_keys(a, position + min_of(row, rows - 1) / R); };
  float* const staging = buffer.scores;
  for (int64_t row = 0; row < round_up(rows, tile); ++row) {
    const int64_t at = min_of(row, rows - 1);
    load_query(staging, depth, head_row(a.q, b, g * R + at % R, position + at / R), a.q.dtype, a.E, a.scale * log2_e);
    store_query(buffer.queries + row * depth, staging, depth);
    buffer.states[row] = {-INFINITY, 0.0f};
  }
  memset(buffer.sums, 0, size_t(round_up(rows, tile) * width) * 4);

  const int64_t part_begin = plan.first_key + part * plan.part_keys;
  const int64_t first = max_of(part_begin, range(0).first),
                last = min_of(part_begin + plan.part_keys, range(rows - 1).last);
  Product::begin();
  for (int64_t key = first; key < last; key += key_block) {
    const int64_t keys = min_of(key_block, last - key);
    const int64_t value_depth = round_up(keys, Product::depth_step);
    Product::pack_transposed(buffer.keys, {head_row(a.k, b, g, key), a.k.token, a.k.dtype}, a.E, keys);
    Product::pack_columns(buffer.values, {head_row(a.v, b, g, key), a.v.token, a.v.dtype}, keys, a.E);
    // The range of keys of this block that the tile of rows starting at `row` sees.
    const auto tile_range = [&](int64_t row) {
      return KeyRange{max_of(0, range(row).first - key), min_of(keys, range(row + tile - 1).last - key)};
    };

    const Panels score_panels(keys), value_panels(a.E);
    for (int64_t p = 0; p < score_panels.count; ++p) {
      const int64_t column = p * score_panels.width * VL;
      const int panel_width = score_panels.width_of(p);
      for (int64_t row = 0; row < rows; row += tile) {
        const KeyRange seen = tile_range(row);
        if (seen.last <= column || seen.first >= column + panel_width * VL) continue;
        Product::multiply(buffer.queries + row * depth, depth, 1, buffer.keys + column * depth, panel_width, depth,
                          buffer.scores + row * key_block + column, key_block, false);
      }
    }
    for (int64_t row = 0; row < round_up(rows, tile); ++row) {
      const KeyRange seen = tile_range(row / tile * tile), own = range(row);
      if (seen.first >= seen.last) continue;
      float* const scores = buffer.scores + row * key_block;
      const int64_t step = max_of(VL, Product::depth_step);
      const float factor =
          softmax_block(scores, reinterpret_cast<Operand*>(scores), seen.first / step * step, round_up(seen.last, step),
                        own.first - key, min_of(keys, own.last - key), &buffer.states[row]);
      scale_row(buffer.sums + row * width, width, factor);
    }
    const int64_t weights_stride = key_block * int64_t(sizeof(float) / sizeof(Operand));
    for (int64_t p = 0; p < value_panels.count; ++p) {
      const int64_t column = p * value_panels.width * VL;
      const int panel_width = value_panels.width_of(p);
      for (int64_t row = 0; row < rows; row += tile) {
        const KeyRange seen = tile_range(row);
        if (seen.first >= seen.last) continue;
        const int64_t begin = seen.first / Product::depth_step * Product::depth_step,
                      end = round_up(seen.last, Product::depth_step);
        Product::multiply(reinterpret_cast<const Operand*>(buffer.scores + row * key_block) + begin, weights_stride, 1,
                          buffer.values + column * value_depth + begin * panel_width * VL, panel_width, end - begin,
                          buffer.sums + row * width + column, width, true);
      }
    }
  }
  Product::end();
  for (int64_t row = 0; row < rows; ++row)
    finish_row(a, plan, workspace, b, g * R + row % R, position + row / R, part, buffer.sums + row * width,
               buffer.states[row]);
  return true;
}

bool run_blocked(const AttentionArgs& a, const AttentionPlan& plan, float* workspace, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
#if defined(MLXEFF_AMX)
    if (a.mode == MLXEFF_COMPUTE_BF16) {
      if (!run_task<Bf16Product>(a, plan, workspace, task)) return false;
      continue;
    }
#endif
    if (!run_task<Fp32Product>(a, plan, workspace, task)) return false;
  }
  return true;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
