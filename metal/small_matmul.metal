// y = x W^T for up to 8 rows of x, of which all are computed in one pass over W. For GPUs on which MLX's own kernels
// read the weights once for each row, or compute 16 or 64 rows for them; mlxeff/small_matmul.py says which.
//
// A simdgroup multiplies 8 x 8 matrices, of which a lane holds two neighbours of a row. The sum over the K columns may
// run in any order, so a step takes 64 columns, 8 of each of 8 chunks: the matrix number i has column i of every chunk.
// Then a lane holds one chunk of two rows of W, consecutive in memory, and two neighbouring chunks of a row of x. It
// reads and dequantises each weight once and needs no other lane for it.
//
// A threadgroup of 128 threads computes 16 rows of W; its four simdgroups take the steps in turn and add their sums at
// last, always in the same order. A row's result is therefore the same to the bit alone and among others. (It is
// assumed that a GPU's matrix instructions compute all rows of a matrix alike.)
//
// Cost. Bytes: those of W, once, and x once for each 16 rows of W, from the cache. For each weight there are 16 FLOPs,
// whatever the number of rows of x, and 4 to 6 instructions that unpack it. Predicted, never measured: float16 weights
// take the time of reading them on every chip, at 8 FLOPs a byte; 8 bits too; 4 bits, at some 45 operations a byte, are
// limited by arithmetic to 0.6 to 0.8 of the memory bandwidth of an M1 (2.6 TFLOPS, 68 GB/s) or M2 Pro (6.8, 200).

using namespace metal;

constant constexpr const uint simdgroups = 4;
constant constexpr const uint chunk = 8;                 // columns that a lane takes together
constant constexpr const uint step_columns = 8 * chunk;  // of a step
constant constexpr const uint own_rows = 16;             // rows of W that a threadgroup computes

using Matrix = simdgroup_matrix<float, 8, 8>;

// A matrix (rows, columns) in float16, bfloat16 or float32.
template <typename Weights>
struct Dense {
  Weights weights;

  // Columns `column` to `column` + 7 of a row; zeros beyond the last column.
  void load(uint row, uint column, uint columns, thread float* values) const {
    ulong at = ulong(row) * columns + column;
#pragma unroll
    for (uint i = 0; i < chunk; i++) values[i] = column + i < columns ? float(weights[at + i]) : 0.0f;
  }
};

// A matrix in MLX's affine quantisation: `bits`, 4 or 8, for a code, the first one in a word's lowest bits; a weight is
// scale code + bias, with a scale and a bias for each `group` columns.
template <int bits, int group, typename Words, typename Scales>
struct Affine {
  Words words;
  Scales scales;
  Scales biases;

  void load(uint row, uint column, uint columns, thread float* values) const {
    if (column >= columns) {
#pragma unroll
      for (uint i = 0; i < chunk; i++) values[i] = 0.0f;
      return;
    }
    ulong at = ulong(row) * (columns / group) + column / group;
    float scale = float(scales[at]), bias = float(biases[at]);
    ulong first = (ulong(row) * columns + column) / (32 / bits);
#pragma unroll
    for (uint i = 0; i < chunk; i++) {
      uint code = words[first + i * bits / 32] >> i * bits % 32 & ((1u << bits) - 1);
      // As the mantissa of a float from 2^23 on, a code needs no conversion.
      values[i] = fma(as_type<float>(code | 0x4B000000u) - 8388608.0f, scale, bias);
    }
  }
};

// out (tokens, rows) = x (tokens, columns) W^T. memory: simdgroups 128.
template <typename Weights, typename Vectors, typename T>
inline void small_matmul(Weights weights, Vectors x, uint tokens, uint columns, uint rows, device T* out,
                         threadgroup float* memory, uint group, uint simdgroup, uint lane) {
  uint token = (lane / 4 & 4) + lane / 2 % 4, column = (lane / 4 & 2) * 2 + lane % 2 * 2;
  Matrix sums[2] = {make_filled_simdgroup_matrix<float, 8, 8>(0.0f), make_filled_simdgroup_matrix<float, 8, 8>(0.0f)};
  for (uint start = simdgroup * step_columns; start < columns; start += simdgroups * step_columns) {
    float loaded[2][2][chunk], vector[2 * chunk];  // of a lane: two rows in each half of the 16; two chunks of x
#pragma unroll
    for (uint side = 0; side < 2; side++)
#pragma unroll
      for (uint e = 0; e < 2; e++)
        weights.load(min(group * own_rows + 8 * side + column + e, rows - 1), start + token * chunk, columns,
                     loaded[side][e]);
    uint first = start + column * chunk;
#pragma unroll
    for (uint i = 0; i < 2 * chunk; i++)
      vector[i] = token < tokens && first + i < columns ? float(x[token * columns + first + i]) : 0.0f;
#pragma unroll
    for (uint i = 0; i < chunk; i++) {
      Matrix left, right;
      left.thread_elements()[0] = vector[i];
      left.thread_elements()[1] = vector[chunk + i];
#pragma unroll
      for (uint side = 0; side < 2; side++) {
        right.thread_elements()[0] = loaded[side][0][i];
        right.thread_elements()[1] = loaded[side][1][i];
        simdgroup_multiply_accumulate(sums[side], left, right, sums[side]);
      }
    }
  }
#pragma unroll
  for (uint side = 0; side < 2; side++)
    simdgroup_store(sums[side], memory + simdgroup * 8 * own_rows + 8 * side, own_rows);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint thread_index = simdgroup * 32 + lane, at = thread_index / own_rows,
       row = group * own_rows + thread_index % own_rows;
  float sum = 0;
  for (uint i = 0; i < simdgroups; i++) sum += memory[i * 8 * own_rows + thread_index];
  if (at < tokens && row < rows) out[at * rows + row] = T(sum);
}
