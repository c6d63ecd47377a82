// Causal attention: argument checks, the plan of tasks, threading. See attention_kernels.h for the letters.
//
//   out[b, h, i] = sum over visible t of softmax(scale * q[b, h, i] . k[b, g, t]) v[b, g, t],   g = h / (H / G)
//
// The query at position i of S sees keys 0 ... T - S + i, of these only the last `window` when a window is given. A NaN
// in a query, or in a key or value that it sees, makes that output row NaN. A NaN in a query or key reaches no other
// row; one in a value also reaches the queries shortly before it that are computed in the same tile (weight 0 times
// NaN). Decode splits the keys into parts when there are more threads than batches times groups; the split depends on
// the number of threads, so results of different thread counts agree to rounding, not bit for bit.
#include "attention/attention_kernels.h"

#include <atomic>

#include "base/pool.h"

namespace mlxeff {
namespace {

constexpr int64_t rows_per_task = 192;  // of a blocked task: packing K and V is shared by them
constexpr int64_t smallest_part = 256;  // keys; a smaller part costs more to merge than it gains
constexpr int64_t part_step = 128;

// Rows of a group up to which the few-row kernel runs. It converts keys and values once for each tile of rows; the
// blocked kernel does so once for all rows, but has to pack them. Measured on a Zen 4 with T = 512, 2048 and 8192, one
// thread and two, heads of 64 elements: few-row takes 0.3 to 0.7 of the blocked kernel's time up to 12 rows and 0.7 to
// 0.9 of it at 24. They are equal at 48 rows or more with AVX-512, at 30 to 36 with AVX2. At the scalar level, where an
// fp16 element takes many instructions to convert, they are equal at 4 rows (in fp32 beyond 64). In the bf16 mode AMX
// leaves the blocked kernel with little more than the packing, which lasts as long as the few-row kernel with some 12
// rows (an estimate). Where no keys precede the queries, few-row takes 0.8 to 1.1 of the time from 18 rows on; there
// the blocked kernel gives the first tokens of a text the same bits as it does in a longer one.
int64_t decode_rows(const AttentionArgs& a) {
  if (active_isa() == Isa::scalar && a.k.dtype != MLXEFF_F32) return 4;
  const bool amx = active_isa() == Isa::amx && a.mode == MLXEFF_COMPUTE_BF16;
  return amx || a.T == a.S ? 12 : 32;
}

bool valid_heads(const Heads& x) { return x.data != nullptr; }
bool known_dtypes(const AttentionArgs& a) {
  return dtype_known(a.q.dtype) && dtype_known(a.k.dtype) && dtype_known(a.v.dtype) && dtype_known(a.out.dtype);
}

int check(const AttentionArgs* a) {
  if (!a || a->B < 0 || a->H < 1 || a->G < 1 || a->H % a->G || a->S < 0 || a->T < a->S || a->E < 1 || a->window < 0)
    return MLXEFF_BAD_ARGUMENT;
  if (a->T > INT32_MAX / 2 || a->E > 65536) return MLXEFF_BAD_ARGUMENT;
  if (!valid_heads(a->q) || !valid_heads(a->k) || !valid_heads(a->v) || !valid_heads(a->out))
    return MLXEFF_BAD_ARGUMENT;
  if (!known_dtypes(*a) || (a->mode != MLXEFF_EXACT && a->mode != MLXEFF_COMPUTE_BF16)) return MLXEFF_BAD_DTYPE;
  return MLXEFF_OK;
}

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& a, int threads) {
  AttentionPlan plan = {};
  const int64_t R = a.H / a.G;
  plan.decode = a.S * R <= decode_rows(a);
  plan.block = plan.decode ? a.S : min_of(a.S, max_of(8, ceil_div(rows_per_task, R)));
  // Several blocks a thread, so that the longer causal blocks even out.
  while (!plan.decode && plan.block * R > 48 && plan.block > 8 && a.B * a.G * ceil_div(a.S, plan.block) < 4 * threads)
    plan.block = ceil_div(plan.block, 2);
  plan.blocks = ceil_div(a.S, plan.block);
  plan.first_key = visible_keys(a, 0).first;
  const int64_t keys = a.T - plan.first_key, tasks = a.B * a.G * plan.blocks;
  plan.parts = 1;
  if (threads > 1 && tasks > 0 && tasks < 4 * threads)
    plan.parts = max_of(1, min_of(ceil_div(4 * threads, tasks), keys / smallest_part));
  plan.part_keys = max_of(1, round_up(ceil_div(keys, plan.parts), part_step));
  plan.parts = max_of(1, ceil_div(keys, plan.part_keys));
  plan.tasks = tasks * plan.parts;
  plan.workspace = plan.parts > 1 ? a.B * a.H * a.S * plan.parts * (a.E + 2) * 4 : 0;
  return plan;
}

}  // namespace mlxeff

using namespace mlxeff;

extern "C" {

int mlxeff_attention(const mlxeff_attention_args* args) {
  if (const int code = check(args)) return code;
  const AttentionArgs& a = *args;
  if (a.B == 0 || a.S == 0) return MLXEFF_OK;
  const AttentionKernels& kernels = MLXEFF_DISPATCH(attention_kernels);
  const AttentionPlan plan = plan_attention(a, num_threads());
  float* workspace = nullptr;
  if (plan.workspace && !(workspace = static_cast<float*>(scratch(Scratch::shared_input, size_t(plan.workspace)))))
    return MLXEFF_NO_MEMORY;
  std::atomic<bool> failed{false};
  parallel_for(plan.tasks, 1, [&](int64_t begin, int64_t end) {
    if (!kernels.run(a, plan, workspace, begin, end)) failed = true;
  });
  if (failed) return MLXEFF_NO_MEMORY;
  if (plan.parts > 1)
    parallel_for(a.B * a.H * a.S, 64,
                 [&](int64_t begin, int64_t end) { kernels.merge(a, plan, workspace, begin, end); });
  return MLXEFF_OK;
}

int mlxeff_attention_backward(const mlxeff_attention_args* forward, const mlxeff_heads* dout, const mlxeff_heads* dq,
                              const mlxeff_heads* dk, const mlxeff_heads* dv) {
  if (const int code = check(forward)) return code;
  const AttentionArgs& a = *forward;
  const mlxeff_heads* const gradients[] = {dout, dq, dk, dv};
  for (const mlxeff_heads* x : gradients) {
    if (!x || !valid_heads(*x)) return MLXEFF_BAD_ARGUMENT;
    if (!dtype_known(x->dtype)) return MLXEFF_BAD_DTYPE;
  }
  if (!a.lse) return MLXEFF_BAD_ARGUMENT;
  if (a.B == 0 || a.T == 0) return MLXEFF_OK;
  const AttentionKernels& kernels = MLXEFF_DISPATCH(attention_kernels);
  const int64_t rows = a.B * a.H * a.S;
  float* const row_dot = static_cast<float*>(scratch(Scratch::shared_input, size_t(max_of(rows, 1)) * 4));
  if (!row_dot) return MLXEFF_NO_MEMORY;
  const AttentionBackwardArgs args = {a, *dout, *dq, *dk, *dv, row_dot};
  parallel_for(rows, 256, [&](int64_t begin, int64_t end) { kernels.backward_row_dots(args, begin, end); });
  std::atomic<bool> failed{false};
  const int64_t query_tasks = a.B * a.G * ceil_div(a.S, backward_block),
                key_tasks = a.B * a.G * ceil_div(a.T, backward_block);
  parallel_for(query_tasks, 1, [&](int64_t begin, int64_t end) {
    if (!kernels.backward_queries(args, begin, end)) failed = true;
  });
  parallel_for(key_tasks, 1, [&](int64_t begin, int64_t end) {
    if (!kernels.backward_keys(args, begin, end)) failed = true;
  });
  return failed ? MLXEFF_NO_MEMORY : MLXEFF_OK;
}
}
