// The few-row attention kernel, for decode and for the verification of a short draft. It reads keys and values in place
// from the cache, once for all query heads of a group.
//
// For each block of 256 keys it computes the scores as dot products along E, turns them into weights by online softmax,
// and updates O = O * factor + weights V.
//
// For the scores, a tile of rows is multiplied with 4 keys at a time, so that 4 dot products share one horizontal sum.
// For the values, the sums of a tile of rows and a panel of E stay in registers over all keys of the block. Elements
// are converted to fp32 when they are loaded, and all arithmetic is fp32. If a group has more rows than one tile, the
// block of keys is read again from the L1 or L2 cache. The cost is reading from memory, once, the K and V that the rows
// see.
#include "attention/attention_rows.h"
#include "base/pool.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int64_t decode_block = 256;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int score_rows = 4, value_rows = 4, value_panel = 4;  // for 32 vector registers
#else
constexpr int score_rows = 2, value_rows = 4, value_panel = 2;  // for 16 vector registers
#endif
constexpr int64_t prefetch_tokens = 24;  // distance of the prefetch ahead of the current token

// The rows of K or V for a range of tokens, with their element type.
template <class T>
struct Tokens {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

template <class T>
MLXEFF_INLINE void prefetch_row(const Tokens<T>& x, int64_t i, int64_t E) {
  const char* const p = reinterpret_cast<const char*>(x.row(i + prefetch_tokens));
  for (int64_t byte = 0; byte < E * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(p + byte);
}

// Computes scores[r][j] = queries[r] . keys[j] for the four keys at the offsets offsets[j] from `key`.
template <class T, int rows>
MLXEFF_INLINE void score_four(const float* queries, int64_t width, const T* key, const int64_t offsets[4], int64_t E,
                              float* scores) {
  const T *const k0 = key + offsets[0], *const k1 = key + offsets[1], *const k2 = key + offsets[2],
                 *const k3 = key + offsets[3];
  vf sums[rows][4] = {};
  const auto add = [&](int64_t e, vf a, vf b, vf c, vf d) {
    for (int r = 0; r < rows; ++r) {
      const vf query = load(queries + r * width + e);
      sums[r][0] = fma(query, a, sums[r][0]);
      sums[r][1] = fma(query, b, sums[r][1]);
      sums[r][2] = fma(query, c, sums[r][2]);
      sums[r][3] = fma(query, d, sums[r][3]);
    }
  };
  int64_t e = 0;
  for (; e + VL <= E; e += VL) add(e, load(k0 + e), load(k1 + e), load(k2 + e), load(k3 + e));
  if (e < E)
    add(e, load_first(k0 + e, E - e), load_first(k1 + e, E - e), load_first(k2 + e, E - e), load_first(k3 + e, E - e));
  for (int r = 0; r < rows; ++r) store_sums(scores + r * decode_block, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
}

// Computes the scores of `count` keys. Writes `count` rounded up to a multiple of 4 scores; the excess ones repeat the
// last key.
template <class T, int rows>
static inline void score_tile(const float* queries, int64_t width, const Tokens<T>& keys, int64_t count, int64_t E,
                              int64_t prefetch, float* scores) {
  const int64_t stride = keys.stride, whole = count / 4 * 4, offsets[4] = {0, stride, 2 * stride, 3 * stride};
  for (int64_t j = 0; j < whole; j += 4) {
    if (j + 4 <= prefetch)
      for (int i = 0; i < 4; ++i) prefetch_row(keys, j + i, E);
    score_four<T, rows>(queries, width, keys.row(j), offsets, E, scores + j);
  }
  if (whole < count) {
    const int64_t last = count - whole - 1;
    const int64_t rest[4] = {0, min_of(1, last) * stride, min_of(2, last) * stride, last * stride};
    score_four<T, rows>(queries, width, keys.row(whole), rest, E, scores + whole);
  }
}

// Adds the sum over keys j in [begin, end) of weights[r][j] * values[j] to out[r], for one panel of columns. `E` is the
// number of columns of the head that lie in the panel.
template <class T, int rows, int panel>
static inline void value_tile(const float* weights, const Tokens<T>& values, int64_t begin, int64_t end, int64_t E,
                              int64_t prefetch, float* out, int64_t width) {
  vf sums[rows][panel];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < panel; ++j) sums[r][j] = load(out + r * width + j * VL);
  for (int64_t key = begin; key < end; ++key) {
    if (key < prefetch) prefetch_row(values, key, E);
    const T* const row = values.row(key);
    vf value[panel];
    for (int j = 0; j < panel; ++j) value[j] = panel == 1 && E < VL ? load_first(row, E) : load(row + j * VL);
    for (int r = 0; r < rows; ++r) {
      const vf weight = broadcast(weights[r * decode_block + key]);
      for (int j = 0; j < panel; ++j) sums[r][j] = fma(weight, value[j], sums[r][j]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < panel; ++j) store(out + r * width + j * VL, sums[r][j]);
}

template <class T, int rows>
static inline void value_rows_tile(const float* weights, const Tokens<T>& values, int64_t begin, int64_t end, int64_t E,
                                   int64_t prefetch, float* out, int64_t width) {
  constexpr int wide = value_panel * VL;
  int64_t e = 0;
  const auto panel = [&] { return Tokens<T>{values.data + e, values.stride}; };
  for (; e + wide <= E; e += wide)
    value_tile<T, rows, value_panel>(weights, panel(), begin, end, wide, prefetch, out + e, width);
  for (; e < E; e += VL)
    value_tile<T, rows, 1>(weights, panel(), begin, end, min_of(VL, E - e), prefetch, out + e, width);
}

template <class T>
static void score_block(const AttentionArgs& a, const float* queries, int64_t width, int64_t rows,
                        const Tokens<T>& keys, int64_t count, int64_t prefetch, float* scores) {
  for_row_tiles<score_rows>(rows, [&](int64_t row, auto tile) {
    score_tile<T, decltype(tile)::value>(queries + row * width, width, keys, count, a.E, row == 0 ? prefetch : 0,
                                         scores + row * decode_block);
  });
}
template <class T>
static void value_block(const AttentionArgs& a, const float* weights, int64_t rows, const Tokens<T>& values,
                        int64_t begin, int64_t end, int64_t prefetch, float* out, int64_t width) {
  for_row_tiles<value_rows>(rows, [&](int64_t row, auto tile) {
    value_rows_tile<T, decltype(tile)::value>(weights + row * decode_block, values, begin, end, a.E,
                                              row == 0 ? prefetch : 0, out + row * width, width);
  });
}

// Calls action with the Tokens of x from `token` on, for the element type of x.
template <class Action>
MLXEFF_INLINE void with_tokens(const Heads& x, int64_t b, int64_t g, int64_t token, Action action) {
  const char* const p = head_row(x, b, g, token);
  if (x.dtype == MLXEFF_F32) action(Tokens<float>{reinterpret_cast<const float*>(p), x.token});
  else if (x.dtype == MLXEFF_F16) action(Tokens<f16>{reinterpret_cast<const f16*>(p), x.token});
  else action(Tokens<bf16>{reinterpret_cast<const bf16*>(p), x.token});
}

static bool run_task(const AttentionArgs& a, const AttentionPlan& plan, float* workspace, int64_t task) {
  const int64_t part = task % plan.parts, b = task / plan.parts / a.G, g = task / plan.parts % a.G;
  const int64_t R = a.H / a.G, rows = a.S * R, width = round_up(a.E, VL);
  float* const queries = static_cast<float*>(
      scratch(Scratch::panel, size_t(rows * (2 * width + decode_block)) * 4 + size_t(rows) * sizeof(RowState)));
  if (!queries) return false;
  float *const sums = queries + rows * width, *const scores = sums + rows * width;
  RowState* const states = reinterpret_cast<RowState*>(scores + rows * decode_block);
  for (int64_t row = 0; row < rows; ++row) {
    load_query(queries + row * width, width, head_row(a.q, b, g * R + row % R, row / R), a.q.dtype, a.E,
               a.scale * log2_e);
    states[row] = {-INFINITY, 0.0f};
  }
  memset(sums, 0, size_t(rows * width) * 4);

  const int64_t begin = plan.first_key + part * plan.part_keys, end = min_of(begin + plan.part_keys, a.T);
  for (int64_t key = begin; key < end; key += decode_block) {
    const int64_t count = min_of(decode_block, end - key);
    const int64_t prefetch = end - prefetch_tokens - key;  // tokens that may be prefetched without reading past the end
    with_tokens(a.k, b, g, key,
                [&](auto keys) { score_block(a, queries, width, rows, keys, count, prefetch, scores); });
    for (int64_t row = 0; row < rows; ++row) {
      const KeyRange seen = visible_keys(a, row / R);
      const float factor =
          softmax_block(scores + row * decode_block, scores + row * decode_block, 0, round_up(count, VL),
                        seen.first - key, min_of(count, seen.last - key), &states[row]);
      scale_row(sums + row * width, width, factor);
    }
    const int64_t seen = min_of(count, max_of(0, visible_keys(a, 0).first - key));  // keys before are in no window
    with_tokens(a.v, b, g, key,
                [&](auto values) { value_block(a, scores, rows, values, seen, count, prefetch, sums, width); });
  }
  for (int64_t row = 0; row < rows; ++row)
    finish_row(a, plan, workspace, b, g * R + row % R, row / R, part, sums + row * width, states[row]);
  return true;
}

bool run_decode(const AttentionArgs& a, const AttentionPlan& plan, float* workspace, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    if (!run_task(a, plan, workspace, task)) return false;
  return true;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
