// Where the numbers of a store in planes of 4 bits lie (plane_kv.h). mlxeff/quantspec/planes.py is the reference of the
// codes and of this layout.
//
// A group is the key or the value of one token and KV head, rotated: each block of b consecutive channels, b being the
// largest power of two that divides the head size E, is multiplied by the Hadamard matrix over the square root of b. A
// group has one scale and one zero, both fp16, and a code of 8 bits for each channel. The upper half of the code lies
// in one plane, the lower half in another, which a store or a view may lack:
//
//   both planes       (16 upper + lower) scale / 16 + zero
//   the upper plane   (upper + 7.5 / 16) scale + zero          the middle of the numbers with this upper half
//
// Tokens lie in tiles of 16. The arrays hold, for each sequence, KV head and tile:
//
//   upper          16 scales of keys, 16 zeros of keys, 16 scales of values, 16 zeros of values; the upper halves of
//                  the keys (8 E bytes), then of the values (8 E bytes)
//   lower_keys     the lower halves of the keys (8 E bytes)
//   lower_values   the lower halves of the values (8 E bytes)
//
//   halves of keys     bytes (E / 8, 16 tokens, 4): byte (j, t, i) holds channel 8 j + i of token t in its low half,
//   and
//                      channel 8 j + 4 + i in its high half
//   halves of values   bytes (2, E, 4): byte (h, d, i) holds channel d of token 8 h + i in its low half, and of token
//                      8 h + 4 + i in its high half
//
// So each lane of 32 bits of a vector holds 8 channels of one token, or 8 tokens of one channel.
#pragma once
#include "base/common.h"

namespace mlxeff {

constexpr int64_t tile_tokens = 16;
constexpr int64_t largest_plane_head = 256;  // sums of products of a head fit 32 bits up to this size

static inline bool plane_head_size(int64_t size) { return size > 0 && size <= largest_plane_head && size % 16 == 0; }

// All numbers of tiles count from token 0.
struct Planes {
  uint8_t *upper, *lower_keys, *lower_values;
  int64_t tiles, key_tiles, value_tiles;  // tiles that the three arrays have for each head
  int64_t first_keys, first_values;       // tiles at which lower_keys and lower_values begin
  int64_t coarse_keys, coarse_values;     // tiles before these are read from the upper plane alone

  static int64_t half_bytes(int64_t size) { return size * tile_tokens / 2; }
  static int64_t upper_bytes(int64_t size) { return 8 * tile_tokens + 2 * half_bytes(size); }

  // True if the tokens [0, end) have a place.
  bool hold(int64_t end) const {
    const int64_t wanted = ceil_div(end, tile_tokens);
    return tiles >= wanted && first_keys + key_tiles >= wanted && first_values + value_tiles >= wanted;
  }
};

// One tile of one head. The lower halves are null where the store does not keep them.
struct PlaneTile {
  f16 *key_scales, *key_zeros, *value_scales, *value_zeros;
  uint8_t *upper_keys, *upper_values, *lower_keys, *lower_values;
};

static inline PlaneTile plane_tile(const Planes& planes, int64_t size, int64_t head, int64_t tile) {
  const int64_t half = Planes::half_bytes(size);
  uint8_t* const upper = planes.upper + (head * planes.tiles + tile) * Planes::upper_bytes(size);
  f16* const numbers = reinterpret_cast<f16*>(upper);
  PlaneTile found = {
      numbers, numbers + tile_tokens, numbers + 2 * tile_tokens, numbers + 3 * tile_tokens, upper, upper, nullptr,
      nullptr};
  found.upper_keys += 8 * tile_tokens;
  found.upper_values += 8 * tile_tokens + half;
  if (tile >= planes.first_keys)
    found.lower_keys = planes.lower_keys + (head * planes.key_tiles + tile - planes.first_keys) * half;
  if (tile >= planes.first_values)
    found.lower_values = planes.lower_values + (head * planes.value_tiles + tile - planes.first_values) * half;
  return found;
}

// The same tile as a reader sees it: the lower halves are null in a coarse tile too.
static inline PlaneTile seen_tile(const Planes& planes, int64_t size, int64_t head, int64_t tile) {
  PlaneTile found = plane_tile(planes, size, head, tile);
  if (tile < planes.coarse_keys) found.lower_keys = nullptr;
  if (tile < planes.coarse_values) found.lower_values = nullptr;
  return found;
}

// A group before it is packed: `size` codes, then its scale and its zero in fp16.
static inline int64_t group_bytes(int64_t size) { return size + 4; }

}  // namespace mlxeff
