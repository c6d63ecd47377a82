// The decoding step of a feed-forward network that leaves out inputs, down (silu(gate x) up x), of which a token uses
// the inputs x of gate and up, and the neurons of down, that count: not those with |input| weight < threshold. The
// matrices are stored by their columns (mlxeff/dynamoe/columns.py), and a column whose input does not count is not
// read.
//
// A threadgroup computes one piece of the outputs for one token: a strip of an affine matrix, 128 columns of a dense
// one. Its simdgroups take the inputs in turns, and its lanes own some of the piece's outputs each, so that a simdgroup
// reads neighbouring bytes of a column: 128 of an affine one. Each lane looks at one of 32 inputs; the lanes collect
// the bits of those that count, and whether a column is read is the same decision in all of them. The sums of the
// simdgroups, in float32, are added in threadgroup memory. Gate and up take turns of 32 outputs, so both numbers of a
// neuron are in the same piece.
//
// A token has the same bits alone and among others, since a threadgroup knows of one token only and adds in a fixed
// order. A product is added to another number only by fma, so that all compilers round alike.
//
// Cost, of a token: the columns of what counts, the scales and biases of all groups of inputs of which one counts, and
// from the cache, for each piece, x and the weights of its inputs. Tokens share columns through the cache alone: those
// of one piece are neighbours in the grid. A code of 4 or 8 bits takes some 4 instructions. Never measured.

using namespace metal;

constant constexpr const uint simdgroups = 16;  // of a threadgroup
constant constexpr const uint block = 32;       // inputs at which the lanes of a simdgroup look together
constant constexpr const uint depth = 4;        // columns of which a lane has the loads in flight
constant constexpr const uint tile = 64;        // outputs of an affine matrix whose codes share words
constant constexpr const uint turn = 32;        // neighbouring outputs of gate, and then of up

// One lane's view of a piece of a matrix of affine weights, scale code + bias, with one scale and one bias for each
// output and `group` inputs. The lane owns the outputs whose codes are in one word of each column.
template <int bits, int group, typename Words, typename Scales>
struct Affine {
  static constant constexpr const uint piece = 1024 / bits;  // outputs of a whole strip
  static constant constexpr const uint unit = group;         // inputs that a simdgroup takes together
  static constant constexpr const uint own = 32 / bits;      // outputs of a lane
  static constant constexpr const uint tile_words = 2 * bits;
  using Loaded = uint;

  Words words;              // of the first input in the strip
  Scales scales, biases;    // of the first group in the strip
  uint width, pitch, lane;  // outputs of the piece; words of one of its columns; the lane

  // The piece `number` of a matrix.
  static Affine at(Words words, Scales scales, Scales biases, uint inputs, uint outputs, uint number, uint lane) {
    uint before = number * piece, width = min(outputs - before, uint(piece));
    ulong first = ulong(inputs / group) * before;
    return Affine{
        words + ulong(inputs) * (before * bits / 32), scales + first, biases + first, width, width * bits / 32, lane};
  }

  // Of the last strip, which may be narrow, some lanes own nothing.
  bool idle() const { return lane >= pitch; }
  // The place in the piece of the lane's output j.
  uint place(uint j) const { return lane / tile_words * tile + j * tile_words + lane % tile_words; }

  uint load(uint input) const { return idle() ? 0 : words[input * pitch + lane]; }

  // parts += x times the codes of a column.
  static void add(uint loaded, float x, thread float (&parts)[own]) {
#pragma unroll
    for (uint j = 0; j < own; j++) {
      // Codes are taken from half words. Where it lies, at bit `shift`, a code is the mantissa of a float from
      // 2^(23 - shift) on, which is 2^(23 - shift) + code: it needs no shift and no conversion of its own.
      uint shift = j * bits % 16, word = loaded >> j * bits / 16 * 16;
      uint code = (word & ((1u << bits) - 1) << shift) | (150 - shift) << 23;
      parts[j] = fma(x, as_type<float>(code) - as_type<float>((150 - shift) << 23), parts[j]);
    }
  }

  // sums += the products with the group of inputs `number`, of which `parts` has the sums of x code, and `total` the
  // sum of x.
  void finish(uint number, float total, thread const float (&parts)[own], thread float (&sums)[own]) const {
    if (idle()) return;
#pragma unroll
    for (uint j = 0; j < own; j++) {
      uint from = number * width + place(j);
      sums[j] = fma(float(scales[from]), parts[j], fma(float(biases[from]), total, sums[j]));
    }
  }
};

// The same of a matrix (inputs, outputs) in float16, bfloat16 or float32. A lane owns every 32nd output.
template <typename Weights>
struct Dense {
  static constant constexpr const uint piece = 128;
  static constant constexpr const uint unit = block;
  static constant constexpr const uint own = piece / 32;
  struct Loaded {
    float values[own];
  };

  Weights weights;          // of the first input, from the first output of the piece on
  uint width, pitch, lane;  // outputs of the piece; values from one column to the next; the lane

  static Dense at(Weights weights, uint outputs, uint number, uint lane) {
    uint before = number * piece;
    return Dense{weights + before, min(outputs - before, uint(piece)), outputs, lane};
  }

  uint place(uint j) const { return j * 32 + lane; }

  Loaded load(uint input) const {
    Loaded loaded;
    ulong first = ulong(input) * pitch;
#pragma unroll
    for (uint j = 0; j < own; j++) loaded.values[j] = j * 32 < width ? float(weights[first + place(j)]) : 0.0f;
    return loaded;
  }

  static void add(Loaded loaded, float x, thread float (&parts)[own]) {
#pragma unroll
    for (uint j = 0; j < own; j++) parts[j] = fma(x, loaded.values[j], parts[j]);
  }

  void finish(uint number, float total, thread const float (&parts)[own], thread float (&sums)[own]) const {
#pragma unroll
    for (uint j = 0; j < own; j++) sums[j] += parts[j];
  }
};

// The bias of a layer that has none.
struct Zeros {
  float operator[](uint output) const { return 0; }
};

// Adds the products with the N lowest inputs of `mask` to a lane's parts, and takes their bits out of the mask. Bit i
// is for the input first + i, whose value the lane i has.
template <uint N, typename Columns>
inline void add_columns(Columns columns, uint first, float value, thread uint& mask,
                        thread float (&parts)[Columns::own]) {
  float x[N];
  typename Columns::Loaded loaded[N];
#pragma unroll
  for (uint i = 0; i < N; i++) {
    uint next = ctz(mask);
    mask &= mask - 1;
    x[i] = simd_broadcast(value, ushort(next));
    loaded[i] = columns.load(first + next);
  }
#pragma unroll
  for (uint i = 0; i < N; i++) Columns::add(loaded[i], x[i], parts);
}

// Adds a simdgroup's share of the products of a piece with x (inputs) to a lane's sums. Returns how many inputs of that
// share count. weights: (inputs). What is not a number counts.
template <typename Columns, typename Vector, typename Weights>
inline uint add_products(Columns columns, Vector x, Weights weights, float threshold, uint inputs, uint simdgroup,
                         uint lane, thread float (&sums)[Columns::own]) {
  uint kept = 0;
  for (uint first = simdgroup * Columns::unit; first < inputs; first += simdgroups * Columns::unit) {
    float parts[Columns::own] = {0}, total = 0;
    uint before = kept;
    for (uint at = first; at < first + Columns::unit; at += block) {
      float value = float(x[at + lane]);
      bool counts = !(fabs(value) * float(weights[at + lane]) < threshold);
      uint mask = simd_or(counts ? 1u << lane : 0u), left = popcount(mask);
      total += simd_sum(counts ? value : 0.0f);
      kept += left;
      for (; left >= depth; left -= depth) add_columns<depth>(columns, at, value, mask, parts);
      for (; left > 0; left--) add_columns<1>(columns, at, value, mask, parts);
    }
    if (kept > before) columns.finish(first / Columns::unit, total, parts, sums);
  }
  return kept;
}

// Writes the sums of all simdgroups into the memory of a threadgroup, (simdgroups, Columns::piece), and the numbers of
// their inputs that count into `counts`. `add_sums` and `all_counts` read them.
template <typename Columns, typename Vector, typename Weights>
inline void share_products(Columns columns, Vector x, Weights weights, float threshold, uint inputs,
                           threadgroup float* memory, threadgroup uint* counts, uint simdgroup, uint lane) {
  float sums[Columns::own] = {0};
  uint kept = add_products(columns, x, weights, threshold, inputs, simdgroup, lane, sums);
#pragma unroll
  for (uint j = 0; j < Columns::own; j++) memory[simdgroup * Columns::piece + columns.place(j)] = sums[j];
  if (lane == 0) counts[simdgroup] = kept;
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// An output of the piece.
template <typename Columns>
inline float add_sums(const threadgroup float* memory, uint output) {
  float sum = 0;
#pragma unroll
  for (uint i = 0; i < simdgroups; i++) sum += memory[i * Columns::piece + output];
  return sum;
}

// How many inputs count.
inline uint all_counts(const threadgroup uint* counts) {
  uint count = 0;
  for (uint i = 0; i < simdgroups; i++) count += counts[i];
  return count;
}

// hidden (tokens, neurons) = silu(gate x) up x, of which the threadgroup computes the neurons of the piece `number` for
// one token; kept (tokens) is how many inputs of each token count. x: (tokens, inputs).
template <typename Columns, typename Vectors, typename Weights>
inline void gate_up(Columns columns, Vectors x, Weights weights, float threshold, uint inputs, uint neurons,
                    threadgroup float* memory, threadgroup uint* counts, device float* hidden, device uint* kept,
                    uint token, uint number, uint simdgroup, uint lane) {
  share_products(columns, x + token * inputs, weights, threshold, inputs, memory, counts, simdgroup, lane);
  uint thread_number = simdgroup * 32 + lane;
  if (number == 0 && thread_number == 0) kept[token] = all_counts(counts);
  if (thread_number >= columns.width / 2) return;
  uint output = thread_number / turn * 2 * turn + thread_number % turn;
  float gate = add_sums<Columns>(memory, output), up = add_sums<Columns>(memory, output + turn);
  hidden[token * neurons + number * (Columns::piece / 2) + thread_number] = gate / (1.0f + exp(-gate)) * up;
}

// out (tokens, outputs) = down hidden + bias, of which the threadgroup computes the piece `number` for one token; kept
// (tokens) is how many neurons of each token count. hidden: (tokens, neurons).
template <typename Columns, typename Vectors, typename Weights, typename Bias, typename T>
inline void down(Columns columns, Vectors hidden, Weights weights, float threshold, uint neurons, uint outputs,
                 Bias bias, threadgroup float* memory, threadgroup uint* counts, device T* out, device uint* kept,
                 uint token, uint number, uint simdgroup, uint lane) {
  share_products(columns, hidden + token * neurons, weights, threshold, neurons, memory, counts, simdgroup, lane);
  uint thread_number = simdgroup * 32 + lane;
  if (number == 0 && thread_number == 0) kept[token] = all_counts(counts);
  if (thread_number >= columns.width) return;
  uint output = number * Columns::piece + thread_number;
  out[token * outputs + output] = T(add_sums<Columns>(memory, thread_number) + float(bias[output]));
}
