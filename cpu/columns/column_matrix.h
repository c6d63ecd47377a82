// ColumnMatrix: a weight matrix that is stored by its columns, so that all weights of one input are next to each other.
// A product that leaves out some of the inputs then reads nothing of their columns.
#pragma once
#include "base/common.h"

namespace mlxeff {

// W (N, K) in columns: the weights that belong to input k are N values from k * N on. They lie in tiles of `tile_width`
// outputs, of which the last may be half as wide. N is a multiple of 64, and K of 32.
//
//   bits 4, 8  affine-quantised: w = q * scale + bias, with one scale and one bias for each output and `group` inputs;
//              scales and biases are (K / group, N) of type `dtype`. A tile is 16 words of 32 bits, a half one of 8; with
//              W words in a tile, word i holds the outputs i, W + i, 2 W + i, ... of the tile, lowest bits first
//   bits 0     dense values of type `dtype`, in the order of the outputs
struct ColumnMatrix {
  int64_t K, N;
  const void* weight;
  int bits, dtype;
  int64_t group;  // inputs with a common scale; K for a dense matrix
  const void *scales, *biases;

  int64_t tile_width() const { return bits == 4 ? 128 : 64; }
  int64_t tiles() const { return ceil_div(N, tile_width()); }
  int64_t width_of(int64_t tile) const { return min_of(tile_width(), N - tile * tile_width()); }
  int64_t value_bits() const { return bits ? bits : 8 * int64_t(dtype_size(dtype)); }
  // The bytes that one input takes, and those of the scales and biases of all inputs, in `width` outputs.
  int64_t input_bytes(int64_t width) const { return width * value_bits() / 8; }
  int64_t scale_bytes(int64_t width) const { return bits ? K / group * width * 2 * int64_t(dtype_size(dtype)) : 0; }
  int64_t bytes() const { return K * input_bytes(N) + scale_bytes(N); }
};

// The inputs of one row that a product does not leave out. They are listed in blocks of `unit` consecutive inputs: of
// block b, index[b * unit + i] and value[b * unit + i] for i < count[b], in rising order; sum[b] adds up their values.
// In a quantised matrix the inputs of a block have common scales.
struct KeptInputs {
  int64_t unit;
  int32_t *count, *index;
  float *sum, *value;

  // The floats that the lists of K inputs take.
  static int64_t floats(int64_t K, int64_t unit) { return 2 * round_up(ceil_div(K, unit), 16) + 2 * round_up(K, 16); }
  static KeptInputs at(float* memory, int64_t K, int64_t unit) {
    const int64_t blocks = round_up(ceil_div(K, unit), 16), inputs = round_up(K, 16);
    return {unit, reinterpret_cast<int32_t*>(memory), reinterpret_cast<int32_t*>(memory + 2 * blocks), memory + blocks,
            memory + 2 * blocks + inputs};
  }
};

}  // namespace mlxeff
