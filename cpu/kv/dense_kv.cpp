// The dense store of dense_kv.h. Each new row is copied once, from the output of the projections to its place in the
// store, and its keys are rotated and rounded during that copy. Attention uses the kernels of
// attention/attention_kernels.h.
#include "kv/dense_kv.h"

namespace mlxeff {
bool DenseKv::fits(const Span& span) const { return capacity_ >= span.end; }

int64_t DenseKv::workspace_bytes(const Span& span, const AttentionSizes& sizes, const RunOptions& options,
                                 int threads) const {
  AttentionArgs args = attention_args(span, sizes, options);
  args.k.dtype = args.v.dtype = dtype_;
  return plan_attention(args, threads).workspace;
}

int DenseKv::append(Team& team, const NewRows& rows, const RunOptions&, void*) {
  rows.store(team, keys_, values_, dtype_, capacity_);
  return MLXEFF_OK;
}

int DenseKv::attend(Team& team, const Queries& queries, const RunOptions& options, void* workspace) {
  const AttentionSizes& sizes = queries.sizes;
  const int64_t wide = sizes.heads * sizes.size, stride = capacity_ * sizes.size, sequence = sizes.groups * stride,
                query_sequence = queries.span.length * wide;
  AttentionArgs args = attention_args(queries.span, sizes, options);
  args.q = {queries.queries, query_sequence, sizes.size, wide, MLXEFF_F32};
  args.k = {keys_, sequence, stride, sizes.size, dtype_};
  args.v = {values_, sequence, stride, sizes.size, dtype_};
  args.out = {queries.attended, query_sequence, sizes.size, wide, MLXEFF_F32};
  const AttentionPlan plan = plan_attention(args, team.count);
  const AttentionKernels& kernels = MLXEFF_DISPATCH(attention_kernels);
  float* const partial = static_cast<float*>(workspace);
  bool failed = false;  // a piece of work of this team member ran out of memory
  team.for_chunks(plan.tasks, 1, [&](int64_t begin, int64_t end) {
    if (!kernels.run(args, plan, partial, begin, end)) failed = true;
  });
  if (plan.parts > 1)
    team.for_chunks(args.B * args.H * args.S, 64,
                    [&](int64_t begin, int64_t end) { kernels.merge(args, plan, partial, begin, end); });
  return failed ? MLXEFF_NO_MEMORY : MLXEFF_OK;
}

}  // namespace mlxeff
