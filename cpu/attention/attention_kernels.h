// The kernels of causal attention. Each call runs on one thread; see attention.cpp for how they are put together.
//
// Letters: B batch, H query heads, G key/value heads, S queries, T keys (T >= S), E head size. R = H / G query heads
// share a key/value head, and one task handles all R of them, so that keys and values are read once a group. A row is
// one query of one head; within a group, row = position * R + (head - group * R).
#pragma once
#include "base/isa.h"

namespace mlxeff {

using Heads = mlxeff_heads;
using AttentionArgs = mlxeff_attention_args;

// Tasks: for each batch and group, blocks of query positions times parts of the key range. With several parts, a task
// leaves partial results in the workspace and a row is complete after `merge`.
struct AttentionPlan {
  bool decode;               // few rows: dot products straight from the cache; else blocked matrix products
  int64_t block, blocks;     // query positions a task; number of such blocks
  int64_t first_key;         // keys before it are outside every window
  int64_t part_keys, parts;  // keys of a part; number of parts
  int64_t tasks;             // B * G * blocks * parts
  int64_t workspace;         // bytes, 0 with one part
};
AttentionPlan plan_attention(const AttentionArgs& args, int threads);

struct AttentionBackwardArgs {
  AttentionArgs forward;
  Heads dout, dq, dk, dv;
  float* row_dot;  // (B, H, S): sum over E of dout * out
};

struct AttentionKernels {
  // Tasks [begin, end) of the plan. False: out of memory.
  bool (*run)(const AttentionArgs& args, const AttentionPlan& plan, float* workspace, int64_t begin, int64_t end);
  // Output rows [begin, end) of B * H * S from the partial results of all parts.
  void (*merge)(const AttentionArgs& args, const AttentionPlan& plan, const float* workspace, int64_t begin,
                int64_t end);

  // Backward, three steps in this order; each needs all of the first. row_dots: rows [begin, end) of B * H * S.
  // queries: tasks [begin, end) of B * G * ceil(S / backward_block) give dq.
  // keys: tasks [begin, end) of B * G * ceil(T / backward_block) give dk and dv.
  void (*backward_row_dots)(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
  bool (*backward_queries)(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
  bool (*backward_keys)(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
};
constexpr int64_t backward_block = 64;

MLXEFF_DECLARE_FAMILY(AttentionKernels, attention_kernels)

static inline char* head_row(const Heads& x, int64_t b, int64_t h, int64_t token) {
  return static_cast<char*>(x.data) + (b * x.batch + h * x.head + token * x.token) * int64_t(dtype_size(x.dtype));
}

// Keys [first, last) are seen by the query at position i of S.
struct KeyRange {
  int64_t first, last;
};
static inline KeyRange visible_keys(const AttentionArgs& a, int64_t i) {
  const int64_t last = a.T - a.S + i + 1;
  return {a.window > 0 ? max_of(0, last - a.window) : 0, last};
}

// A partial result in the workspace: maximum, sum, then E accumulated values.
static inline float* partial_row(const AttentionArgs& a, const AttentionPlan& plan, float* workspace, int64_t b,
                                 int64_t h, int64_t i, int64_t part) {
  return workspace + (((b * a.H + h) * a.S + i) * plan.parts + part) * (a.E + 2);
}

}  // namespace mlxeff
