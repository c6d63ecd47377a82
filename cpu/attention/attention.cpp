// The C entry points of causal attention: argument checks, the division into tasks, and threading. attention_kernels.h
// explains the shape letters.
//
//   out[b, h, i] = sum over visible t of softmax(scale * q[b, h, i] . k[b, g, t]) v[b, g, t],   g = h / (H / G)
//
// The query at position i of S sees the keys 0 ... T - S + i, and only the last `window` of these if a window is given.
// A NaN in a query, or in a key or value that the query sees, makes the output row of the query NaN. A NaN in a query
// or key affects no other row. A NaN in a value also affects earlier queries that are computed in the same tile,
// because their weight 0 times NaN is NaN. Keys are split into parts if there are few batches and groups for the number
// of threads, so results with different thread counts agree up to rounding but not bit for bit. In the few-row kernel
// blocks and parts of keys begin at multiples of their size, whatever T and S are. A query therefore has the same
// output bits alone and beside later ones.
#include "attention/attention_kernels.h"

#include <atomic>

#include "base/pool.h"

namespace mlxeff {
namespace {

constexpr int64_t rows_per_task = 192;  // target rows of a blocked task, which share its packed K and V
constexpr int64_t smallest_part = 256;  // in keys; a smaller part costs more to merge than it saves
constexpr int64_t part_step = 128;      // the number of keys in a part is a multiple of this
constexpr int64_t draft = 8;            // queries that the few-row kernel takes, however many heads share a key

// The largest number of rows in a group for which the few-row kernel (attention_decode.cpp) runs. That kernel converts
// keys and values once for each tile of rows; the blocked kernel converts them once for all rows, but must also pack
// them.
//
// Measured on a Zen 4 CPU with T = 512, 2048 and 8192, one and two threads, and heads of 64 elements: the few-row
// kernel takes 0.3 to 0.7 of the blocked kernel's time up to 12 rows and 0.7 to 0.9 of it at 24 rows. Both take the
// same time at 48 rows or more with AVX-512 and at 30 to 36 rows with AVX2. At the scalar level, where converting an
// fp16 element takes many instructions, they take the same time at 4 rows (with fp32 keys and values, beyond 64 rows).
// In the bf16 mode with AMX, the blocked kernel spends nearly all its time on packing, which takes about as long as the
// few-row kernel with 12 rows (an estimate).
//
// If no keys precede the queries (T = S), the few-row kernel takes 0.8 to 1.1 of the blocked kernel's time from 18 rows
// on. Using the blocked kernel there gives the first tokens of a text the same bits, however long the text is.
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
  plan.decode = a.S * R <= decode_rows(a) || (a.S <= draft && a.T > a.S);
  plan.block = plan.decode ? a.S : min_of(a.S, max_of(8, ceil_div(rows_per_task, R)));
  // Use several blocks per thread: blocks at later positions see more keys and take longer, and more blocks balance the
  // load.
  while (!plan.decode && plan.block * R > 48 && plan.block > 8 && a.B * a.G * ceil_div(a.S, plan.block) < 4 * threads)
    plan.block = ceil_div(plan.block, 2);
  plan.blocks = ceil_div(a.S, plan.block);
  plan.first_key = visible_keys(a, 0).first;
  if (plan.decode) plan.first_key -= plan.first_key % smallest_part;
  const int64_t keys = a.T - plan.first_key, tasks = a.B * a.G * plan.blocks;
  const bool split = threads > 1 && tasks > 0 && tasks < 4 * threads;
  plan.parts = 1;
  if (split && !plan.decode) plan.parts = max_of(1, min_of(ceil_div(4 * threads, tasks), keys / smallest_part));
  plan.part_keys = split && plan.decode ? smallest_part : max_of(1, round_up(ceil_div(keys, plan.parts), part_step));
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
