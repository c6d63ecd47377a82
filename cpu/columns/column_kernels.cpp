// Products with matrices in columns, see column_kernels.h.
//
// A tile's outputs are in registers, and the columns of a block's kept inputs are added to them one after the other.
// Codes of quantised weights are summed as they are; their scales are applied where a block of inputs ends.
#include "columns/column_kernels.h"

#include "products/panel_product.h"
#include "products/qmatmul_lanes.h"

namespace mlxeff {
namespace MLXEFF_ISA {
namespace {

int64_t keep(const float* x, const float* weights, float threshold, int64_t K, int64_t block, const KeptInputs& kept) {
  const int64_t first = block * kept.unit, n = min_of(kept.unit, K - first);
  int32_t* const index = kept.index + first;
  float* const value = kept.value + first;
  int64_t count = 0;
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float size = (x[i] < 0 ? -x[i] : x[i]) * weights[i];
    const bool counts = !(size < threshold);
    index[count] = int32_t(first + i);
    value[count] = x[i];
    sum += counts ? x[i] : 0;
    count += counts;
  }
  kept.count[block] = int32_t(count);
  kept.sum[block] = sum;
  return count;
}

// The words of a column in a tile, as one or more vectors. Where the words fill half a vector, the vector holds them
// twice, and its halves are for different outputs.
template <int bits>
struct Codes {
  static constexpr int words = 2 * bits;
  static constexpr bool twice = words < VL;
  static constexpr int values = 32 / bits / (twice ? 2 : 1);  // vectors of outputs that a vector of words gives

  MLXEFF_INLINE vu load(const char* p) {
#if defined(__AVX512F__)
    if constexpr (twice) return (vu)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
#endif
    vu q;
    memcpy(&q, p, sizeof q);
    return q;
  }
  MLXEFF_INLINE vf value(vu q, int j) {
    vu shifts = {};
    for (int i = 0; i < VL; ++i) shifts[i] = uint32_t(twice ? bits * (2 * j + i / (VL / 2)) : bits * j);
#if defined(__AVX512F__)
    if constexpr (bits == 4) {  // the lookup reads the low four bits of the index only, so no mask is needed
      const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      return (vf)_mm512_permutexvar_ps((__m512i)(q >> shifts), table);
    }
#endif
    return __builtin_convertvector((vi)((q >> shifts) & ((1u << bits) - 1)), vf);
  }
  // The place of the outputs of `value(q, j)` in the tile, where the first of the words has the number `lane`.
  MLXEFF_INLINE int64_t place(int j, int lane) { return twice ? j * VL : j * words + lane; }
};

// The block of inputs after the one that is computed: what it needs of a tile is asked for meanwhile.
struct NextBlock {
  const int32_t* index;
  int64_t count;

  static NextBlock of(const KeptInputs& kept, int64_t b, int64_t blocks) {
    if (b + 1 >= blocks) return {nullptr, 0};
    return {kept.index + (b + 1) * kept.unit, kept.count[b + 1]};
  }
  template <int lines>
  inline __attribute__((always_inline)) void fetch(const char* columns, int64_t stride, int64_t i) const {
    if (i >= count) return;
    for (int line = 0; line < lines; ++line) __builtin_prefetch(columns + index[i] * stride + line * 64, 0, 3);
  }
};

// y += the products of the inputs of block b with a tile.
template <int bits, class T>
MLXEFF_INLINE void add_affine(const ColumnMatrix& w, const ColumnPiece& piece, int64_t tile, const KeptInputs& kept,
                              int64_t b, NextBlock next, float* y) {
  using Words = Codes<bits>;
  constexpr int V = Words::values, sets = V >= 8 ? 1 : 2;  // several sets of sums, where one would wait for itself
  const char* const columns = piece.columns + tile * piece.tile_stride;
  const int64_t count = kept.count[b];
  const int64_t scale_at = piece.scales + b * kept.unit / w.group * piece.width + tile * ColumnMatrix::tile;
  const T* const scales = static_cast<const T*>(w.scales) + scale_at;
  const T* const biases = static_cast<const T*>(w.biases) + scale_at;
  const int32_t* const index = kept.index + b * kept.unit;
  const float* const value = kept.value + b * kept.unit;
  const vf inputs = broadcast(kept.sum[b]);
  const bool fetches = tile * piece.tile_stride % 64 == 0;
  for (int lane = 0; lane < Words::words; lane += VL) {
    vf sum[sets][V];
    for (int s = 0; s < sets; ++s)
      for (int j = 0; j < V; ++j) sum[s][j] = zero();
    const auto add = [&](int64_t i, int set) {
      if (fetches && lane == 0) next.fetch<1>(columns, piece.stride, i);
      const vu q = Words::load(columns + index[i] * piece.stride + lane * 4);
      const vf x = broadcast(value[i]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[set][j] = fma(x, Words::value(q, j), sum[set][j]);
    };
    int64_t i = 0;
    for (; i + sets <= count; i += sets)
#pragma GCC unroll 2
      for (int s = 0; s < sets; ++s) add(i + s, s);
    for (; i < count; ++i) add(i, 0);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      const int64_t at = Words::place(j, lane);
      const vf codes = sets == 2 ? sum[0][j] + sum[sets - 1][j] : sum[0][j];
      store(y + at, fma(load(scales + at), codes, fma(load(biases + at), inputs, load(y + at))));
    }
  }
}

// The same for a tile of dense values.
template <class T>
MLXEFF_INLINE void add_dense(const ColumnPiece& piece, int64_t tile, const KeptInputs& kept, int64_t b, NextBlock next,
                             float* y) {
  constexpr int V = ColumnMatrix::tile / VL, sets = V >= 8 ? 1 : 2;
  const char* const columns = piece.columns + tile * piece.tile_stride;
  const int64_t count = kept.count[b];
  const int32_t* const index = kept.index + b * kept.unit;
  const float* const value = kept.value + b * kept.unit;
  vf sum[sets][V];
  for (int s = 0; s < sets; ++s)
    for (int j = 0; j < V; ++j) sum[s][j] = s ? zero() : load(y + j * VL);
  const auto add = [&](int64_t i, int set) {
    next.fetch<int(sizeof(T))>(columns, piece.stride, i);
    const T* const column = reinterpret_cast<const T*>(columns + index[i] * piece.stride);
    const vf x = broadcast(value[i]);
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) sum[set][j] = fma(x, load(column + j * VL), sum[set][j]);
  };
  int64_t i = 0;
  for (; i + sets <= count; i += sets)
#pragma GCC unroll 2
    for (int s = 0; s < sets; ++s) add(i + s, s);
  for (; i < count; ++i) add(i, 0);
  for (int j = 0; j < V; ++j) store(y + j * VL, sets == 2 ? sum[0][j] + sum[sets - 1][j] : sum[0][j]);
}

template <class T>
void piece_of(const ColumnMatrix& w, int64_t number, const KeptInputs& kept, float* y) {
  const ColumnPiece piece = ColumnPiece::of(w, number);
  const int64_t blocks = ceil_div(w.K, kept.unit);
  memset(y, 0, size_t(piece.width) * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b) {
    const NextBlock next = NextBlock::of(kept, b, blocks);
    for (int64_t tile = 0; tile < piece.width / ColumnMatrix::tile; ++tile) {
      float* const out = y + tile * ColumnMatrix::tile;
      if (!w.bits) add_dense<T>(piece, tile, kept, b, next, out);
      else if (w.bits == 8) add_affine<8, T>(w, piece, tile, kept, b, next, out);
      else add_affine<4, T>(w, piece, tile, kept, b, next, out);
    }
  }
}

void piece(const ColumnMatrix& w, int64_t number, const KeptInputs& kept, float* y) {
  if (w.dtype == MLXEFF_F16) piece_of<f16>(w, number, kept, y);
  else if (w.dtype == MLXEFF_BF16) piece_of<bf16>(w, number, kept, y);
  else piece_of<float>(w, number, kept, y);
}

// Calls store_values(k, values) with the weights of the outputs [first, first + VL) of a piece, for each input in
// [k, k_end).
template <int bits, class T, class Body>
void decode_outputs(const ColumnMatrix& w, const ColumnPiece& piece, int64_t first, int64_t k, int64_t k_end,
                    Body store_values) {
  using Words = Codes<bits>;
  const int64_t tile = first / ColumnMatrix::tile, place = first % ColumnMatrix::tile;
  const int lane = Words::twice ? 0 : int(place % Words::words);
  const int j = int(Words::twice ? place / VL : place / Words::words);
  const char* const columns = piece.columns + tile * piece.tile_stride + lane * 4;
  while (k < k_end) {
    const int64_t group = k / w.group, end = min_of(k_end, (group + 1) * w.group);
    const int64_t at = piece.scales + group * piece.width + first;
    const vf scale = load(static_cast<const T*>(w.scales) + at), bias = load(static_cast<const T*>(w.biases) + at);
    for (; k < end; ++k) store_values(k, fma(Words::value(Words::load(columns + k * piece.stride), j), scale, bias));
  }
}

template <class T>
int all_inputs_of(const ColumnMatrix& w, const float* x, int64_t ldx, int64_t rows, int64_t n_begin, int64_t n_end,
                  float* y, int64_t ldy) {
  const ProductOutput out = {y, ldy, MLXEFF_F32, false};
  return panel_product(x, ldx, rows, w.K, n_begin, n_end, out, [&](int64_t n, int64_t k, int64_t k_end, float* panel) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = n + half * VL, first = at % w.piece();
      const ColumnPiece piece = ColumnPiece::of(w, at / w.piece());
      const auto put = [&](int64_t i, vf values) { store(panel + (i - k) * panel_width + half * VL, values); };
      if (w.bits == 8) {
        decode_outputs<8, T>(w, piece, first, k, k_end, put);
      } else if (w.bits == 4) {
        decode_outputs<4, T>(w, piece, first, k, k_end, put);
      } else {
        const char* const columns = piece.columns + first * int64_t(sizeof(T));
        for (int64_t i = k; i < k_end; ++i) put(i, load(reinterpret_cast<const T*>(columns + i * piece.stride)));
      }
    }
  });
}

int all_inputs(const ColumnMatrix& w, const float* x, int64_t ldx, int64_t rows, int64_t n_begin, int64_t n_end,
               float* y, int64_t ldy) {
  if (w.dtype == MLXEFF_F16) return all_inputs_of<f16>(w, x, ldx, rows, n_begin, n_end, y, ldy);
  if (w.dtype == MLXEFF_BF16) return all_inputs_of<bf16>(w, x, ldx, rows, n_begin, n_end, y, ldy);
  return all_inputs_of<float>(w, x, ldx, rows, n_begin, n_end, y, ldy);
}

}  // namespace

const ColumnKernels& column_kernels() {
  static const ColumnKernels table = {keep, piece, all_inputs};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
