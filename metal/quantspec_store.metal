// QuantSpec's KV cache: the tiles of 16 tokens that new keys and values change. mlxeff/quantspec/planes.py defines
// codes and packing, and the result is that of its `encode`, `pack_keys` and `pack_values`, to the bit, for numbers
// that are rotated already: subtraction, division and rounding to integers in float32, scale and zero rounded to
// float16 before. (MLX compiles without fast math, so a division is rounded as IEEE 754 says.)
//
// A kernel's outputs are new arrays, so it gives whole tiles, with the bytes of all other tokens as they were: a byte
// of values has half codes of two tokens. The caller writes them over the old ones.
//
// A threadgroup of 128 threads computes one tile of one KV head. Its simdgroups encode one group, a token's key or
// value, after the other; then each thread packs words of eight half codes.
//
// Cost. For each head and tile it reads 8 E bytes for each new token, and reads and writes the tile's 32 E + 128 bytes
// (16 E + 128 without lower planes), with some 12 E FLOPs for each new token: for one token and E = 64, 5 KiB, 1 % of
// the bytes that a draft reads of 7000 tokens. Predicted, never measured: less than the launch, on every chip.

using namespace metal;

constant constexpr const uint tile_tokens = 16;

// The first bit of half code n, of 8 in a word.
inline uint shift_of(uint n) { return (n & 3) * 8 + (n >> 2) * 4; }

// Encodes a group of E numbers by one simdgroup. Where a number is NaN, scale and zero are.
template <int E>
inline void encode_group(const device float* numbers, threadgroup uchar* codes, threadgroup ushort* scale,
                         threadgroup ushort* zero, uint lane) {
  float low = INFINITY, high = -INFINITY;
  bool valid = true;
  for (uint d = lane; d < E; d += 32) {
    low = min(low, numbers[d]);
    high = max(high, numbers[d]);
    valid = valid && numbers[d] == numbers[d];
  }
  low = simd_min(low);
  high = simd_max(high);
  if (simd_max(valid ? 0u : 1u) != 0) low = high = NAN;
  half stored_scale = half((high - low) * (16.0f / 255.0f)), stored_zero = half(low);
  float step = float(stored_scale) * 0.0625f, base = float(stored_zero);
  for (uint d = lane; d < E; d += 32) {
    float code = step > 0.0f ? rint((numbers[d] - base) / step) : 0.0f;
    codes[d] = uchar(code > 0.0f ? min(code, 255.0f) : 0.0f);  // 0 for NaN
  }
  if (lane == 0) {
    *scale = as_type<ushort>(stored_scale);
    *zero = as_type<ushort>(stored_zero);
  }
}

// Writes word `index`: the bits `written` of `word`, the others as they were.
inline void write_word(device uint* target, const device uint* before, uint index, uint written, uint word) {
  target[index] = written == ~0u ? word : (before[index] & ~written) | (word & written);
}

// Of a tile: its words before, and those to write.
struct Tile {
  const device uint* before;
  device uint* after;
};

// Computes one tile, whose tokens from `from` to before `to` are new. keys, values: (to - from, E), rotated. upper:
// scales and upper halves; lower_keys, lower_values: lower halves, unused unless there are `with_keys`, `with_values`.
// codes: 32 E, scales: 64.
template <int E>
inline void store_tile(const device float* keys, const device float* values, uint from, uint to, Tile upper,
                       Tile lower_keys, bool with_keys, Tile lower_values, bool with_values, threadgroup uchar* codes,
                       threadgroup ushort* scales, uint simdgroup, uint lane) {
  for (uint group = simdgroup; group < 2 * (to - from); group += 4) {
    uint kind = group & 1, token = from + group / 2;  // kind: key or value
    encode_group<E>((kind == 0 ? keys : values) + (token - from) * E, codes + (kind * tile_tokens + token) * E,
                    scales + 2 * kind * tile_tokens + token, scales + (2 * kind + 1) * tile_tokens + token, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint thread_index = simdgroup * 32 + lane;
  if (thread_index < 2 * tile_tokens) {  // scales and zeros of two tokens
    uint word = 0, written = 0;
    for (uint i = 0; i < 2; i++) {
      uint token = (2 * thread_index + i) % tile_tokens;
      if (token < from || token >= to) continue;
      word |= uint(scales[2 * thread_index + i]) << 16 * i;
      written |= 0xFFFFu << 16 * i;
    }
    write_word(upper.after, upper.before, thread_index, written, word);
  }
  uint at = 2 * tile_tokens;  // where words of keys begin
  for (uint index = thread_index; index < 2 * E; index += 128) {
    uint token = index % tile_tokens, first = token * E + index / tile_tokens * 8, high = 0, low = 0;
    bool is_new = token >= from && token < to;
    for (uint n = 0; is_new && n < 8; n++) {
      high |= uint(codes[first + n] >> 4) << shift_of(n);
      low |= uint(codes[first + n] & 15) << shift_of(n);
    }
    write_word(upper.after, upper.before, at + index, is_new ? ~0u : 0u, high);
    if (with_keys) write_word(lower_keys.after, lower_keys.before, index, is_new ? ~0u : 0u, low);
  }
  at += 2 * E;  // where words of values begin
  for (uint index = thread_index; index < 2 * E; index += 128) {
    uint first = index / E * 8, channel = index % E, high = 0, low = 0, written = 0;
    for (uint n = 0; n < 8; n++) {
      if (first + n < from || first + n >= to) continue;
      uint code = codes[(tile_tokens + first + n) * E + channel];
      high |= code >> 4 << shift_of(n);
      low |= (code & 15) << shift_of(n);
      written |= 15u << shift_of(n);
    }
    write_word(upper.after, upper.before, at + index, written, high);
    if (with_values) write_word(lower_values.after, lower_values.before, index, written, low);
  }
}

// The kernel's arguments of one plane: the array of the cache, which begins at tile `first`, and the output, which
// begins at tile `begin`, with the number of tiles in each. Both have `words` words in a tile.
struct Plane {
  const device uint* cached;
  device uint* out;
  uint first, begin, cached_tiles, out_tiles, words;

  bool has(uint tile) const { return tile >= begin; }
  Tile tile(uint head, uint number) const {
    if (!has(number)) return Tile{cached, out};
    return Tile{cached + (ulong(head) * cached_tiles + number - first) * words,
                out + (ulong(head) * out_tiles + number - begin) * words};
  }
};

// Computes the tile number `begin` + `place` of one KV head; begin is the one of the first new token. length: cached
// tokens before, count: new ones; keys, values: (heads, count, E).
template <int E>
inline void store(const device float* keys, const device float* values, uint length, uint count, Plane upper,
                  Plane lower_keys, Plane lower_values, threadgroup uchar* codes, threadgroup ushort* scales,
                  uint place, uint head, uint simdgroup, uint lane) {
  uint tile = length / tile_tokens + place, start = tile * tile_tokens;
  uint first = max(start, length), last = min(start + tile_tokens, length + count);
  ulong at = (ulong(head) * count + first - length) * E;
  store_tile<E>(keys + at, values + at, first - start, last - start, upper.tile(head, tile),
                lower_keys.tile(head, tile), lower_keys.has(tile), lower_values.tile(head, tile),
                lower_values.has(tile), codes, scales, simdgroup, lane);
}
