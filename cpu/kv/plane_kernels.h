// The kernels of the store in planes of 4 bits (plane_kv.h, plane_layout.h). Each call runs on one thread.
//
// Shape letters: B batch, H query heads, G key/value heads, S queries, E head size, R = H / G. A head is one KV head of
// one sequence, b * G + g.
#pragma once
#include "base/isa.h"
#include "kv/kv_store.h"
#include "kv/plane_layout.h"

namespace mlxeff {

// The sequence is divided into parts that begin at multiples of this, whatever the queries are.
constexpr int64_t plane_part_tiles = 32, plane_part_tokens = plane_part_tiles * tile_tokens;

struct PlaneArgs {
  Planes planes;
  Span span;
  AttentionSizes sizes;
  const float* queries;       // (B, S, H, E)
  float* attended;            // (B, S, H, E)
  int64_t first_part, parts;  // the parts that hold what the queries see
  float* partial;             // (B, S, H, parts, E + 2): maximum, sum, accumulated rotated values
};

struct PlaneKernels {
  // Rotates one row of `size` floats; `to` may be `from`.
  void (*rotate)(const float* from, float* to, int64_t size);
  // Rotates one row and writes its group, of group_bytes(size).
  void (*encode)(const float* row, int64_t size, uint8_t* group);
  // Stores the groups of the key and of the value of a token of a head.
  void (*put)(const Planes& planes, int64_t size, int64_t head, int64_t token, const uint8_t* key,
              const uint8_t* value);
  // Computes the partial results of tasks [begin, end) of B * G * parts; with one part, the output too. Returns false
  // if memory is exhausted.
  bool (*attend)(const PlaneArgs& args, int64_t begin, int64_t end);
  // Completes the output rows [begin, end) of B * S * H.
  void (*merge)(const PlaneArgs& args, int64_t begin, int64_t end);
  // Writes the rotated keys and values of one tile of one head, as far as they are tokens before args.span.end, to rows
  // of E floats.
  void (*dequantise)(const PlaneArgs& args, int64_t head, int64_t tile, float* keys, float* values);
};

MLXEFF_DECLARE_FAMILY(PlaneKernels, plane_kernels)

}  // namespace mlxeff
