// The table of causal attention kernels, and the plan that divides attention into tasks. Each kernel call runs on one
// thread; attention.cpp combines the calls.
//
// Shape letters: B batch, H query heads, G key/value heads, S queries, T keys (T >= S), E head size. A group is the R =
// H / G query heads that share one key/value head. One task handles all R heads of a group, so that keys and values are
// read once per group. A row is one query of one head; within a group, row = position * R + (head - group * R).
#pragma once
#include "base/isa.h"

namespace mlxeff {

using Heads = mlxeff_heads;
using AttentionArgs = mlxeff_attention_args;

// The division into tasks: for each batch and group there is one task for each block of query positions and each part
// of the key range. If there are several parts, a task writes partial results to the workspace, and `merge` then
// combines them.
struct AttentionPlan {
  bool decode;               // use the few-row kernel (attention_decode.cpp), else the blocked one
  int64_t block, blocks;     // query positions per task; number of such blocks
  int64_t first_key;         // no key before it lies inside any query's window
  int64_t part_keys, parts;  // keys of a part; number of parts
  int64_t tasks;             // B * G * blocks * parts
  int64_t workspace;         // bytes; 0 if there is one part
};
AttentionPlan plan_attention(const AttentionArgs& args, int threads);

struct AttentionBackwardArgs {
  AttentionArgs forward;
  Heads dout, dq, dk, dv;
  float* row_dot;  // (B, H, S): sum over E of dout * out
};

struct AttentionKernels {
  // Runs tasks [begin, end) of the plan. Returns false if memory is exhausted.
  bool (*run)(const AttentionArgs& args, const AttentionPlan& plan, float* workspace, int64_t begin, int64_t end);
  // Computes output rows [begin, end) of B * H * S from the partial results of all parts.
  void (*merge)(const AttentionArgs& args, const AttentionPlan& plan, const float* workspace, int64_t begin,
                int64_t end);

  // The backward pass. The first function computes row_dot for rows [begin, end) of B * H * S and must be complete for
  // all rows before the other two run. The second computes dq, in tasks [begin, end) of B * G * ceil(S /
  // backward_block). The third computes dk and dv, in tasks [begin, end) of B * G * ceil(T / backward_block).
  void (*backward_row_dots)(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
  bool (*backward_queries)(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
  bool (*backward_keys)(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
};
constexpr int64_t backward_block = 64;

MLXEFF_DECLARE_FAMILY(AttentionKernels, attention_kernels)

static inline char* head_row(const Heads& x, int64_t b, int64_t h, int64_t token) {
  return static_cast<char*>(x.data) + (b * x.batch + h * x.head + token * x.token) * int64_t(dtype_size(x.dtype));
}

// The range [first, last) of keys that a query sees.
struct KeyRange {
  int64_t first, last;
};
static inline KeyRange visible_keys(const AttentionArgs& a, int64_t i) {
  const int64_t last = a.T - a.S + i + 1;
  return {a.window > 0 ? max_of(0, last - a.window) : 0, last};
}

// Returns the partial result of one row and part in the workspace: its maximum, its sum, then E accumulated values.
static inline float* partial_row(const AttentionArgs& a, const AttentionPlan& plan, float* workspace, int64_t b,
                                 int64_t h, int64_t i, int64_t part) {
  return workspace + (((b * a.H + h) * a.S + i) * plan.parts + part) * (a.E + 2);
}

}  // namespace mlxeff
