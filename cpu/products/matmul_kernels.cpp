// Dense matmul at one instruction-set level: c (M, N) = A (M, K) B (K, N) with fp32, fp16 or bf16 operands.
//
//   few rows  (M <= direct_rows, B transposed: the linear layer of a decoding step) B is read once, converted in
//             registers and used for all rows; limited by the memory (matmul_row.h).
//   EXACT     B is copied into fp32 panels of 2 * VL columns by 256 of K, which meet all rows of A in register tiles;
//             products and sums in fp32.
//   BF16      (AMX) both operands rounded to bf16, products exact, sums in fp32.
#include "products/matmul_row.h"
#include "products/qmatmul_decode.h"

namespace mlxeff {
namespace MLXEFF_ISA {
namespace {

bool few_rows(const MatmulArgs& args) { return args.M <= direct_rows && args.b.transposed; }
bool uses_amx(const MatmulArgs& args) { return amx_mode(args.mode) && !few_rows(args); }
int64_t a_rows(const MatmulArgs& args) { return rows_read(args.M, uses_amx(args)); }
int64_t a_stride(const MatmulArgs& args) { return padded_stride(args.K, uses_amx(args) ? 2 : 4); }

size_t workspace_bytes(const MatmulArgs& args) {
  return size_t(a_rows(args) * a_stride(args) * (uses_amx(args) ? 2 : 4));
}

void bind(MatmulArgs& args, void* workspace) {
  args.a_f32 = static_cast<float*>(workspace);
  args.a_bf16 = static_cast<bf16*>(workspace);
}

// Sixteen bytes of each of VL rows, transposed: out[i] lane r = row r, column i, as fp32. Rows and columns that do not
// exist are zero.
template <class T>
constexpr int columns_of = 16 / int(sizeof(T));

MLXEFF_INLINE void widen(const vu words[4], vf out[4], const float*) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) out[i] = (vf)words[i];
}
MLXEFF_INLINE void widen(const vu words[4], vf out[8], const bf16*) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = (vf)(words[i] << 16);
    out[2 * i + 1] = (vf)(words[i] & 0xffff0000u);
  }
}
MLXEFF_INLINE vf low_half(vu words) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)words));
#else
  f16 halves[VL];
#pragma GCC unroll 8
  for (int r = 0; r < VL; ++r) halves[r].bits = uint16_t(words[r]);
  return load(halves);
#endif
}
MLXEFF_INLINE void widen(const vu words[4], vf out[8], const f16*) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = low_half(words[i]);
    out[2 * i + 1] = low_half(words[i] >> 16);
  }
}
template <class T>
MLXEFF_INLINE void load_words(const T* p, int64_t ld, int64_t rows, int64_t columns, vu words[4]) {
  if (rows >= VL && columns >= columns_of<T>)
    return load_words4(reinterpret_cast<const char*>(p), ld * int64_t(sizeof(T)), words);
  T block[VL][columns_of<T>];
  memset(block, 0, sizeof block);
  for (int64_t r = 0; r < min_of(rows, VL); ++r)
    memcpy(block[r], p + r * ld, size_t(min_of(columns, columns_of<T>)) * sizeof(T));
  load_words4(reinterpret_cast<const char*>(block), 16, words);
}
template <class T>
MLXEFF_INLINE void load_columns(const T* p, int64_t ld, int64_t rows, int64_t columns, vf* out) {
  vu words[4];
  load_words(p, ld, rows, columns, words);
  widen(words, out, p);
}
// --- A ---------------------------------------------------------------------------------------------------------

template <class To, class T>
void copy_rows(const MatmulArgs& args, int64_t m_begin, int64_t m_end, To* out) {
  const int64_t ld = a_stride(args), padded_k = min_of(ld, round_up(args.K, 32));
  const T* const a = static_cast<const T*>(args.a.data);
  for (int64_t m = m_begin; m < m_end; ++m) memset(out + m * ld + args.K, 0, size_t(padded_k - args.K) * sizeof(To));
  if (!args.a.transposed) {
    for (int64_t m = m_begin; m < m_end; ++m) convert(out + m * ld, a + m * args.a.ld, args.K);
    return;
  }
  for (int64_t k = 0; k < args.K; k += VL)
    for (int64_t m = m_begin; m < m_end; m += columns_of<T>) {
      const int64_t columns = min_of(columns_of<T>, m_end - m), count = min_of(VL, args.K - k);
      vf rows[columns_of<T>];
      load_columns(a + k * args.a.ld + m, args.a.ld, count, columns, rows);
      for (int64_t i = 0; i < columns; ++i) {
        To values[VL];
        store(values, rows[i]);
        memcpy(out + (m + i) * ld + k, values, size_t(count) * sizeof(To));
      }
    }
}
template <class To>
void copy_rows_any(const MatmulArgs& args, int64_t m_begin, int64_t m_end, To* out) {
  if (args.a.dtype == MLXEFF_F32) copy_rows<To, float>(args, m_begin, m_end, out);
  else if (args.a.dtype == MLXEFF_F16) copy_rows<To, f16>(args, m_begin, m_end, out);
  else copy_rows<To, bf16>(args, m_begin, m_end, out);
}

// Whoever prepares the last row also clears the rows that exist only in the workspace.
void prepare(const MatmulArgs& args, int64_t m_begin, int64_t m_end) {
  const bool amx = uses_amx(args);
  if (amx) copy_rows_any(args, m_begin, m_end, args.a_bf16);
  else copy_rows_any(args, m_begin, m_end, args.a_f32);
  if (m_end < args.M) return;
  const int64_t row_size = a_stride(args) * (amx ? 2 : 4);
  char* const base = reinterpret_cast<char*>(args.a_f32);
  memset(base + args.M * row_size, 0, size_t((a_rows(args) - args.M) * row_size));
}

// --- panels -----------------------------------------------------------------------------------------------------

// panel [k_end - k_begin][2 * VL] of B, columns n on; missing columns are zero.
template <class T>
void fill_panel(const MatmulArgs& args, int64_t n, int64_t n_end, int64_t k_begin, int64_t k_end, float* panel) {
  const T* const b = static_cast<const T*>(args.b.data);
  for (int j = 0; j < 2; ++j) {
    const int64_t first = n + j * VL, lanes = max_of(0, min_of(VL, n_end - first));
    if (!args.b.transposed) {
      for (int64_t k = k_begin; k < k_end; ++k)
        store(panel + (k - k_begin) * panel_width + j * VL, load_up_to(b + k * args.b.ld + first, lanes));
      continue;
    }
    for (int64_t k = k_begin; k < k_end; k += columns_of<T>) {
      const int64_t columns = min_of(columns_of<T>, k_end - k);
      vf w[columns_of<T>];
      load_columns(b + first * args.b.ld + k, args.b.ld, lanes, columns, w);
      for (int64_t i = 0; i < columns; ++i) store(panel + (k - k_begin + i) * panel_width + j * VL, w[i]);
    }
  }
}

template <class T>
int run_panel(const MatmulArgs& args, int64_t n_begin, int64_t n_end) {
  return panel_product(
      args.a_f32, a_stride(args), args.M, args.K, n_begin, n_end, args.c,
      [&](int64_t n, int64_t k, int64_t k_end, float* panel) { fill_panel<T>(args, n, n_end, k, k_end, panel); });
}

#if defined(MLXEFF_AMX)
MLXEFF_INLINE void store_column_pairs(const vu words[4], bf16* out, int64_t pairs, const bf16*) {
  for (int64_t i = 0; i < pairs; ++i) memcpy(out + i * panel_width * 2, &words[i], sizeof words[i]);
}
template <class T>
MLXEFF_INLINE void store_column_pairs(const vu words[4], bf16* out, int64_t pairs, const T* type) {
  vf w[columns_of<T>];
  widen(words, w, type);
  for (int64_t i = 0; i < pairs; ++i) store_pairs(out + i * panel_width * 2, w[2 * i], w[2 * i + 1]);
}

// panel [(k_end - k_begin) / 2][32][2] in bf16; k_end may lie beyond K, where the panel is zero.
template <class T>
void fill_pairs(const MatmulArgs& args, int64_t n, int64_t n_end, int64_t k_begin, int64_t k_end, bf16* panel) {
  const T* const b = static_cast<const T*>(args.b.data);
  for (int j = 0; j < 2; ++j) {
    const int64_t first = n + j * VL, lanes = max_of(0, min_of(VL, n_end - first));
    const int64_t step = args.b.transposed ? columns_of<T> : 2;
    for (int64_t k = k_begin; k < k_end; k += step) {
      bf16* const out = panel + (k - k_begin) * panel_width + j * VL * 2;
      if (args.b.transposed) {
        vu words[4];
        load_words(b + first * args.b.ld + k, args.b.ld, lanes, max_of(0, args.K - k), words);
        store_column_pairs(words, out, step / 2, b);
      } else {
        const T* const row = b + k * args.b.ld + first;
        store_pairs(out, load_up_to(row, k < args.K ? lanes : 0),
                    load_up_to(row + args.b.ld, k + 1 < args.K ? lanes : 0));
      }
    }
  }
}

template <class T>
int run_amx(const MatmulArgs& args, int64_t n_begin, int64_t n_end) {
  return amx_product(
      args.a_bf16, a_stride(args), args.M, args.K, n_begin, n_end, args.c,
      [&](int64_t n, int64_t k, int64_t k_end, bf16* panel) { fill_pairs<T>(args, n, n_end, k, k_end, panel); });
}
#endif

int64_t piece(const MatmulArgs& args, int threads) {
  return few_rows(args) ? direct_piece(args.N, args.K * int64_t(dtype_size(args.b.dtype)), threads)
                        : panel_piece(args.N, uses_amx(args), threads);
}

template <class T>
int run_dtype(const MatmulArgs& args, int64_t n_begin, int64_t n_end) {
  if (few_rows(args)) return run_rows<T>(args, a_stride(args), n_begin, n_end);
#if defined(MLXEFF_AMX)
  if (uses_amx(args)) return run_amx<T>(args, n_begin, n_end);
#endif
  return run_panel<T>(args, n_begin, n_end);
}

int run(const MatmulArgs& args, int64_t n_begin, int64_t n_end) {
  if (args.b.dtype == MLXEFF_F32) return run_dtype<float>(args, n_begin, n_end);
  if (args.b.dtype == MLXEFF_F16) return run_dtype<f16>(args, n_begin, n_end);
  return run_dtype<bf16>(args, n_begin, n_end);
}

}  // namespace

const MatmulKernels& matmul_kernels() {
  static const MatmulKernels table = {workspace_bytes, bind, prepare, piece, run};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
