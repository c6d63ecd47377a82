// QuantSpec's KV cache (arXiv 2502.10424): attention over keys and values in two planes of 4 bits, of the upper plane
// alone (draft) or of both (verify). mlxeff/quantspec/planes.py defines the codes and how they are packed. Keys, values
// and queries are rotated; keys are seen as
//
//   key[t][d] = c step + zero[t],  step = scale[t] / 16,  c = 16 u + l, or 16 u + 7.5 where the lower half is not read,
//
// and values likewise, so the scales are folded into the scores and the probabilities and never into single numbers:
//
//   score[t] = step[t] (sum_d q[d] c[t][d]) + zero[t] (sum_d q[d]),
//   out[d] = sum_t (p[t] step[t]) c[t][d] + sum_t p[t] zero[t].
//
// `attend_part` computes a part of 512 tokens of one KV head for all its query rows: R query heads of M new tokens
// each. `merge_parts` merges the parts of a row and rotates its output back. Parts are counted from token 0 and all
// rows are computed in the same way, one product of 8 x 8 matrices after the other, so a row's result is the same to
// the bit alone and among others: a step or part of which it sees nothing multiplies its sums by 1 or adds 0. (It is
// assumed that a GPU's matrix instructions compute all rows of a matrix alike.) A product is added to another number
// only by fma, so that no compiler can fuse them differently in two instances of a template.
//
// A simdgroup multiplies 8 x 8 matrices, of which a lane holds two neighbours of a row. A 32-bit word of keys holds 8
// channels of one token, one of values 8 tokens of one channel. So a lane loads the words of two tokens (channels), and
// takes from both the half code of the channel (token) that is its row in the matrix. Each code is unpacked once in a
// threadgroup and used for all of its query rows.
//
// Cost. A token has E + 8 bytes in the upper plane and E more in the lower one, each read once for all R M rows, and
// 4 E FLOPs for each row, in multiples of 8 rows: with E = 64 and R = 4, 28 FLOPs per byte for a draft of M = 1 and 45
// for M = 5 over both planes; unpacking adds some 5 to 8 instructions for each code and lane. A part writes, and
// `merge_parts` reads, 4 E R M bytes: a quarter of the upper plane's bytes for 32 rows, 3 % for 4. Predicted, never
// measured: M1 (68 GB/s, 2.6 TFLOPS), M2 Pro (200 GB/s, 6.8) and M3 Max (400 GB/s, 14) have 34 to 38 FLOPs for each
// byte of memory bandwidth, so drafts take about the time of reading the planes, and verification of 5 rows of 4 heads
// some 1.3 to 1.8 times as long. With R = 1 and M = 1, 7 of 8 rows are wasted: arithmetic limits that too.

using namespace metal;

constant constexpr const uint tile_tokens = 16, part_tokens = 512;
constant constexpr const uint simdgroups = 4;
constant constexpr const uint step_tokens = simdgroups * tile_tokens;  // a simdgroup scores one tile in a step
constant constexpr const uint pitch = step_tokens + 4;  // of rows of scores; 4 more against bank conflicts
constant constexpr const uint scale_words = 32;         // of a tile: scales and zeros of keys and values

using Matrix = simdgroup_matrix<float, 8, 8>;

// Where a lane's two elements are in a matrix: `row`, and `column` and the next one; and in a word of 8 half codes, the
// first bit of the one that belongs to `row`.
struct Place {
  uint row, column, shift;
};
inline Place place_of(uint lane) {
  uint row = (lane / 4 & 4) + lane / 2 % 4;
  return Place{row, (lane / 4 & 2) * 2 + lane % 2 * 2, (row & 3) * 8 + (row >> 2) * 4};
}

// What a launch reads: tokens that are cached, the last tokens that a query sees (0: all), the tiles at which the lower
// planes begin, and those from which on they are read.
struct View {
  uint length, window, first_keys, first_values, coarse_keys, coarse_values;
};
template <typename Numbers>
inline View view_of(Numbers numbers) {
  return View{uint(numbers[0]), uint(numbers[1]), uint(numbers[2]),
              uint(numbers[3]), uint(numbers[4]), uint(numbers[5])};
}

// The words of one tile in one plane pair: of its keys or of its values. `lower` is undefined where `coarse`.
struct Words {
  const device uint* upper;
  const device uint* lower;
  bool coarse;

  // The codes in the words `index` and `index` + 1 whose halves begin at bit `shift`, exactly: as the mantissa of a
  // float from 2^23 on, a code needs no conversion.
  float2 codes(uint index, uint shift) const {
    uint2 bits = (uint2(upper[index], upper[index + 1]) >> shift & 15u) << 4;
    if (!coarse) bits |= uint2(lower[index], lower[index + 1]) >> shift & 15u;
    return as_type<float2>(bits | 0x4B000000u) - (coarse ? 8388600.5f : 8388608.0f);
  }
};

// The numbers `index` and `index` + 1, an even number and the next, of a tile's scales and zeros.
inline float2 scale_pair(const device uint* tile, uint index) { return float2(as_type<half2>(tile[index / 2])); }

// A lane's two elements of a matrix.
inline void set(thread Matrix& matrix, float2 elements) {
  matrix.thread_elements()[0] = elements.x;
  matrix.thread_elements()[1] = elements.y;
}

// The sums over all channels of query times code, for the 16 tokens of a tile and B blocks of 8 query rows. Rows beyond
// the last one count as zeros.
template <int E, int B>
inline void multiply_keys(const device float* queries, uint rows, Words keys, Place place,
                          thread Matrix (&sums)[B][2]) {
#pragma unroll
  for (int b = 0; b < B; b++)
#pragma unroll
    for (int side = 0; side < 2; side++) sums[b][side] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (uint j = 0; j < E / 8; j++) {
    Matrix left, right[2];
    set(right[0], keys.codes(j * tile_tokens + place.column, place.shift));
    set(right[1], keys.codes(j * tile_tokens + 8 + place.column, place.shift));
#pragma unroll
    for (int b = 0; b < B; b++) {
      uint row = 8 * b + place.row;
      const device float* query = queries + row * E + 8 * j + place.column;
      set(left, row < rows ? float2(query[0], query[1]) : float2(0.0f, 0.0f));
      simdgroup_multiply_accumulate(sums[b][0], left, right[0], sums[b][0]);
      simdgroup_multiply_accumulate(sums[b][1], left, right[1], sums[b][1]);
    }
  }
}

// Adds the products of the probabilities of a step with the codes of 8 of its tokens, half a tile, to the sums of B
// blocks of query rows and the channel blocks of a simdgroup.
template <int E, int B, int C>
inline void multiply_values(const threadgroup float* probabilities, Words values, uint half_tile, Place place,
                            uint simdgroup, thread Matrix (&sums)[B][C]) {
  Matrix left[B], right;
#pragma unroll
  for (int b = 0; b < B; b++) simdgroup_load(left[b], probabilities + 8 * b * pitch, pitch);
#pragma unroll
  for (int i = 0; i < C; i++) {
    uint block = simdgroup + i * simdgroups;
    if (block >= E / 8) continue;
    set(right, values.codes(half_tile * E + block * 8 + place.column, place.shift));
#pragma unroll
    for (int b = 0; b < B; b++) simdgroup_multiply_accumulate(sums[b][i], left[b], right, sums[b][i]);
  }
}

// The state of the softmax of each query row in threadgroup memory, one array of `rows` numbers after the other: the
// largest score, the sum of exponentials, the sum of value zeros with these factors, the factor by which the last step
// multiplied older sums, the sum of the query's channels.
struct Softmax {
  threadgroup float *largest, *total, *zeros, *factor, *query_sum;
};
inline Softmax softmax_in(threadgroup float* memory, uint rows) {
  return Softmax{memory, memory + rows, memory + 2 * rows, memory + 3 * rows, memory + 4 * rows};
}

// Sets the states of a simdgroup's rows (each fourth one) to those of no token.
template <int E>
inline void begin(Softmax state, const device float* queries, uint rows, uint padded, uint simdgroup, uint lane) {
  for (uint row = simdgroup; row < padded; row += simdgroups) {
    float sum = 0;
    if (row < rows)
      for (uint d = lane; d < E; d += 32) sum += queries[row * E + d];
    sum = simd_sum(sum);
    if (lane == 0) {
      state.largest[row] = -INFINITY;
      state.total[row] = state.zeros[row] = 0;
      state.factor[row] = 1;
      state.query_sum[row] = sum;
    }
  }
}

// Turns the scores of a step's 64 tokens, -infinity where a row does not see one, into exponentials times value steps,
// and updates the states. A simdgroup handles each fourth row, a lane two tokens, which have these steps and zeros.
inline void update(Softmax state, threadgroup float* scores, uint rows, float2 steps, float2 zeros, uint simdgroup,
                   uint lane) {
  for (uint row = simdgroup; row < rows; row += simdgroups) {
    threadgroup float* own = scores + row * pitch + 2 * lane;
    float2 score = float2(own[0], own[1]);
    bool unseen = score.x == -INFINITY, next_unseen = score.y == -INFINITY;
    float before = state.largest[row], total = state.total[row], zero = state.zeros[row];
    float largest = max(before, simd_max(max(score.x, score.y)));
    float base = largest == -INFINITY ? 0.0f : largest, factor = exp2(before - base);
    float2 power = float2(unseen ? 0.0f : exp2(score.x - base), next_unseen ? 0.0f : exp2(score.y - base));
    own[0] = unseen ? 0.0f : power.x * steps.x;
    own[1] = next_unseen ? 0.0f : power.y * steps.y;
    float first = unseen ? 0.0f : power.x * zeros.x;
    total = fma(total, factor, simd_sum(power.x + power.y));
    zero = fma(zero, factor, simd_sum(next_unseen ? first : fma(power.y, zeros.y, first)));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) {
      state.largest[row] = largest;
      state.total[row] = total;
      state.zeros[row] = zero;
      state.factor[row] = factor;
    }
  }
}

// Attention of the query rows of one KV head to one part. A threadgroup has 128 threads. queries: (rows, E) float32 of
// this head, row r M + m the token m of the query head r, rotated. upper, lower: the tiles of this head. scale: of the
// scores, times log2(e). sums: (rows, E), the sums of this part, not divided by the total. stats: (rows, 2), the
// largest score and the total. Nothing is written to `sums` where no row sees a token. scores: 8 B pitch, memory: 40 B.
template <int E, int B>
inline void attend_part(const device float* queries, const device uint* upper, const device uint* lower_keys,
                        const device uint* lower_values, View view, float scale, uint rows, uint tokens, uint part,
                        device float* sums, device float* stats, threadgroup float* scores, threadgroup float* memory,
                        uint simdgroup, uint lane) {
  constexpr int C = (E / 8 + simdgroups - 1) / simdgroups;  // channel blocks of a simdgroup
  constexpr uint tile_words = 4 * E + scale_words, plane_words = 2 * E;
  // The tokens that any row sees are those from `first` to the last one.
  uint first = view.window != 0 && view.length + 1 > tokens + view.window ? view.length + 1 - tokens - view.window : 0;
  uint begins = max(first, part * part_tokens), ends = min(view.length, (part + 1) * part_tokens);
  Place place = place_of(lane);
  Softmax state = softmax_in(memory, 8 * B);
  begin<E>(state, queries, rows, 8 * B, simdgroup, lane);
  Matrix out[B][C];
#pragma unroll
  for (int b = 0; b < B; b++)
#pragma unroll
    for (int i = 0; i < C; i++) out[b][i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (uint step = begins / step_tokens * step_tokens; step < ends; step += step_tokens) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // The scores of one tile for each simdgroup.
    uint tile = step / tile_tokens + simdgroup, at = tile * tile_tokens;
    bool seen = at < ends && at + tile_tokens > begins;
    const device uint* words = upper + tile * tile_words;
    Matrix scored[B][2];
    if (seen) {
      bool coarse = tile < view.coarse_keys;
      const device uint* lower = lower_keys + (coarse ? 0 : tile - view.first_keys) * plane_words;
      multiply_keys<E, B>(queries, rows, Words{words + scale_words, lower, coarse}, place, scored);
    }
#pragma unroll
    for (int side = 0; side < 2; side++) {
      uint token = 8 * side + place.column;
      float2 steps = 0.0f, zeros = 0.0f;
      if (seen) {
        steps = scale_pair(words, token) * 0.0625f;
        zeros = scale_pair(words, tile_tokens + token);
      }
#pragma unroll
      for (int b = 0; b < B; b++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          uint row = 8 * b + place.row, column = at + token + e, position = view.length - tokens + row % tokens;
          bool visible = seen && column <= position && (view.window == 0 || column + view.window > position);
          float score = -INFINITY;
          if (visible)
            score = scale * fma(steps[e], scored[b][side].thread_elements()[e], zeros[e] * state.query_sum[row]);
          scores[row * pitch + tile_tokens * simdgroup + token + e] = row < rows ? score : 0.0f;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // Exponentials; a lane has two tokens of the step.
    float2 steps = 0.0f, zeros = 0.0f;
    if (step + 2 * lane < ends) {
      const device uint* own = upper + (step + 2 * lane) / tile_tokens * tile_words;
      steps = scale_pair(own, 2 * tile_tokens + 2 * lane % tile_tokens) * 0.0625f;
      zeros = scale_pair(own, 3 * tile_tokens + 2 * lane % tile_tokens);
    }
    update(state, scores, rows, steps, zeros, simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // Values: all tokens of the step, the channel blocks of each simdgroup.
#pragma unroll
    for (int b = 0; b < B; b++) {
      float factor = state.factor[8 * b + place.row];
#pragma unroll
      for (int i = 0; i < C; i++)
        set(out[b][i], float2(out[b][i].thread_elements()[0], out[b][i].thread_elements()[1]) * factor);
    }
    for (uint i = 0; i < step_tokens / 8; i++) {
      uint token = step + 8 * i, of = token / tile_tokens;
      if (token >= ends || token + 8 <= begins) continue;
      bool coarse = of < view.coarse_values;
      Words values{upper + of * tile_words + scale_words + plane_words,
                   lower_values + (coarse ? 0 : of - view.first_values) * plane_words, coarse};
      multiply_values<E, B, C>(scores + 8 * i, values, i % 2, place, simdgroup, out);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint row = simdgroup * 32 + lane; row < rows; row += simdgroups * 32) {
    stats[2 * row] = state.largest[row];
    stats[2 * row + 1] = state.total[row];
  }
  if (begins >= ends) return;
#pragma unroll
  for (int b = 0; b < B; b++)
#pragma unroll
    for (int i = 0; i < C; i++) {
      uint row = 8 * b + place.row, block = simdgroup + i * simdgroups;
      if (row >= rows || block >= E / 8) continue;
#pragma unroll
      for (int e = 0; e < 2; e++)
        sums[row * E + 8 * block + place.column + e] = out[b][i].thread_elements()[e] + state.zeros[row];
    }
}

// Merges the parts of one query row and rotates the sum, by the Hadamard transform of each `H` of its E channels. A
// threadgroup has 128 threads. sums: (parts, rows, E), stats: (parts, rows, 2), out: (rows, E). memory: E.
template <int E, int H, typename Stats, typename T>
inline void merge_parts(const device float* sums, Stats stats, uint parts, uint rows, uint row, device T* out,
                        threadgroup float* memory, uint thread_index) {
  float largest = -INFINITY;
  for (uint part = thread_index % 32; part < parts; part += 32) largest = max(largest, stats[2 * (part * rows + row)]);
  largest = simd_max(largest);
  float total = 0, sum = 0;
  for (uint part = 0; part < parts; part++) {
    uint at = part * rows + row;
    if (stats[2 * at + 1] == 0.0f) continue;  // a part of which the row sees nothing
    float weight = exp2(stats[2 * at] - largest);
    total = fma(weight, stats[2 * at + 1], total);
    if (thread_index < E) sum = fma(weight, sums[at * E + thread_index], sum);
  }
  sum /= total;
#pragma unroll
  for (int h = 1; h < H; h *= 2) {
    if (thread_index < E) memory[thread_index] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index < E) {
      float other = memory[thread_index ^ h];
      sum = (thread_index & h) != 0 ? other - sum : sum + other;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (thread_index < E) out[row * E + thread_index] = T(sum * rsqrt(float(H)));
}
