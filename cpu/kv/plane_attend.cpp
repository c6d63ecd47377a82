// Attention of few rows to one part of the sequence, in planes of 4 bits. Queries and weights become integers of 16
// bits, whose products with the codes are summed exactly in integers (plane_products.h). With codes c - 128 and numbers
// (c - 128) scale / 16 + middle:
//
//   score(t)   = scale(t) / 16 step_q (sum over e of q(e) c'(e, t)) + middle(t) step_q (sum over e of q(e))
//   out(e)     = step_w / 16 (sum over t of w(t) c'(e, t)) + sum over t of p(t) middle(t),    w(t) = p(t) scale(t)
//
// Scales are thus applied once a token, and the vectors' lanes are tokens of the scores and channels of the output: no
// sum crosses lanes. All rows of a KV head, its R query heads and the S queries, share the codes that were loaded.
//
// The weights w are rounded relative to the largest one of the part, each 16th token's error being carried to the next:
// the many small weights beside a large one would all be rounded to nothing otherwise.
//
// Each row is computed as if it were the only one. So it has the same bits whatever other rows there are.
#include "kv/plane_attend.h"

#include "attention/attention_rows.h"
#include "base/pool.h"
#include "kv/plane_products.h"
#include "kv/plane_rotate.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int64_t ahead = 2;  // tiles of keys that are prefetched
#if defined(__AVX512F__)
constexpr int most_rows = 4;
#elif defined(__ARM_NEON)
constexpr int most_rows = 4;
#else
constexpr int most_rows = 2;
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
  int64_t head, begin, end;  // tiles [begin, end)
  int64_t rows;
  Row* row;
  float* scores;              // of each row: part_tokens; then the weights w
  float *scales, *middles;    // of the values: part_tokens
  int8_t *queries, *weights;  // of each row: the high digits, then the low ones; E or part_tokens of each

  const int8_t* query(int64_t r, int digit) const { return queries + (2 * r + digit) * a.sizes.size; }
  int8_t* weight(int64_t r, int digit) const { return weights + (2 * r + digit) * plane_part_tokens; }
  PlaneTile tile(int64_t index) const { return seen_tile(a.planes, a.sizes.size, head, index); }
};

// Numbers below this count as 0: their inverse may be infinite.
constexpr float smallest = 1e-30f;

// x, with NaN in place of infinity.
MLXEFF_INLINE vf nan_if_infinite(vf x) { return x + (x - x); }

static void load_query(const Part& x, int64_t r, const float* query) {
  const int64_t E = x.a.sizes.size;
  float rotated[largest_plane_head];
  rotate_row(query, rotated, E);
  vf most = zero(), poison = zero();
  for (int64_t e = 0; e < E; e += VL) {
    const vf q = load(rotated + e);
    most = max(abs(q), most);
    poison = fma(q, zero(), poison);
  }
  const float largest = max(most), bad = sum(poison);  // bad is 0 or NaN
  const float inverse = bad == 0.0f && largest > smallest ? largest_integer / largest : 0.0f;
  Row& row = x.row[r];
  vi sums[2] = {};
  int8_t* const digits = x.queries + 2 * r * E;
  for (int64_t e = 0; e < E; e += VL) {
    const vf q = inverse > 0.0f ? clamp(load(rotated + e) * inverse, -largest_integer, largest_integer) : zero();
    store_digits(to_integers(q), digits + e, digits + E + e, sums);
  }
  row.digit_sums[0] = sum(sums[0]), row.digit_sums[1] = sum(sums[1]);
  row.step = largest * (log2_e / sqrtf(float(E)) / largest_integer) + bad;
  row.sum_q = row.step * float(256 * row.digit_sums[0] + row.digit_sums[1]);
}

template <bool full, int rows>
MLXEFF_INLINE void score_lanes(const Part& x, int64_t row, const PlaneTile& tile, int64_t t, float* scores) {
  vi sums[rows][2];
  for (int r = 0; r < rows; ++r)
    for (int digit = 0; digit < 2; ++digit) sums[r][digit] = vi{} - code_offset * x.row[row + r].digit_sums[digit];
  const int8_t* const queries = x.query(row, 0);
  const int64_t E = x.a.sizes.size;
  const uint8_t *upper = tile.upper_keys + 4 * t, *lower = full ? tile.lower_keys + 4 * t : upper;
  for (int64_t e = 0; e < E; e += 8) {
    const Codes<full> codes = load_codes<full>(upper + e / 8 * 64, lower + e / 8 * 64);
    for (int r = 0; r < rows; ++r)
      for (int digit = 0; digit < 2; ++digit) {
        const int8_t* const q = queries + (2 * r + digit) * E + e;
        sums[r][digit] = add_products<full>(sums[r][digit], codes, load_four(q), load_four(q + 4));
      }
  }
  const vf scale = nan_if_infinite(load(tile.key_scales + t)),
           middle = fma(scale, broadcast(full ? 8.0f : 8.0f + upper_middle), nan_if_infinite(load(tile.key_zeros + t)));
  for (int r = 0; r < rows; ++r) {
    const vf product = __builtin_convertvector(sums[r][0] * 256 + sums[r][1], vf) * (x.row[row + r].step * 0.0625f);
    store(scores + r * plane_part_tokens, fma(product, scale, middle * x.row[row + r].sum_q));
  }
}

template <int rows>
static void score_rows(const Part& x, int64_t row) {
  float* scores = x.scores + row * plane_part_tokens;
  for (int64_t index = x.begin; index < x.end; ++index, scores += tile_tokens) {
    const PlaneTile tile = x.tile(index);
    for (int64_t t = 0; t < tile_tokens; t += VL) {
      if (tile.lower_keys) score_lanes<true, rows>(x, row, tile, t, scores + t);
      else score_lanes<false, rows>(x, row, tile, t, scores + t);
    }
  }
}

static void load_value_scales(const Part& x) {
  for (int64_t index = x.begin; index < x.end; ++index) {
    const PlaneTile tile = x.tile(index);
    const vf factor = broadcast(tile.lower_values ? 8.0f : 8.0f + upper_middle);
    for (int64_t t = 0; t < tile_tokens; t += VL) {
      const vf scale = load(tile.value_scales + t);
      const int64_t place = (index - x.begin) * tile_tokens + t;
      store(x.scales + place, scale);
      store(x.middles + place, fma(scale, factor, load(tile.value_zeros + t)));
    }
  }
}

// Turns the scores of a row into weights.
static void weigh(const Part& x, int64_t r) {
  Row& row = x.row[r];
  float* const scores = x.scores + r * plane_part_tokens;
  const int64_t count = (x.end - x.begin) * tile_tokens, first = min_of(row.first - x.begin * tile_tokens, count),
                last = max_of(row.last - x.begin * tile_tokens, 0);
  for (int64_t t = 0; t < first; ++t) scores[t] = -INFINITY;
  for (int64_t t = last; t < count; ++t) scores[t] = -INFINITY;
  vf most = broadcast(-INFINITY);
  for (int64_t t = 0; t < count; t += VL) most = max(load(scores + t), most);
  row.max = max(most);
  const float base = row.max == -INFINITY ? 0.0f : row.max;
  vf total = zero(), constant = zero(), largest = zero(), all = zero();
  for (int64_t t = 0; t < count; t += VL) {
    const vf score = load(scores + t), weight = vexp2(score - base);
    const vi hidden = score == -INFINITY;  // there scales may be NaN
    const vf w = hidden ? zero() : weight * load(x.scales + t);
    total += weight;
    constant = fma(weight, hidden ? zero() : load(x.middles + t), constant);
    largest = max(abs(w), largest);
    all += w;
    store(scores + t, w);
  }
  row.sum = sum(total);
  const float peak = max(largest), sum_w = sum(all);
  row.constant = sum(constant) + (sum_w - sum_w);
  int8_t *const high = x.weight(r, 0), *const low = x.weight(r, 1);
  row.digit_sums[0] = row.digit_sums[1] = 0;
  row.step = 0.0f;
  row.constant += row.constant - row.constant;               // NaN if a scale or a zero is not finite
  if (!(row.constant == row.constant && peak > smallest)) {  // the values are NaN, or the zeros alone
    memset(high, 0, size_t(count));
    memset(low, 0, size_t(count));
    return;
  }
  const vf inverse = broadcast(largest_integer / peak);
  vf errors[tile_tokens / VL] = {};
  vi sums[2] = {};
  for (int64_t t = 0; t < count; t += tile_tokens)
    for (int i = 0; i < tile_tokens / VL; ++i) {
      const vf exact = fma(load(scores + t + i * VL), inverse, errors[i]);
      const vi rounded = to_integers(exact);
      errors[i] = exact - __builtin_convertvector(rounded, vf);
      store_digits(rounded, high + t + i * VL, low + t + i * VL, sums);
    }
  row.digit_sums[0] = sum(sums[0]), row.digit_sums[1] = sum(sums[1]);
  row.step = sum_w / float(256 * row.digit_sums[0] + row.digit_sums[1]);  // equal values give themselves
}

// Adds the products of one half of a tile's values, 8 tokens, with the weights of the rows.
template <bool full, int rows, int units>
MLXEFF_INLINE void add_values(const uint8_t* upper, const uint8_t* lower, const int8_t* weights, vi sums[][units][2]) {
  Codes<full> codes[units];
  for (int u = 0; u < units; ++u) codes[u] = load_codes<full>(upper + u * VL * 4, lower + u * VL * 4);
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
  for (int64_t index = x.begin; index < x.end; ++index, weights += tile_tokens) {
    const PlaneTile tile = x.tile(index);
    const uint8_t* const upper = tile.upper_values + 4 * e;
    if (tile.lower_values) {
      const uint8_t* const lower = tile.lower_values + 4 * e;
      add_values<true, rows, units>(upper, lower, weights, sums);
      add_values<true, rows, units>(upper + half, lower + half, weights + 8, sums);
    } else {
      add_values<false, rows, units>(upper, upper, weights, sums);
      add_values<false, rows, units>(upper + half, upper, weights + 8, sums);
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

bool attend_part(const PlaneArgs& a, int64_t task) {
  const int64_t E = a.sizes.size, S = a.span.length, H = a.sizes.heads, G = a.sizes.groups, R = H / G;
  const int64_t part = task % a.parts, head = task / a.parts, b = head / G, g = head % G, rows = S * R;
  const auto first_seen = [&](int64_t i) {
    return a.sizes.window > 0 ? max_of(0, a.span.position(i) + 1 - a.sizes.window) : 0;
  };
  const size_t floats = size_t((rows + 2) * plane_part_tokens), bytes = size_t(2 * rows * (E + plane_part_tokens)),
               row_bytes = size_t(rows) * sizeof(Row);
  char* const memory = static_cast<char*>(scratch(Scratch::panel, row_bytes + floats * 4 + bytes));
  if (!memory) return false;
  Part x = {a, head, 0, 0, rows, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  const int64_t first_tile = (a.first_part + part) * plane_part_tiles;
  x.begin = max_of(first_tile, first_seen(0) / tile_tokens);
  x.end = min_of(first_tile + plane_part_tiles, ceil_div(a.span.end, tile_tokens));
  x.scores = reinterpret_cast<float*>(memory);
  x.scales = x.scores + rows * plane_part_tokens;
  x.middles = x.scales + plane_part_tokens;
  x.row = reinterpret_cast<Row*>(x.middles + plane_part_tokens);
  x.queries = reinterpret_cast<int8_t*>(x.row + rows);
  x.weights = x.queries + 2 * rows * E;
  const auto output_row = [&](int64_t r) { return (b * S + r / R) * H + g * R + r % R; };
  for (int64_t r = 0; r < rows; ++r) {
    x.row[r].first = first_seen(r / R), x.row[r].last = a.span.position(r / R) + 1;
    load_query(x, r, a.queries + output_row(r) * E);
  }
  for_row_tiles<most_rows>(rows, [&](int64_t row, auto tile) { score_rows<decltype(tile)::value>(x, row); });
  load_value_scales(x);
  for (int64_t r = 0; r < rows; ++r) weigh(x, r);
  for_row_tiles<most_rows>(rows, [&](int64_t row, auto tile) {
    constexpr int count = decltype(tile)::value;
    float* out[count];
    for (int r = 0; r < count; ++r) out[r] = plane_partial(a, output_row(row + r), part) + 2;
    value_rows<count>(x, row, out);
  });
  for (int64_t r = 0; r < rows; ++r) {
    float* const partial = plane_partial(a, output_row(r), part);
    partial[0] = x.row[r].max, partial[1] = x.row[r].sum;
    if (a.parts == 1) merge_row(a, output_row(r));
  }
  return true;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
