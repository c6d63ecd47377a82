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
// The weights w are rounded relative to the largest one of the part, and the error of each is carried to the weight 32
// tokens later: the many small weights beside a large one would all be rounded to nothing otherwise.
//
// Each row is computed as if it were the only one. So it has the same bits whatever other rows there are.
#include "kv/plane_attend.h"

#include "attention/attention_rows.h"
#include "base/pool.h"
#include "kv/plane_products.h"
#include "kv/plane_rotate.h"

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
  int64_t begin, count, rows;     // the first tile, the number of tiles
  const PlaneTile *tiles, *next;  // the tiles, and those of the next task, null if there is none
  Row* row;
  float* scores;              // of each row: part_tokens; then the weights w
  float *scales, *middles;    // of the values: part_tokens
  int8_t *queries, *weights;  // of each row: the high digits, then the low ones; E or part_tokens of each

  const int8_t* query(int64_t r, int digit) const { return queries + (2 * r + digit) * a.sizes.size; }
  int8_t* weight(int64_t r, int digit) const { return weights + (2 * r + digit) * plane_part_tokens; }
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

// What one task reads is prefetched during the one before it, keys with keys and values with values, so that memory is
// read all the time, also while weights are computed. A place of the next task's tile, or of no tile:
MLXEFF_INLINE void prefetch(const void* tile, int64_t place) {
  if (tile) __builtin_prefetch(static_cast<const char*>(tile) + place, 0, 2);
}

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

static void load_value_scales(const Part& x) {
  for (int64_t index = 0; index < x.count; ++index) {
    const PlaneTile& tile = x.tiles[index];
    const vf factor = broadcast(tile.lower_values ? 8.0f : 8.0f + upper_middle);
    for (int64_t t = 0; t < tile_tokens; t += VL) {
      const vf scale = load(tile.value_scales + t);
      const int64_t place = index * tile_tokens + t;
      store(x.scales + place, scale);
      store(x.middles + place, fma(scale, factor, load(tile.value_zeros + t)));
    }
  }
}

// Turns the scores of a row into weights.
static void weigh(const Part& x, int64_t r) {
  Row& row = x.row[r];
  float* const scores = x.scores + r * plane_part_tokens;
  const int64_t count = x.count * tile_tokens, first = min_of(row.first - x.begin * tile_tokens, count),
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
  vf errors[2][tile_tokens / VL] = {};  // of the tiles with even and with odd numbers
  vi sums[2] = {};
  for (int64_t t = 0; t < count; t += tile_tokens)
    for (int i = 0; i < tile_tokens / VL; ++i) {
      const vf exact = fma(load(scores + t + i * VL), inverse, errors[0][i]), shifted = exact + round_magic;
      errors[0][i] = errors[1][i];
      errors[1][i] = exact - (shifted - round_magic);
      store_digits((vi)shifted - (vi)broadcast(round_magic), high + t + i * VL, low + t + i * VL, sums);
    }
  row.digit_sums[0] = sum(sums[0]), row.digit_sums[1] = sum(sums[1]);
  row.step = sum_w / float(256 * row.digit_sums[0] + row.digit_sums[1]);  // equal values give themselves
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

// The tiles of a task.
struct Tiles {
  int64_t begin, count;
  PlaneTile tile[plane_part_tiles];
};
static void find_tiles(const PlaneArgs& a, int64_t task, Tiles* tiles) {
  const int64_t first = (a.first_part + task % a.parts) * plane_part_tiles;
  const int64_t seen = a.sizes.window > 0 ? max_of(0, a.span.position(0) + 1 - a.sizes.window) / tile_tokens : 0;
  tiles->begin = max_of(first, seen / 2 * 2);  // even: see weigh
  tiles->count = min_of(first + plane_part_tiles, ceil_div(a.span.end, tile_tokens)) - tiles->begin;
  for (int64_t i = 0; i < plane_part_tiles; ++i)
    tiles->tile[i] =
        i < tiles->count ? seen_tile(a.planes, a.sizes.size, task / a.parts, tiles->begin + i) : PlaneTile{};
}

static bool attend_part(const PlaneArgs& a, int64_t task, const Tiles& tiles, const Tiles* next) {
  const int64_t E = a.sizes.size, S = a.span.length, H = a.sizes.heads, G = a.sizes.groups, R = H / G;
  const int64_t part = task % a.parts, head = task / a.parts, b = head / G, g = head % G, rows = S * R;
  const size_t floats = size_t((rows + 2) * plane_part_tokens), bytes = size_t(2 * rows * (E + plane_part_tokens)),
               row_bytes = size_t(rows) * sizeof(Row);
  char* const memory = static_cast<char*>(scratch(Scratch::panel, row_bytes + floats * 4 + bytes));
  if (!memory) return false;
  Part x = {a,       tiles.begin, tiles.count, rows,    tiles.tile, next ? next->tile : nullptr,
            nullptr, nullptr,     nullptr,     nullptr, nullptr,    nullptr};
  x.scores = reinterpret_cast<float*>(memory);
  x.scales = x.scores + rows * plane_part_tokens;
  x.middles = x.scales + plane_part_tokens;
  x.row = reinterpret_cast<Row*>(x.middles + plane_part_tokens);
  x.queries = reinterpret_cast<int8_t*>(x.row + rows);
  x.weights = x.queries + 2 * rows * E;
  const auto output_row = [&](int64_t r) { return (b * S + r / R) * H + g * R + r % R; };
  for (int64_t r = 0; r < rows; ++r) {
    x.row[r].last = a.span.position(r / R) + 1;
    x.row[r].first = a.sizes.window > 0 ? x.row[r].last - a.sizes.window : 0;
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

bool attend_parts(const PlaneArgs& a, int64_t begin, int64_t end) {
  Tiles tiles[2];
  find_tiles(a, begin, &tiles[begin % 2]);
  for (int64_t task = begin; task < end; ++task) {
    const Tiles *const own = &tiles[task % 2], *next = nullptr;
    if (task + 1 < end) find_tiles(a, task + 1, &tiles[(task + 1) % 2]), next = &tiles[(task + 1) % 2];
    if (!attend_part(a, task, *own, next)) return false;
  }
  return true;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
