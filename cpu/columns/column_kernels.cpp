// Products with matrices in columns, see column_kernels.h.
//
// A tile's outputs are in registers, and the columns of the kept inputs are added to them one after the other. Codes of
// quantised weights are summed as they are; their scales are applied where a block of inputs ends. While the columns of
// one block are read, those of the next are asked for.
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

// The words of a column in a tile of `words` words, as one or more vectors. Where the words of a half tile fill half a
// vector, the vector holds them twice, and its halves are for different outputs.
template <int bits, int words>
struct Codes {
  static constexpr bool twice = words < VL;
  static constexpr int values = 32 / bits / (twice ? 2 : 1);  // vectors of outputs that a vector of words gives

  MLXEFF_INLINE vu load(const char* p) {
    vu q;
    if constexpr (twice) {
      memcpy(&q, p, sizeof q / 2);
      memcpy(reinterpret_cast<char*>(&q) + sizeof q / 2, p, sizeof q / 2);
      vu shifts = {};
      for (int i = VL / 2; i < VL; ++i) shifts[i] = bits;
      return q >> shifts;
    }
    memcpy(&q, p, sizeof q);
    return q;
  }
  MLXEFF_INLINE vf value(vu q, int j) {
    const int code = twice ? 2 * j : j;
#if defined(__AVX512F__)
    if constexpr (bits == 4) {  // the lookup reads the low four bits of the index only, so no mask is needed
      const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      return (vf)_mm512_permutexvar_ps((__m512i)(q >> (bits * code)), table);
    }
#endif
    return word_value<bits>(q, code);
  }
  // The place of the outputs of `value(q, j)` in the tile, where the first of the words has the number `lane`.
  MLXEFF_INLINE int64_t place(int j, int lane) { return twice ? j * VL : j * words + lane; }
};

// Asks for the column of place i in the list of a block, of `lines` lines from `column` on.
MLXEFF_INLINE void prefetch(const char* columns, int64_t stride, const KeptInputs& kept, int64_t block, int64_t i,
                            int lines) {
  if (i >= kept.count[block]) return;
  const char* const at = columns + kept.index[block * kept.unit + i] * stride;
  for (int line = 0; line < lines; ++line) __builtin_prefetch(at + line * 64, 0, 3);
}

template <int bits, int words, class T>
void affine_tile(const ColumnMatrix& w, int64_t tile, const KeptInputs& kept, float* y) {
  using Words = Codes<bits, words>;
  constexpr int V = Words::values, sets = V >= 8 ? 1 : 2;  // several sets of sums, where one would wait for itself
  const int64_t stride = w.N * bits / 8, blocks = ceil_div(w.K, kept.unit), outputs = words * 32 / bits;
  const char* const columns = static_cast<const char*>(w.weight) + tile * 64;
  memset(y, 0, size_t(outputs) * sizeof(float));
  for (int lane = 0; lane < words; lane += VL) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t* const index = kept.index + b * kept.unit;
      const float* const value = kept.value + b * kept.unit;
      const int64_t count = kept.count[b];
      vf sum[sets][V];
      for (int s = 0; s < sets; ++s)
        for (int j = 0; j < V; ++j) sum[s][j] = zero();
      const auto add = [&](int64_t i, int set) {
        if (b + 1 < blocks) prefetch(columns, stride, kept, b + 1, i, 1);
        const vu q = Words::load(columns + index[i] * stride + lane * 4);
        const vf x = broadcast(value[i]);
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) sum[set][j] = fma(x, Words::value(q, j), sum[set][j]);
      };
      int64_t i = 0;
      for (; i + sets <= count; i += sets)
#pragma GCC unroll 2
        for (int s = 0; s < sets; ++s) add(i + s, s);
      for (; i < count; ++i) add(i, 0);
      const int64_t scale_at = b * kept.unit / w.group * w.N + tile * w.tile_width();
      const T* const scales = static_cast<const T*>(w.scales) + scale_at;
      const T* const biases = static_cast<const T*>(w.biases) + scale_at;
      const vf inputs = broadcast(kept.sum[b]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) {
        const int64_t at = Words::place(j, lane);
        const vf codes = sets == 2 ? sum[0][j] + sum[sets - 1][j] : sum[0][j];
        store(y + at, fma(load(scales + at), codes, fma(load(biases + at), inputs, load(y + at))));
      }
    }
  }
}

template <class T>
void dense_tile(const ColumnMatrix& w, int64_t tile, const KeptInputs& kept, float* y) {
  constexpr int V = 64 / VL, sets = V >= 8 ? 1 : 2, lines = int(sizeof(T));
  const int64_t stride = w.N * int64_t(sizeof(T)), blocks = ceil_div(w.K, kept.unit);
  const char* const columns = static_cast<const char*>(w.weight) + tile * 64 * int64_t(sizeof(T));
  vf sum[sets][V];
  for (int s = 0; s < sets; ++s)
    for (int j = 0; j < V; ++j) sum[s][j] = zero();
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * kept.unit, count = kept.count[b];
    const auto add = [&](int64_t i, int set) {
      if (b + 1 < blocks) prefetch(columns, stride, kept, b + 1, i, lines);
      const T* const column = reinterpret_cast<const T*>(columns + kept.index[first + i] * stride);
      const vf x = broadcast(kept.value[first + i]);
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) sum[set][j] = fma(x, load(column + j * VL), sum[set][j]);
    };
    int64_t i = 0;
    for (; i + sets <= count; i += sets)
#pragma GCC unroll 2
      for (int s = 0; s < sets; ++s) add(i + s, s);
    for (; i < count; ++i) add(i, 0);
  }
  for (int j = 0; j < V; ++j) store(y + j * VL, sets == 2 ? sum[0][j] + sum[sets - 1][j] : sum[0][j]);
}

template <class T>
void tile_scaled(const ColumnMatrix& w, int64_t tile, const KeptInputs& kept, float* y) {
  if (w.bits == 8) affine_tile<8, 16, T>(w, tile, kept, y);
  else if (w.width_of(tile) == 128) affine_tile<4, 16, T>(w, tile, kept, y);
  else affine_tile<4, 8, T>(w, tile, kept, y);
}

template <class T>
void tile_of(const ColumnMatrix& w, int64_t number, const KeptInputs& kept, float* y) {
  if (!w.bits) dense_tile<T>(w, number, kept, y);
  else if (w.bits == 8) affine_tile<8, 16, T>(w, number, kept, y);
  else if (w.width_of(number) == 128) affine_tile<4, 16, T>(w, number, kept, y);
  else affine_tile<4, 8, T>(w, number, kept, y);
}

void tile(const ColumnMatrix& w, int64_t number, const KeptInputs& kept, float* y) {
  if (w.dtype == MLXEFF_F16) tile_of<f16>(w, number, kept, y);
  else if (w.dtype == MLXEFF_BF16) tile_of<bf16>(w, number, kept, y);
  else tile_of<float>(w, number, kept, y);
}

// Calls store_values(k, values) with the weights of the outputs [first, first + VL) of a tile, for each input in
// [k, k_end). `words` are those of the tile.
template <int bits, int words, class T, class Body>
void decode_outputs(const ColumnMatrix& w, int64_t tile, int64_t first, int64_t k, int64_t k_end, Body store_values) {
  using Words = Codes<bits, words>;
  const int64_t stride = w.N * bits / 8;
  const int lane = Words::twice ? 0 : int(first % words), j = int(Words::twice ? first / VL : first / words);
  const char* const columns = static_cast<const char*>(w.weight) + tile * 64 + lane * 4;
  while (k < k_end) {
    const int64_t group = k / w.group, end = min_of(k_end, (group + 1) * w.group);
    const int64_t at = group * w.N + tile * w.tile_width() + first;
    const vf scale = load(static_cast<const T*>(w.scales) + at), bias = load(static_cast<const T*>(w.biases) + at);
    for (; k < end; ++k) {
      const vu q = Words::load(columns + k * stride);
      store_values(k, fma(Words::value(q, j), scale, bias));
    }
  }
}

template <class T>
int all_inputs_of(const ColumnMatrix& w, const float* x, int64_t ldx, int64_t rows, int64_t n_begin, int64_t n_end,
                  float* y, int64_t ldy) {
  const ProductOutput out = {y, ldy, MLXEFF_F32, false};
  return panel_product(x, ldx, rows, w.K, n_begin, n_end, out, [&](int64_t n, int64_t k, int64_t k_end, float* panel) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = n + half * VL, tile = at / w.tile_width(), first = at % w.tile_width();
      const auto put = [&](int64_t i, vf values) { store(panel + (i - k) * panel_width + half * VL, values); };
      if (!w.bits) {
        for (int64_t i = k; i < k_end; ++i) put(i, load(static_cast<const T*>(w.weight) + i * w.N + at));
      } else if (w.bits == 8) {
        decode_outputs<8, 16, T>(w, tile, first, k, k_end, put);
      } else if (w.width_of(tile) == 128) {
        decode_outputs<4, 16, T>(w, tile, first, k, k_end, put);
      } else {
        decode_outputs<4, 8, T>(w, tile, first, k, k_end, put);
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
  static const ColumnKernels table = {keep, tile, all_inputs};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
