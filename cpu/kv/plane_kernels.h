// The kernels of the store of 4-bit planes (plane_kv.h). Each call runs on one thread.
//
// Shape letters: B batch, H query heads, G key/value heads, S queries, E head size, R = H / G. A block holds `block`
// tokens. A number is stored as a code of 8 bits in a group with one scale and one zero, both fp16: the upper half of
// the code in one plane, the lower half in another, which a store or a view may lack.
//
//   both planes       (16 upper + lower) scale / 16 + zero
//   the upper plane   (upper + 7.5 / 16) scale + zero          the middle of the values with this upper half
//
// A plane is a sequence of bytes, each with two codes, the first one in its low half. Keys are (B, G, capacity, E,
// block / 2): a group is one channel of one block. Values are (B, G, capacity, block, width / 2): a group is one token,
// and `width` is E rounded up to a multiple of 32.
#pragma once
#include "attention/attention_kernels.h"
#include "kv/kv_store.h"

namespace mlxeff {

struct Plane {
  const uint8_t *upper, *lower;  // lower is null without a lower plane
  const f16 *scale, *zero;
};

struct PlaneArgs {
  Span span;
  AttentionSizes sizes;
  Plane keys, values;
  int64_t block, capacity, blocks;  // tokens of a block; blocks that there is room for, and that are filled
  int64_t width;                    // channels of a row of values
  const float* queries;             // (B, S, H, E)
  int64_t part_blocks, parts;       // blocks of a part of the sequence; number of parts
  float* partial;                   // (B, H, S, parts, E + 2): maximum, sum, accumulated values
};

struct PlaneKernels {
  // Computes the partial results of tasks [begin, end) of B * G * parts. Returns false if memory is exhausted.
  bool (*attend)(const PlaneArgs& args, int64_t begin, int64_t end);
  // Completes output rows [begin, end) of B * H * S. `tail` has the same rows, the attention to the keys outside of the
  // planes, and `tail_lse` the natural logarithms of its sums of exponentials.
  void (*merge)(const PlaneArgs& args, const float* tail, const float* tail_lse, const Heads& out, int64_t begin,
                int64_t end);
  // Writes the keys and values of blocks [begin, end) of B * G * blocks as fp32 rows (B, G, tokens, E).
  bool (*dequantise)(const PlaneArgs& args, float* keys, float* values, int64_t tokens, int64_t begin, int64_t end);
};

MLXEFF_DECLARE_FAMILY(PlaneKernels, plane_kernels)

}  // namespace mlxeff
