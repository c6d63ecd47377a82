// The two products of the attention to one part of the sequence: of queries with keys, and of weights with values.
// plane_attend.cpp has the formulas.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include "kv/plane_attend.h"
#include "kv/plane_products.h"

namespace mlxeff {
namespace MLXEFF_ISA {

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int most_rows = 4, score_units = 2;  // for 32 vector registers
#else
constexpr int most_rows = 2, score_units = 1;  // for 16 vector registers
#endif

// One row of queries, or of weights.
struct Row {
  int64_t first, last;  // the tokens that the row sees
  float step;           // the value of 1 in the integers of the query or, later, of the weights
  float sum_q;          // the sum of the query's integers, times step
  int32_t digit_sums[2];
  float max, sum, constant;  // of the part: largest score, sum of weights p, sum of p * middle
};

// One task.
struct Part {
  const PlaneArgs& a;
  int64_t begin, count;           // the first tile, the number of tiles
  const PlaneTile *tiles, *next;  // the tiles, and those of the next task, null if there is none
  Row* row;
  float* scores;              // of each row: part_tokens; then the weights w
  float *scales, *middles;    // of the values: part_tokens
  int8_t *queries, *weights;  // of each row: the high digits, then the low ones; E or part_tokens of each

  const int8_t* query(int64_t r, int digit) const { return queries + (2 * r + digit) * a.sizes.size; }
  int8_t* weight(int64_t r, int digit) const { return weights + (2 * r + digit) * plane_part_tokens; }
};

// What one task reads is prefetched during the one before it, keys with keys and values with values, so that memory is
// read all the time, also while weights are computed. A place of the next task's tile, or of no tile:
MLXEFF_INLINE void prefetch(const void* tile, int64_t place) {
  if (tile) __builtin_prefetch(static_cast<const char*>(tile) + place, 0, 2);
}

// x, with NaN in place of infinity.
MLXEFF_INLINE vf nan_if_infinite(vf x) { return x + (x - x); }

// Computes the scores of the tokens from t on, VL of each of the `units` tiles that begin at index.
template <bool full, int rows, int units>
MLXEFF_INLINE void score_lanes(const Part& x, int64_t row, int64_t index, int64_t t) {
  vi sums[units][rows][2];
  const uint8_t *upper[units], *lower[units];
  for (int u = 0; u < units; ++u) {
    upper[u] = x.tiles[index + u].upper_keys + 4 * t;
    lower[u] = full ? x.tiles[index + u].lower_keys + 4 * t : upper[u];
    for (int r = 0; r < rows; ++r)
      for (int digit = 0; digit < 2; ++digit) sums[u][r][digit] = vi{} - code_offset * x.row[row + r].digit_sums[digit];
  }
  const int8_t* const queries = x.query(row, 0);
  const int64_t E = x.a.sizes.size;
  const PlaneTile* const next = row == 0 && x.next ? x.next + index : nullptr;
  for (int u = 0; u < units && next && t == 0; ++u) prefetch(next[u].key_scales, 0), prefetch(next[u].value_scales, 0);
  for (int64_t e = 0; e < E; e += 8) {
    Codes<full> codes[units];
    for (int u = 0; u < units; ++u) {
      codes[u] = load_codes<full>(upper[u] + e * 8, lower[u] + e * 8);
      if (next && t == 0) prefetch(next[u].upper_keys, e * 8), prefetch(next[u].lower_keys, e * 8);
    }
    for (int r = 0; r < rows; ++r)
      for (int digit = 0; digit < 2; ++digit) {
        const int8_t* const q = queries + (2 * r + digit) * E + e;
        const int32_t low = load_four(q), high = load_four(q + 4);
        for (int u = 0; u < units; ++u) sums[u][r][digit] = add_products<full>(sums[u][r][digit], codes[u], low, high);
      }
  }
  for (int u = 0; u < units; ++u) {
    const PlaneTile& tile = x.tiles[index + u];
    const vf scale = nan_if_infinite(load(tile.key_scales + t)), zeros = nan_if_infinite(load(tile.key_zeros + t)),
             middle = fma(scale, broadcast(full ? 8.0f : 8.0f + upper_middle), zeros);
    float* const scores = x.scores + row * plane_part_tokens + (index + u) * tile_tokens + t;
    for (int r = 0; r < rows; ++r) {
      const vf product = __builtin_convertvector(sums[u][r][0] * 256 + sums[u][r][1], vf);
      store(scores + r * plane_part_tokens,
            fma(product * (x.row[row + r].step * 0.0625f), scale, middle * x.row[row + r].sum_q));
    }
  }
}

template <int rows, int units>
MLXEFF_INLINE void score_tiles(const Part& x, int64_t row, int64_t index) {
  for (int64_t t = 0; t < tile_tokens; t += VL) {
    if (x.tiles[index].lower_keys) score_lanes<true, rows, units>(x, row, index, t);
    else score_lanes<false, rows, units>(x, row, index, t);
  }
}

template <int rows>
static void score_rows(const Part& x, int64_t row) {
  int64_t index = 0;
  for (; index + score_units <= x.count; index += score_units) {
    if (!x.tiles[index].lower_keys == !x.tiles[index + score_units - 1].lower_keys) {
      score_tiles<rows, score_units>(x, row, index);
    } else {
      for (int u = 0; u < score_units; ++u) score_tiles<rows, 1>(x, row, index + u);
    }
  }
  for (; index < x.count; ++index) score_tiles<rows, 1>(x, row, index);
}

// Adds the products of one half of a tile's values, 8 tokens, with the weights of the rows.
template <bool full, int rows, int units>
MLXEFF_INLINE void add_values(const PlaneTile& tile, int64_t place, const PlaneTile* next, const int8_t* weights,
                              vi sums[][units][2]) {
  const uint8_t *const upper = tile.upper_values + place, *const lower = full ? tile.lower_values + place : upper;
  Codes<full> codes[units];
  for (int u = 0; u < units; ++u) codes[u] = load_codes<full>(upper + u * VL * 4, lower + u * VL * 4);
  for (int byte = 0; byte < units * VL * 4 && next; byte += 64)
    prefetch(next->upper_values, place + byte), prefetch(next->lower_values, place + byte);
  for (int r = 0; r < rows; ++r)
    for (int digit = 0; digit < 2; ++digit) {
      const int8_t* const w = weights + (2 * r + digit) * plane_part_tokens;
      const int32_t low = load_four(w), high = load_four(w + 4);
      for (int u = 0; u < units; ++u) sums[r][u][digit] = add_products<full>(sums[r][u][digit], codes[u], low, high);
    }
}

// Computes the output of the rows for the channels from e on.
template <int rows, int units>
static void value_channels(const Part& x, int64_t row, int64_t e, float* const* out) {
  vi sums[rows][units][2];
  for (int r = 0; r < rows; ++r)
    for (int u = 0; u < units; ++u)
      for (int digit = 0; digit < 2; ++digit) sums[r][u][digit] = vi{} - code_offset * x.row[row + r].digit_sums[digit];
  const int64_t half = x.a.sizes.size * 4;  // bytes of 8 tokens
  const int8_t* weights = x.weight(row, 0);
  for (int64_t index = 0; index < x.count; ++index, weights += tile_tokens) {
    const PlaneTile& tile = x.tiles[index];
    const PlaneTile* const next = row == 0 && x.next ? x.next + index : nullptr;
    if (tile.lower_values) {
      add_values<true, rows, units>(tile, 4 * e, next, weights, sums);
      add_values<true, rows, units>(tile, 4 * e + half, next, weights + 8, sums);
    } else {
      add_values<false, rows, units>(tile, 4 * e, next, weights, sums);
      add_values<false, rows, units>(tile, 4 * e + half, next, weights + 8, sums);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int u = 0; u < units; ++u) {
      const vf high = __builtin_convertvector(sums[r][u][0], vf), low = __builtin_convertvector(sums[r][u][1], vf);
      store(out[r] + e + u * VL, fma(fma(high, broadcast(256.0f), low), broadcast(x.row[row + r].step * 0.0625f),
                                     broadcast(x.row[row + r].constant)));
    }
}

template <int rows>
static void value_rows(const Part& x, int64_t row, float* const* out) {
  constexpr int units = rows > 2 ? 2 : 4 / (most_rows == 2 ? rows : 1);
  int64_t e = 0;
  for (; e + units * VL <= x.a.sizes.size; e += units * VL) value_channels<rows, units>(x, row, e, out);
  for (; e < x.a.sizes.size; e += VL) value_channels<rows, 1>(x, row, e, out);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
