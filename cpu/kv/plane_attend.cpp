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
#include "kv/plane_part.h"
#include "kv/plane_rotate.h"

namespace mlxeff {
namespace MLXEFF_ISA {

// Numbers below this count as 0: their inverse may be infinite.
constexpr float smallest = 1e-30f;

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
  vf errors[2][tile_tokens / VL] = {};  // of the next tile and of the one after it
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

// The tiles of a task.
struct Tiles {
  int64_t begin, count;
  PlaneTile tile[plane_part_tiles];
};
static void find_tiles(const PlaneArgs& a, int64_t task, Tiles* tiles) {
  const int64_t first = (a.first_part + task % a.parts) * plane_part_tiles;
  const int64_t seen = a.sizes.window > 0 ? max_of(0, a.span.position(0) + 1 - a.sizes.window) / tile_tokens : 0;
  tiles->begin = max_of(first, seen);
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
  Part x = {a,       tiles.begin, tiles.count, tiles.tile, next ? next->tile : nullptr, nullptr, nullptr,
            nullptr, nullptr,     nullptr,     nullptr};
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
