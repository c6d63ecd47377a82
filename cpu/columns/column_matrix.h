// ColumnMatrix: a weight matrix that is stored by its columns, so that the weights of one input are next to each other.
// A product that leaves out some of the inputs then reads nothing of their columns.
#pragma once
#include "base/common.h"

namespace mlxeff {

// W (N, K) in strips of outputs, one after the other. A strip has some of the outputs of every input: those of input 0,
// then those of input 1, ... It is made of tiles of 64 outputs. N is a multiple of 64, and K of 32.
//
//   bits 4, 8  affine-quantised: w = q * scale + bias, with one scale and one bias for each output and `group` inputs.
//   A
//              strip has 4 or 2 tiles, 128 bytes of each input; the last one may have fewer. A tile has W = 2 * bits
//              words of 32 bits; word i holds the outputs i, W + i, 2 W + i, ... of the tile, lowest bits first. Scales
//              and biases, of type `dtype`, lie in the same strips: those of its outputs for the first group of inputs,
//              then for the second, ...
//   bits 0     dense values of type `dtype`, in the order of the outputs, all in one strip
struct ColumnMatrix {
  static constexpr int64_t tile = 64, widest_piece = 8 * tile;

  int64_t K, N;
  const void* weight;
  int bits, dtype;
  int64_t group;  // inputs with a common scale; K for a dense matrix
  const void *scales, *biases;

  // What a thread should compute at a time, in outputs: a strip, or as much of a dense matrix as leaves six pieces, up
  // to 8 tiles, which are read in runs of up to 1 KiB.
  int64_t piece() const {
    if (bits) return bits == 4 ? 4 * tile : 2 * tile;
    return max_of(2, min_of(8, N / tile / 6)) * tile;
  }
  int64_t pieces() const { return ceil_div(N, piece()); }
  int64_t width_of(int64_t number) const { return min_of(piece(), N - number * piece()); }
  int64_t value_bits() const { return bits ? bits : 8 * int64_t(dtype_size(dtype)); }
  // The bytes that one input takes, and those of the scales and biases of all inputs, in `width` outputs.
  int64_t input_bytes(int64_t width) const { return width * value_bits() / 8; }
  int64_t scale_bytes(int64_t width) const { return bits ? K / group * width * 2 * int64_t(dtype_size(dtype)) : 0; }
  int64_t bytes() const { return K * input_bytes(N) + scale_bytes(N); }
};

// Where a piece lies.
struct ColumnPiece {
  int64_t width;                // in outputs
  const char* columns;          // of the first input
  int64_t stride, tile_stride;  // bytes between two inputs, and between two tiles of an input
  int64_t scales;               // place of the scales of the first group; those of the next are `width` values further

  static ColumnPiece of(const ColumnMatrix& w, int64_t number) {
    const int64_t before = number * w.piece(), width = w.width_of(number);
    const char* const weight = static_cast<const char*>(w.weight);
    const int64_t tile_stride = w.input_bytes(ColumnMatrix::tile);
    if (!w.bits) return {width, weight + w.input_bytes(before), w.input_bytes(w.N), tile_stride, 0};
    return {width, weight + w.K * w.input_bytes(before), w.input_bytes(width), tile_stride, w.K / w.group * before};
  }
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
