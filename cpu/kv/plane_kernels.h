// The kernels of the store of 4-bit planes (plane_kv.h). Each call runs on one thread.
//
// Shape letters: B batch, H query heads, G key/value heads, S queries, E head size, R = H / G. A block holds `block`
// tokens. A number is stored as a code of 8 bits in a group with one scale and one zero, both fp16: the upper half of
// the code in one plane, the lower half in another, which a store or a view may lack.
//
//   both planes       (16 upper + lower) scale / 16 + zero
//   the upper plane   (upper + 7.5 / 16) scale + zero          the middle of the values with this upper half
//
// Planes are sequences of bytes with two codes each, the first one in the low half. A group of keys is one channel of
// one block, a group of values is one token; `width` is E rounded up to a multiple of 32. All that belongs to one head
// of one block lies together, `upper_bytes` and `lower_bytes` of it:
//
//   upper   scales of the keys (E), their zeros (E), scales of the values (block), their zeros (block); the upper
//   halves
//           of the keys (E, block / 2) and of the values (block, width / 2)
//   lower   the lower halves of the keys and of the values, where the store has them
#pragma once
#include "attention/attention_kernels.h"
#include "kv/kv_store.h"

namespace mlxeff {

struct PlaneArgs {
  Span span;
  AttentionSizes sizes;
  const uint8_t *upper, *lower;     // (B, G, capacity, upper_bytes or lower_bytes)
  bool lower_keys, lower_values;    // whether there are lower halves of the keys, and of the values
  int64_t block, capacity, blocks;  // tokens of a block; blocks that there is room for, and that are filled
  const float* queries;             // (B, S, H, E)
  int64_t part_blocks, parts;       // blocks of a part of the sequence; number of parts
  float* partial;                   // (B, H, S, parts, E + 2): maximum, sum, accumulated values

  int64_t width() const { return round_up(sizes.size, 32); }
  int64_t key_bytes() const { return sizes.size * block / 2; }
  int64_t value_bytes() const { return block * width() / 2; }
  int64_t upper_bytes() const { return 4 * (sizes.size + block) + key_bytes() + value_bytes(); }
  int64_t lower_bytes() const { return (lower_keys ? key_bytes() : 0) + (lower_values ? value_bytes() : 0); }
};

// The codes of the keys or of the values of one block. lower is null where there are no lower halves.
struct Plane {
  const uint8_t *upper, *lower;
  const f16 *scale, *zero;
};
inline Plane key_plane(const PlaneArgs& a, int64_t place) {
  const uint8_t* const upper = a.upper + place * a.upper_bytes();
  const f16* const scale = reinterpret_cast<const f16*>(upper);
  return {upper + 4 * (a.sizes.size + a.block), a.lower_keys ? a.lower + place * a.lower_bytes() : nullptr, scale,
          scale + a.sizes.size};
}
inline Plane value_plane(const PlaneArgs& a, int64_t place) {
  const Plane keys = key_plane(a, place);
  const f16* const scale = keys.zero + a.sizes.size;
  const int64_t before = a.lower_keys ? a.key_bytes() : 0;
  return {keys.upper + a.key_bytes(), a.lower_values ? a.lower + place * a.lower_bytes() + before : nullptr, scale,
          scale + a.block};
}

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
