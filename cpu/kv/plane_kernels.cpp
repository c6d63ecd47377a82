// Encoding of keys and values into planes, decoding for the dense kernels, and the merge of the parts of attention.
#include "kv/plane_kernels.h"

#include "attention/attention_rows.h"
#include "kv/plane_attend.h"
#include "kv/plane_products.h"
#include "kv/plane_rotate.h"

namespace mlxeff {
namespace MLXEFF_ISA {

static void encode(const float* row, int64_t size, uint8_t* group) {
  float rotated[largest_plane_head];
  rotate_row(row, rotated, size);
  vf low = load(rotated), high = low, poison = zero();
  for (int64_t i = 0; i < size; i += VL) {
    const vf x = load(rotated + i);
    low = x < low ? x : low;
    high = max(x, high);
    poison = fma(x, zero(), poison);
  }
  const float least = -max(-low), range = max(high) - least, bad = sum(poison);  // bad is 0 or NaN
  f16 numbers[2];
  from_float(bad == 0 ? range * (16.0f / 255.0f) : NAN, numbers);
  from_float(bad == 0 ? least : NAN, numbers + 1);
  memcpy(group + size, numbers, sizeof numbers);
  const float step = to_float(numbers[0]) / 16.0f, offset = to_float(numbers[1]);
  if (!(step > 0)) {
    memset(group, 0, size_t(size));
    return;
  }
  const vf steps = broadcast(step);
  for (int64_t i = 0; i < size; i += VL) {
    vf code = (load(rotated + i) - offset) / steps;
    code = code > 0.0f ? code : zero();  // NaN gives 0
    code = code < 255.0f ? code : broadcast(255.0f);
    store_bytes(group + i, to_integers(code));
  }
}

// The upper halves of four codes in `low` and four in `high`, as a word of a plane; and the lower halves.
MLXEFF_INLINE uint32_t upper_halves(uint32_t low, uint32_t high) {
  return (low >> 4 & 0x0f0f0f0fu) | (high & 0xf0f0f0f0u);
}
MLXEFF_INLINE uint32_t lower_halves(uint32_t low, uint32_t high) {
  return (low & 0x0f0f0f0fu) | (high << 4 & 0xf0f0f0f0u);
}

static void put(const Planes& planes, int64_t size, int64_t head, int64_t token, const uint8_t* key,
                const uint8_t* value) {
  const PlaneTile tile = plane_tile(planes, size, head, token / tile_tokens);
  const int64_t t = token % tile_tokens;
  memcpy(tile.key_scales + t, key + size, 2);
  memcpy(tile.key_zeros + t, key + size + 2, 2);
  memcpy(tile.value_scales + t, value + size, 2);
  memcpy(tile.value_zeros + t, value + size + 2, 2);
  for (int64_t j = 0; j < size / 8; ++j) {
    uint32_t codes[2];
    memcpy(codes, key + 8 * j, sizeof codes);
    const uint32_t upper = upper_halves(codes[0], codes[1]), lower = lower_halves(codes[0], codes[1]);
    const int64_t place = (j * tile_tokens + t) * 4;
    memcpy(tile.upper_keys + place, &upper, sizeof upper);
    if (tile.lower_keys) memcpy(tile.lower_keys + place, &lower, sizeof lower);
  }
  // The other half of each byte belongs to another token.
  const int64_t place = t / 8 * size * 4 + t % 4;
  const int shift = t % 8 < 4 ? 0 : 4, kept = 0xf0 >> shift;
  for (int64_t d = 0; d < size; ++d) {
    uint8_t* const byte = tile.upper_values + place + 4 * d;
    *byte = uint8_t((*byte & kept) | value[d] >> 4 << shift);
  }
  for (int64_t d = 0; d < size && tile.lower_values; ++d) {
    uint8_t* const byte = tile.lower_values + place + 4 * d;
    *byte = uint8_t((*byte & kept) | (value[d] & 15) << shift);
  }
}

void merge_row(const PlaneArgs& a, int64_t row) {
  const int64_t E = a.sizes.size;
  float peak = -INFINITY, total = 0.0f;
  for (int64_t part = 0; part < a.parts; ++part) peak = fmaxf(peak, plane_partial(a, row, part)[0]);
  float merged[largest_plane_head];
  memset(merged, 0, sizeof merged);
  for (int64_t part = 0; part < a.parts; ++part) {
    const float* const from = plane_partial(a, row, part);
    if (from[0] == -INFINITY && from[1] == 0.0f) continue;  // the row sees nothing of this part
    const float factor = exp2f(from[0] - peak);
    total += from[1] * factor;
    for (int64_t e = 0; e < E; e += VL) store(merged + e, fma(load(from + 2 + e), broadcast(factor), load(merged + e)));
  }
  const vf inverse = broadcast(1.0f / total);
  for (int64_t e = 0; e < E; e += VL) store(merged + e, load(merged + e) * inverse);
  rotate_row(merged, a.attended + row * E, E);
}

static void merge(const PlaneArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) merge_row(a, row);
}

// The eight half codes of each lane as numbers; number i of the low halves comes first, then those of the high ones.
MLXEFF_INLINE void decode_words(const uint8_t* upper, const uint8_t* lower, vf numbers[8]) {
  vu u, l = {};
  memcpy(&u, upper, sizeof u);
  if (lower) memcpy(&l, lower, sizeof l);
  for (int i = 0; i < 8; ++i) {
    const int shift = i % 4 * 8 + i / 4 * 4;
    const vu code = (u >> shift & 15u) << 4 | (l >> shift & 15u);
    numbers[i] = __builtin_convertvector((vi)code, vf) + (lower ? 0.0f : 7.5f);
  }
}

static void decode_keys(const PlaneTile& tile, int64_t size, int64_t tokens, float* to) {
  constexpr int words = VL < 8 ? 1 : VL / 8;  // vectors of words with VL channels
  for (int64_t t = 0; t < tokens; t += VL) {
    const vf scale = load(tile.key_scales + t) * 0.0625f, shift = load(tile.key_zeros + t);
    for (int64_t e = 0; e < size; e += 8 * words) {
      vf rows[8 * words];
      for (int w = 0; w < words; ++w) {
        const int64_t place = ((e / 8 + w) * tile_tokens + t) * 4;
        decode_words(tile.upper_keys + place, tile.lower_keys ? tile.lower_keys + place : nullptr, rows + 8 * w);
      }
      for (vf& row : rows) row = fma(row, scale, shift);
      for (int first = 0; first < 8 * words; first += VL) {
        transpose(rows + first);
        for (int i = 0; i < VL && t + i < tokens; ++i) store(to + (t + i) * size + e + first, rows[first + i]);
      }
    }
  }
}

static void decode_values(const PlaneTile& tile, int64_t size, int64_t tokens, float* to) {
  for (int64_t t = 0; t < tokens; t += 8)
    for (int64_t e = 0; e < size; e += VL) {
      const int64_t place = (t / 8 * size + e) * 4;
      vf rows[8];
      decode_words(tile.upper_values + place, tile.lower_values ? tile.lower_values + place : nullptr, rows);
      for (int i = 0; i < 8 && t + i < tokens; ++i) {
        const vf scale = broadcast(to_float(tile.value_scales[t + i]) * 0.0625f);
        store(to + (t + i) * size + e, fma(rows[i], scale, broadcast(to_float(tile.value_zeros[t + i]))));
      }
    }
}

static void dequantise(const PlaneArgs& a, int64_t head, int64_t tile, float* keys, float* values) {
  const PlaneTile seen = seen_tile(a.planes, a.sizes.size, head, tile);
  const int64_t tokens = min_of(tile_tokens, a.span.end - tile * tile_tokens);
  decode_keys(seen, a.sizes.size, tokens, keys);
  decode_values(seen, a.sizes.size, tokens, values);
}

const PlaneKernels& plane_kernels() {
  static const PlaneKernels table = {rotate_row, encode, put, attend_parts, merge, dequantise};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
