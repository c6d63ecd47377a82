// The store of plane_kv.h. Few queries attend to the planes directly and to the tail by the dense kernels, and the two
// results are merged. For many queries, those of a prompt, the keys and values of the layer are first written out as
// fp32, so that the blocked dense kernel, which is bound by arithmetic, reads them without decoding.
#include "kv/plane_kv.h"

#include "decoder/decoder_kernels.h"

namespace mlxeff {
namespace {

constexpr int64_t few_rows = 32;      // rows of a group for which the planes are read directly
constexpr int64_t part_tokens = 512;  // of a part, so that the parts depend on the number of tokens alone

bool few(const Span& span, const AttentionSizes& sizes) {
  return span.length * (sizes.heads / sizes.groups) <= few_rows;
}

Heads rows_of(const Queries& queries, float* data) {
  const int64_t wide = queries.sizes.heads * queries.sizes.size;
  return {data, queries.span.length * wide, queries.sizes.size, wide, MLXEFF_F32};
}

// A plan of one part by the few-row kernel, so that a row has the same bits whatever other rows and threads there are.
AttentionPlan few_row_plan(const AttentionArgs& args) {
  AttentionPlan plan = {};
  plan.decode = true;
  plan.block = args.S;
  plan.blocks = plan.parts = 1;
  plan.part_keys = args.T;
  plan.tasks = args.B * args.G;
  return plan;
}

// Runs the tasks of the plan; returns false if memory is exhausted.
bool run(const AttentionArgs& args, const AttentionPlan& plan, float* partial, int64_t begin, int64_t end) {
  return MLXEFF_DISPATCH(attention_kernels).run(args, plan, partial, begin, end);
}

}  // namespace

bool PlaneKv::fits(const Span& span) const { return stored() + tail_capacity_ >= span.end; }

PlaneArgs PlaneKv::plane_args(const Span& span, const AttentionSizes& sizes, const float* queries,
                              float* partial) const {
  PlaneArgs args = planes_;
  args.span = span;
  args.sizes = sizes;
  args.queries = queries;
  args.partial = partial;
  args.part_blocks = max_of(1, part_tokens / args.block);
  args.parts = ceil_div(args.blocks, args.part_blocks);
  return args;
}

AttentionArgs PlaneKv::tail_args(const Span& span, const AttentionSizes& sizes, const RunOptions& options) const {
  AttentionArgs args = attention_args(span, sizes, options);
  const int64_t stride = tail_capacity_ * sizes.size;
  args.T = span.end - stored();
  args.k = {keys(), sizes.groups * stride, stride, sizes.size, MLXEFF_F16};
  args.v = {values(span.batch, sizes), sizes.groups * stride, stride, sizes.size, MLXEFF_F16};
  return args;
}

int64_t PlaneKv::workspace_bytes(const Span& span, const AttentionSizes& sizes, const RunOptions& options,
                                 int threads) const {
  if (planes_.blocks == 0) return plan_attention(tail_args(span, sizes, options), threads).workspace;
  const int64_t rows = span.rows() * sizes.heads;
  int64_t most = 0;
  // `attend` may be called with fewer queries than `append`.
  const int64_t lengths[] = {span.length, 1};
  for (const int64_t length : lengths) {
    const Span part = {span.batch, length, span.end};
    if (few(part, sizes)) {
      const PlaneArgs args = plane_args(part, sizes, nullptr, nullptr);
      most = max_of(most, rows * (args.parts * (sizes.size + 2) + sizes.size + 1) * 4);
    } else {
      const AttentionArgs args = attention_args(part, sizes, options);
      most =
          max_of(most, span.batch * sizes.groups * span.end * sizes.size * 8 + plan_attention(args, threads).workspace);
    }
  }
  return most;
}

int PlaneKv::append(Team& team, const NewRows& rows, const RunOptions&, void*) {
  rows.store(team, keys(), values(rows.span.batch, rows.sizes), MLXEFF_F16, tail_capacity_, stored());
  return MLXEFF_OK;
}

int PlaneKv::attend(Team& team, const Queries& queries, const RunOptions& options, void* workspace) {
  float* const memory = static_cast<float*>(workspace);
  if (planes_.blocks && few(queries.span, queries.sizes)) return attend_few(team, queries, options, memory);
  return attend_many(team, queries, options, memory);
}

int PlaneKv::attend_few(Team& team, const Queries& queries, const RunOptions& options, float* workspace) const {
  const AttentionSizes& sizes = queries.sizes;
  const int64_t rows = queries.span.rows() * sizes.heads;
  float *const tail_out = workspace, *const lse = tail_out + rows * sizes.size;
  const PlaneArgs args = plane_args(queries.span, sizes, queries.queries, lse + rows);
  const PlaneKernels& kernels = MLXEFF_DISPATCH(plane_kernels);
  AttentionArgs tail = tail_args(queries.span, sizes, options);
  tail.q = rows_of(queries, queries.queries);
  tail.out = {tail_out, sizes.heads * queries.span.length * sizes.size, queries.span.length * sizes.size, sizes.size,
              MLXEFF_F32};
  tail.lse = lse;
  const AttentionPlan plan = few_row_plan(tail);
  const int64_t tasks = queries.span.batch * sizes.groups * args.parts;
  bool failed = false;  // a piece of work of this team member ran out of memory
  team.for_chunks(tasks + plan.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      if (!(task < tasks ? kernels.attend(args, task, task + 1)
                         : run(tail, plan, nullptr, task - tasks, task - tasks + 1)))
        failed = true;
  });
  const Heads out = rows_of(queries, queries.attended);
  team.for_chunks(rows, 8, [&](int64_t begin, int64_t end) { kernels.merge(args, tail_out, lse, out, begin, end); });
  return failed ? MLXEFF_NO_MEMORY : MLXEFF_OK;
}

int PlaneKv::attend_many(Team& team, const Queries& queries, const RunOptions& options, float* workspace) const {
  const AttentionSizes& sizes = queries.sizes;
  const int64_t tokens = queries.span.end, groups = queries.span.batch * sizes.groups, size = sizes.size;
  AttentionArgs args = tail_args(queries.span, sizes, options);
  float* partial = workspace;
  bool failed = false;
  if (planes_.blocks) {
    float *const keys = workspace, *const values = keys + groups * tokens * size;
    partial = values + groups * tokens * size;
    const PlaneArgs planes = plane_args(queries.span, sizes, nullptr, nullptr);
    const f16 *const tail_keys = this->keys(), *const tail_values = this->values(queries.span.batch, sizes);
    const PlaneKernels& kernels = MLXEFF_DISPATCH(plane_kernels);
    const DecoderKernels& row_kernels = MLXEFF_DISPATCH(decoder_kernels);
    const int64_t tail = tokens - stored(), tasks = groups * planes.blocks;
    team.for_chunks(tasks + groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        if (task < tasks) {
          if (!kernels.dequantise(planes, keys, values, tokens, task, task + 1)) failed = true;
          continue;
        }
        const int64_t group = task - tasks, to = (group * tokens + stored()) * size,
                      from = group * tail_capacity_ * size;
        row_kernels.load(keys + to, tail_keys + from, MLXEFF_F16, tail * size);
        row_kernels.load(values + to, tail_values + from, MLXEFF_F16, tail * size);
      }
    });
    args.T = tokens;
    args.k = {keys, sizes.groups * tokens * size, tokens * size, size, MLXEFF_F32};
    args.v = {values, sizes.groups * tokens * size, tokens * size, size, MLXEFF_F32};
  }
  args.q = rows_of(queries, queries.queries);
  args.out = rows_of(queries, queries.attended);
  const AttentionPlan plan = plan_attention(args, team.count);
  team.for_chunks(plan.tasks, 1, [&](int64_t begin, int64_t end) {
    if (!run(args, plan, partial, begin, end)) failed = true;
  });
  if (plan.parts > 1)
    team.for_chunks(args.B * args.H * args.S, 64, [&](int64_t begin, int64_t end) {
      MLXEFF_DISPATCH(attention_kernels).merge(args, plan, partial, begin, end);
    });
  return failed ? MLXEFF_NO_MEMORY : MLXEFF_OK;
}

}  // namespace mlxeff
