// The C ABI of the native CPU kernels: pointers, sizes, strides, dtype numbers; no MLX, no Python.
//
// Conventions
//   * Every function that can fail returns an MLXEFF_* code; mlxeff_error_string() names it. Outputs are
//     written only when the code is MLXEFF_OK.
//   * Matrices are row-major. A stride `ld*` counts elements between the starts of two rows; the elements of a
//     row are contiguous.
//   * A weight matrix (N, K) may be a part of a larger one, some of its columns: its rows then begin `ld` values apart,
//     ld > K. Of what lies between them nothing is read but the rest of a block or byte that the last column cuts.
//   * A product y = x @ W^T with `accumulate` != 0 is y += x @ W^T instead: y is fp32, and each finished fp32 sum is
//     added to it once.
//   * Arrays need the alignment of their element type only, and may not overlap an output.
//   * Calls are safe from several threads at once. One call at a time uses the thread pool; the others run on the
//     thread they were called from.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MLXEFF_API __attribute__((visibility("default")))
#else
#define MLXEFF_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  MLXEFF_OK = 0,
  MLXEFF_BAD_ARGUMENT = 1,
  MLXEFF_BAD_DTYPE = 2,
  MLXEFF_UNSUPPORTED = 3,
  MLXEFF_NO_MEMORY = 4,
  MLXEFF_BUSY = 5
};
enum { MLXEFF_F32 = 0, MLXEFF_F16 = 1, MLXEFF_BF16 = 2 };

// How a matrix product treats its operands; accumulation is in fp32 in every mode.
//   EXACT  operands are read at full precision and multiplied in fp32, or with errors as small: a single row of
//   activations may be
//          rounded to 24 bits of the largest of each group of quantised weights, and multiplied exactly.
//   BF16   operands are rounded to bf16 where the machine multiplies bf16 faster (AMX); EXACT elsewhere.
//   INT8   activations are rounded to int8, one scale for each group or block of weights (quantised weights and seeds
//   only).
enum { MLXEFF_EXACT = 0, MLXEFF_COMPUTE_BF16 = 1, MLXEFF_COMPUTE_INT8 = 2 };

MLXEFF_API const char* mlxeff_error_string(int code);

// --- isa.cpp: the instruction set in use -----------------------------------------------------------------
// Name of the level in use: scalar, avx2, avx512, amx; or scalar, neon, dotprod, i8mm.
MLXEFF_API const char* mlxeff_isa(void);
// Choose a level by name, e.g. "avx2". MLXEFF_UNSUPPORTED if this machine or this build lacks it. Null restores the
// best level that MLXEFF_CPU_ISA allows. Not to be called while kernels run.
MLXEFF_API int mlxeff_set_isa(const char* name);
// Space-separated names of all levels usable here, lowest first.
MLXEFF_API const char* mlxeff_isa_available(void);

// --- pool.cpp: the thread pool ----------------------------------------------------------------------------------
MLXEFF_API int mlxeff_num_threads(void);
// n >= 1 sets the number of threads, caller included; n = 0 restores the default (MLXEFF_NUM_THREADS, else the CPUs
// that affinity and cgroup quota leave). MLXEFF_BUSY from inside a parallel region.
MLXEFF_API int mlxeff_set_num_threads(int n);

// --- qmatmul.cpp: affine-quantised matrices in MLX's packed layout --------------------------------------------
// A weight matrix W (N, K): w = q * scale + bias. `packed` holds N rows of K * bits / 32 uint32 words, ld * bits / 32
// apart, values packed from the least significant bit on, across word borders; `scales` and `biases` are
// (N, K / group), rows ld / group apart. bits in {2, 3, 4, 5, 6, 8}; group in {32, 64, 128} divides K and ld.
typedef struct {
  const uint32_t* packed;
  const void* scales;
  const void* biases;
  int64_t N, K, ld;
  int bits, group;
  int scale_dtype;  // of scales and biases
} mlxeff_qweight;

// y (M, N) = x (M, K) @ W^T. `mode` is MLXEFF_EXACT, MLXEFF_COMPUTE_BF16 or MLXEFF_COMPUTE_INT8.
MLXEFF_API int mlxeff_qmm(const mlxeff_qweight* w, const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy,
                          int y_dtype, int64_t M, int mode, int accumulate);
// out (count, K): the dequantised rows ids[0], ids[1], ... of W. An id outside [0, N) is MLXEFF_BAD_ARGUMENT.
MLXEFF_API int mlxeff_qmm_rows(const mlxeff_qweight* w, const int32_t* ids, int64_t count, void* out, int64_t ld,
                               int out_dtype);
// out (N, K): all of W, dequantised.
MLXEFF_API int mlxeff_dequantize(const mlxeff_qweight* w, void* out, int64_t ld, int out_dtype);

// --- seedlm.cpp: matrices stored as seeds of a shift register ------------------------------------------------------
// A weight matrix W (N, K) in SeedLM blocks of `columns` consecutive values of a row; mlxeff/seedlm/format.py states
// the layout and the decoding. (columns, states) = (8, 3): `seeds` are the uint32 blocks (N, blocks), the other two
// arrays are null; (8, 4) and (12, 4): seeds uint16 (N, blocks), coefficients (N, blocks), exponents (N, blocks / 2),
// blocks even. blocks = ceil(ld / columns), rounded up to even for states = 4; the first K values of a row are W's.
// A seed is not 0. |exponent_bias| <= 96.
typedef struct {
  const void* seeds;
  const uint16_t* coefficients;
  const uint8_t* exponents;
  int64_t N, K, ld;
  int columns, states;
  int exponent_bias;
} mlxeff_seedlm_weight;

// y (M, N) = x (M, K) @ W^T. INT8 applies to M <= 8 on CPUs with AVX-512 VBMI, and rounds the register's states to
// their leading byte too; elsewhere it means BF16.
MLXEFF_API int mlxeff_seedlm_matmul(const mlxeff_seedlm_weight* w, const void* x, int64_t ldx, int x_dtype, void* y,
                                    int64_t ldy, int y_dtype, int64_t M, int mode, int accumulate);
// out (count, K): the decoded rows ids[0], ids[1], ... of W. An id outside [0, N) is MLXEFF_BAD_ARGUMENT.
MLXEFF_API int mlxeff_seedlm_rows(const mlxeff_seedlm_weight* w, const int32_t* ids, int64_t count, void* out,
                                  int64_t ld, int out_dtype);
// out (N, K): all of W, decoded; fp32 values are the same bits at every level, other dtypes are rounded from them.
MLXEFF_API int mlxeff_seedlm_decode(const mlxeff_seedlm_weight* w, void* out, int64_t ld, int out_dtype);

// --- seedlm_search.cpp: the encoder ------------------------------------------------------------------------------
// For each block the seed, coefficients and exponent code of least error, by exhaustive search. The error is the sum of
// diagonal[c] * (w - decoded)^2 over the block's columns; diagonal (columns), positive, may be null for ones, and
// otherwise the matrix is one column of blocks: cols <= columns. Columns beyond cols count as zeros. blocks a row =
// ceil(cols / columns), rounded up to even for states = 4 unless there is a diagonal. `refine`: try exponent - 1 and
// the neighbours of every coefficient too. The result does not depend on the number of threads. Weights that are not
// finite are MLXEFF_BAD_ARGUMENT.
typedef struct {
  const float* weights;  // (rows, cols), ld elements between rows
  int64_t ld, rows, cols;
  const float* diagonal;
  int columns, states;  // (8, 3), (8, 4) or (12, 4)
  int exponent_bias;    // exponent = code - 8 + exponent_bias
  int refine;
  uint16_t* seeds;       // (rows, blocks a row)
  int8_t* coefficients;  // (rows, blocks a row, states)
  uint8_t* codes;        // (rows, blocks a row)
  float* decoded;        // (rows, cols), or null
  double* errors;        // (rows, blocks a row) of what is decoded, or null
} mlxeff_seedlm_encode_args;
MLXEFF_API int mlxeff_seedlm_encode(const mlxeff_seedlm_encode_args* args);

// --- matmul.cpp: dense matrices -------------------------------------------------------------------------------
// y (M, N) = x (M, K) @ w (N, K)^T. Modes: MLXEFF_EXACT, MLXEFF_COMPUTE_BF16. Each operand has its own dtype.
MLXEFF_API int mlxeff_matmul(const void* x, int64_t ldx, int x_dtype, const void* w, int64_t ldw, int w_dtype, void* y,
                             int64_t ldy, int y_dtype, int64_t M, int64_t N, int64_t K, int mode, int accumulate);
// dx (M, K) = dy (M, N) @ w (N, K): the gradient of mlxeff_matmul with respect to x.
MLXEFF_API int mlxeff_matmul_dx(const void* dy, int64_t lddy, int dy_dtype, const void* w, int64_t ldw, int w_dtype,
                                void* dx, int64_t lddx, int dx_dtype, int64_t M, int64_t N, int64_t K, int mode,
                                int accumulate);
// dw (N, K) = dy (M, N)^T @ x (M, K): the gradient with respect to w.
MLXEFF_API int mlxeff_matmul_dw(const void* dy, int64_t lddy, int dy_dtype, const void* x, int64_t ldx, int x_dtype,
                                void* dw, int64_t lddw, int dw_dtype, int64_t M, int64_t N, int64_t K, int mode,
                                int accumulate);

// --- attention.cpp ----------------------------------------------------------------------------------------------
// A (B, heads, tokens, E) array: element (b, h, t, e) is data[b * batch + h * head + t * token + e]. So a part of a
// larger buffer, or (B, tokens, heads, E), needs no copy.
typedef struct {
  void* data;
  int64_t batch, head, token;  // strides, in elements
  int dtype;
} mlxeff_heads;

// out (B, H, S, E) = softmax(scale q k^T + mask) v, causal, aligned at the end: of T keys, the query at position i of S
// sees those before T - S + i + 1, and with window > 0 only the last `window` of these. T >= S; G divides H, and query
// head h uses key/value head h / (H / G). MLXEFF_COMPUTE_BF16 concerns the blocked products; the softmax and groups of
// few queries (decode) are fp32 in any mode. lse, if not null, receives logsumexp of the scores, (B, H, S).
typedef struct {
  mlxeff_heads q, k, v, out;
  int64_t B, H, G, S, T, E;
  float scale;
  int64_t window;
  int mode;
  float* lse;
} mlxeff_attention_args;
MLXEFF_API int mlxeff_attention(const mlxeff_attention_args* args);
// Gradients, given the arguments of the forward call with its results in `out` and `lse`. dq has q's shape, dk and dv
// have k's. All products are in fp32; `mode` is not used.
MLXEFF_API int mlxeff_attention_backward(const mlxeff_attention_args* forward, const mlxeff_heads* dout,
                                         const mlxeff_heads* dq, const mlxeff_heads* dk, const mlxeff_heads* dv);

// --- norm.cpp: RMSNorm --------------------------------------------------------------------------------------------
// y (rows, n) = x / sqrt(mean(x^2) + eps) * weight (n), null for ones. y may be x.
MLXEFF_API int mlxeff_rms_norm(const void* x, int64_t ldx, int x_dtype, const void* weight, int weight_dtype, void* y,
                               int64_t ldy, int y_dtype, int64_t rows, int64_t n, float eps);
// The same over the last axis of (B, H, S, E). y may be x.
MLXEFF_API int mlxeff_head_norm(const mlxeff_heads* x, const mlxeff_heads* y, int64_t B, int64_t H, int64_t S,
                                int64_t E, const void* weight, int weight_dtype, float eps);
// dx (rows, n) and dw (n, fp32; may be null) from dy and the norm's input. dx may be dy if dw is null.
MLXEFF_API int mlxeff_rms_norm_backward(const void* x, int64_t ldx, int x_dtype, const void* weight, int weight_dtype,
                                        const void* dy, int64_t lddy, int dy_dtype, void* dx, int64_t lddx,
                                        int dx_dtype, float* dw, int64_t rows, int64_t n, float eps);

// --- rope.cpp: rotary position embedding --------------------------------------------------------------------------
// cos, sin (count, half) of (first_position + t) * inverse_frequencies[j], times scale; computed in fp64.
MLXEFF_API int mlxeff_rope_table(const double* inverse_frequencies, int64_t half, int64_t first_position, int64_t count,
                                 double scale, float* cos, float* sin);
// y (B, H, S, E): elements j and j + rotated / 2 of x turned by the angle of their token, cos and sin (S, rotated / 2);
// elements from `rotated` on are copied. y may be x, or a part of a cache. inverse != 0 turns back: the gradient.
MLXEFF_API int mlxeff_rope(const mlxeff_heads* x, const mlxeff_heads* y, int64_t B, int64_t H, int64_t S, int64_t E,
                           int64_t rotated, const float* cos, const float* sin, int inverse);

// --- swiglu.cpp ---------------------------------------------------------------------------------------------------
// y (rows, n) = gate * sigmoid(gate) * up; without `up` if that is null. One dtype; y may be gate or up.
MLXEFF_API int mlxeff_swiglu(const void* gate, int64_t ldg, const void* up, int64_t ldu, void* y, int64_t ldy,
                             int64_t rows, int64_t n, int dtype);
// dgate and dup (may be null) from dy. One dtype; results may overwrite gate, up or dy.
MLXEFF_API int mlxeff_swiglu_backward(const void* gate, int64_t ldg, const void* up, int64_t ldu, const void* dy,
                                      int64_t lddy, void* dgate, int64_t lddg, void* dup, int64_t lddu, int64_t rows,
                                      int64_t n, int dtype);

// --- softmax.cpp --------------------------------------------------------------------------------------------------
MLXEFF_API int mlxeff_softmax(const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy, int y_dtype, int64_t rows,
                              int64_t n);
// y (rows, n) = x - logsumexp(x). y may be x if they have one dtype.
MLXEFF_API int mlxeff_log_softmax(const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy, int y_dtype,
                                  int64_t rows, int64_t n);
MLXEFF_API int mlxeff_logsumexp(const void* x, int64_t ldx, int dtype, float* out, int64_t rows, int64_t n);
// loss (rows) = lse - x[target]; lse (rows; may be null) = logsumexp. A negative target: loss and gradient 0; one >= n
// is an error.
MLXEFF_API int mlxeff_cross_entropy(const void* x, int64_t ldx, int dtype, const int32_t* targets, float* loss,
                                    float* lse, int64_t rows, int64_t n);
// dx (rows, n) = (softmax(x) - onehot(target)) * dloss[row]. dx may be x if they have one dtype.
MLXEFF_API int mlxeff_cross_entropy_backward(const void* x, int64_t ldx, int x_dtype, const int32_t* targets,
                                             const float* lse, const float* dloss, void* dx, int64_t lddx, int dx_dtype,
                                             int64_t rows, int64_t n);
// The first of the largest elements of each row; the first NaN if there is one.
MLXEFF_API int mlxeff_argmax(const void* x, int64_t ldx, int dtype, int32_t* out, int64_t rows, int64_t n);

// --- sampling.cpp -------------------------------------------------------------------------------------------------
// A token from logits (V): top_p, min_p, top_k (0: off) filter in this order, before the temperature; then the inverse
// of the distribution function, in the order of ids, at u in [0, 1). temp < 1e-6: the largest logit. Equal logits rank
// by id, smallest first. NaN or +inf among the logits, or nothing above -inf, is MLXEFF_BAD_ARGUMENT (unless temp <
// 1e-6).
MLXEFF_API int mlxeff_sample(const void* logits, int dtype, int64_t V, float temp, int64_t top_k, float top_p,
                             float min_p, double u, int32_t* token);

#ifdef __cplusplus
}
#endif
