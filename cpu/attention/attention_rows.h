// What the attention kernels share: loading a query, the online softmax of a row, storing a finished row, and rows in
// tiles.
//
// Queries are multiplied by scale * log2(e) in fp32 when they are loaded, so every exponential of a score is an exp2.
//
// Only sources that are compiled per level may include this file.
#pragma once
#include <math.h>

#include "attention/attention_kernels.h"
#include "base/simd_math.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr float log2_e = 1.44269504f, ln_2 = 0.69314718f;

struct RowState {
  float max, sum;
};

// Computes weights[j] = exp2(scores[j] - max) for j in [begin, end) that lie in [first, last), and 0 for the others.
// Updates the running maximum and sum, and returns the factor by which the caller must multiply the values accumulated
// so far. `weights` may use the same memory as `scores`, even if its element type is narrower. begin and end must be
// multiples of VL.
template <class Weight>
static inline float softmax_block(const float* scores, Weight* weights, int64_t begin, int64_t end, int64_t first,
                                  int64_t last, RowState* state) {
  const vf hidden = broadcast(-INFINITY);
  vf most = hidden;
  int64_t whole_begin = begin, whole_end = end;  // vectors in [whole_begin, whole_end) need no mask
  if (first > begin) whole_begin = min_of(end, round_up(first, VL));
  if (last < end) whole_end = max_of(whole_begin, last / VL * VL);
  const auto masked = [&](int64_t j) {
    const vi column = lane_numbers() + int32_t(j);
    const vf score = load(scores + j);
    return (column < int32_t(first)) | (column >= int32_t(last)) ? hidden : score;
  };
  for (int64_t j = begin; j < whole_begin; j += VL) most = max(masked(j), most);
  for (int64_t j = whole_begin; j < whole_end; j += VL) most = max(load(scores + j), most);
  for (int64_t j = whole_end; j < end; j += VL) most = max(masked(j), most);
  const float now = max(most), before = state->max, peak = now > before ? now : before;
  // If all scores of a row so far are -inf, its weights are 0: using 0 in place of the maximum avoids exp2(-inf + inf).
  const float base = peak == -INFINITY ? 0.0f : peak;
  vf total = zero();
  const auto emit = [&](int64_t j, vf score) {
    const vf weight = vexp2(score - base);
    total += weight;
    store(weights + j, weight);
  };
  for (int64_t j = begin; j < whole_begin; j += VL) emit(j, masked(j));
  for (int64_t j = whole_begin; j < whole_end; j += VL) emit(j, load(scores + j));
  for (int64_t j = whole_end; j < end; j += VL) emit(j, masked(j));
  const float factor = exp2f(before - base);
  state->max = peak;
  state->sum = state->sum * factor + sum(total);
  return factor;
}

MLXEFF_INLINE void scale_row(float* row, int64_t n, float factor) {  // n must be a multiple of VL
  if (factor == 1.0f) return;
  for (int64_t j = 0; j < n; j += VL) store(row + j, load(row + j) * factor);
}

// Stores a finished row in the output or, if the keys are split into several parts, in the workspace.
static inline void finish_row(const AttentionArgs& a, const AttentionPlan& plan, float* workspace, int64_t b, int64_t h,
                              int64_t i, int64_t part, float* row, RowState state) {
  if (plan.parts > 1) {
    float* const partial = partial_row(a, plan, workspace, b, h, i, part);
    partial[0] = state.max, partial[1] = state.sum;
    memcpy(partial + 2, row, size_t(a.E) * 4);
    return;
  }
  const float inverse = 1.0f / state.sum;
  for (int64_t e = 0; e < a.E; ++e) row[e] *= inverse;
  from_floats(head_row(a.out, b, h, i), a.out.dtype, row, a.E);
  if (a.lse) a.lse[(b * a.H + h) * a.S + i] = (state.max + log2f(state.sum)) * ln_2;
}

// Sets dst[0, E) = src[0, E) * factor, and dst[E, width) to zeros.
static inline void load_query(float* dst, int64_t width, const char* src, int dtype, int64_t E, float factor) {
  to_floats(dst, src, dtype, E);
  for (int64_t e = 0; e < E; ++e) dst[e] *= factor;
  for (int64_t e = E; e < width; ++e) dst[e] = 0.0f;
}

// Calls action with the first row of each tile, and its number of rows, at most `most`, as a compile-time constant.
template <int n>
struct RowCount {
  static constexpr int value = n;
};
template <int most, class Action>
MLXEFF_INLINE void for_row_tiles(int64_t rows, Action action) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row;
    if (most >= 4 && left >= 4) action(row, RowCount<4>{}), row += 4;
    else if (most >= 3 && left >= 3) action(row, RowCount<3>{}), row += 3;
    else if (left >= 2) action(row, RowCount<2>{}), row += 2;
    else action(row, RowCount<1>{}), row += 1;
  }
}

bool run_decode(const AttentionArgs& a, const AttentionPlan& plan, float* workspace, int64_t begin, int64_t end);
bool run_blocked(const AttentionArgs& a, const AttentionPlan& plan, float* workspace, int64_t begin, int64_t end);
void backward_row_dots(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
bool backward_queries(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
bool backward_keys(const AttentionBackwardArgs& args, int64_t begin, int64_t end);

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
