// The table of attention kernels of one instruction-set level, and the merge of the partial results of a row.
//
// Part p of the keys has the maximum m_p, the sum l_p and the accumulator o_p. With m = max m_p:
//   out = (sum over p of 2^(m_p - m) o_p) / (sum over p of 2^(m_p - m) l_p).
#include "attention/attention_rows.h"

namespace mlxeff {
namespace MLXEFF_ISA {

static bool run(const AttentionArgs& args, const AttentionPlan& plan, float* workspace, int64_t begin, int64_t end) {
  return plan.decode ? run_decode(args, plan, workspace, begin, end) : run_blocked(args, plan, workspace, begin, end);
}

static void merge(const AttentionArgs& a, const AttentionPlan& plan, const float* workspace, int64_t begin,
                  int64_t end) {
  AttentionPlan whole = plan;
  whole.parts = 1;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t i = index % a.S, h = index / a.S % a.H, b = index / a.S / a.H;
    // The total is accumulated in the place of the first part.
    float* const total = partial_row(a, plan, const_cast<float*>(workspace), b, h, i, 0);
    RowState state = {-INFINITY, 0.0f};
    for (int64_t p = 0; p < plan.parts; ++p) {
      const float most = total[p * (a.E + 2)];
      if (!(most <= state.max)) state.max = most;
    }
    const float base = state.max == -INFINITY ? 0.0f : state.max;
    float* const row = total + 2;
    for (int64_t p = 0; p < plan.parts; ++p) {
      const float* const partial = total + p * (a.E + 2);
      const float factor = exp2f(partial[0] - base);
      state.sum += factor * partial[1];
      for (int64_t e = 0; e < a.E; ++e) row[e] = (p ? row[e] : 0.0f) + factor * partial[2 + e];
    }
    finish_row(a, whole, nullptr, b, h, i, 0, row, state);
  }
}

const AttentionKernels& attention_kernels() {
  static const AttentionKernels table = {run, merge, backward_row_dots, backward_queries, backward_keys};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
