// The evaluation of one seed for one block: the least-squares coefficients, their rounding, and the error of the block
// that results from decoding.
//
// Rounding: the exponent e scales the least-squares solution t so that its largest |t| / 2^e lies in [4, 8), and q =
// round(t / 2^e) is clipped to [-8, 7]. With refinement, the encoder tries both e and e - 1, each with the 3^P
// neighbours q - 1, q, q + 1, and takes the coefficients nearest to t in the norm of the Gram matrix. Seeds are
// compared by the error of the decoded block.
//
// All arithmetic is fp32 and consists of operations that IEEE 754 defines exactly, in a fixed order; every multiply-add
// is an fma. Every instruction-set level, metal/seedlm_encode.metal and mlxeff/seedlm/search.py therefore find the same
// bits, and must be changed together.
#include <math.h>

#include "seedlm/seedlm_search_kernels.h"

namespace mlxeff {
namespace MLXEFF_ISA {
namespace {

MLXEFF_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

MLXEFF_INLINE float power_of_two(int exponent) {
  const uint32_t bits = uint32_t(exponent + 127) << 23;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The factorisation G = L D L^T, with ones on the diagonal of L, and the least-squares coefficients t. Coefficients q
// exceed the least error by sum_p D_p (d_p + sum_{j > p} L_jp d_j)^2, with d = q - t.
template <int P>
struct Fit {
  float L[P][P], D[P], t[P];
};

template <int P>
MLXEFF_INLINE bool factor(const float (*G)[P], Fit<P>& fit) {
  float M[P][P], trace = 0, inverse_trace = 0;  // M = L D, later the inverse of L
  for (int j = 0; j < P; ++j) {
    float pivot = G[j][j];
    for (int k = 0; k < j; ++k) pivot = fma(-M[j][k], fit.L[j][k], pivot);
    if (!(pivot > 0)) return false;
    fit.D[j] = pivot;
    trace += G[j][j];
    for (int i = j + 1; i < P; ++i) {
      float sum = G[i][j];
      for (int k = 0; k < j; ++k) sum = fma(-M[i][k], fit.L[j][k], sum);
      M[i][j] = sum;
      fit.L[i][j] = sum / pivot;
    }
  }
  for (int j = 0; j < P; ++j) {
    inverse_trace += 1.0f / fit.D[j];
    for (int i = j + 1; i < P; ++i) {
      float sum = fit.L[i][j];
      for (int k = j + 1; k < i; ++k) sum = fma(fit.L[i][k], M[k][j], sum);
      M[i][j] = -sum;
      inverse_trace = fma(sum / fit.D[i], sum, inverse_trace);
    }
  }
  return trace * inverse_trace < most_condition;
}

template <int C, int P>
MLXEFF_INLINE bool solve(const BlockSearch& block, const uint16_t* states, Fit<P>& fit) {
  float G[P][P] = {}, b[P] = {};
  for (int c = 0; c < C; ++c) {
    float u[P];
    for (int p = 0; p < P; ++p) u[p] = float(int(states[c * P + p]) - 32768) * 0x1p-15f;
    for (int i = 0; i < P; ++i) {
      const float hu = block.h[c] * u[i];
      b[i] = fma(block.hw[c], u[i], b[i]);
      for (int j = 0; j <= i; ++j) G[i][j] = fma(hu, u[j], G[i][j]);
    }
  }
  if (!factor<P>(G, fit)) return false;
  for (int i = 0; i < P; ++i)
    for (int k = 0; k < i; ++k) b[i] = fma(-fit.L[i][k], b[k], b[i]);
  for (int i = P - 1; i >= 0; --i) {
    fit.t[i] = b[i] / fit.D[i];
    for (int j = i + 1; j < P; ++j) fit.t[i] = fma(-fit.L[j][i], fit.t[j], fit.t[i]);
  }
  for (float& t : fit.t) t = fma(-0x1p-15f, t, t);  // turns t into coefficients of states / 32767
  return true;
}

template <int P>
struct Rounded {
  float cost;
  int exponent, q[P];
};

// Tries values around t / unit for the coefficients p, p - 1, …, 0. `cost` is the contribution of the coefficients
// after p, which are already chosen.
template <int P, int p>
struct Choose {
  MLXEFF_INLINE void run(const Fit<P>& fit, int exponent, int reach, float cost, int* q, float* misses,
                         Rounded<P>& best) {
    const float unit = power_of_two(exponent);
    const int middle = int(fmaxf(-8.0f, fminf(7.0f, rintf(fit.t[p] * power_of_two(-exponent)))));
    for (int step = 0; step <= 2 * reach; ++step) {  // 0, -1, +1
      q[p] = middle + (step + 1) / 2 * (step % 2 ? -1 : 1);
      if (q[p] < -8 || q[p] > 7) continue;
      misses[p] = fma(float(q[p]), unit, -fit.t[p]);
      float miss = misses[p];
      for (int j = p + 1; j < P; ++j) miss = fma(fit.L[j][p], misses[j], miss);
      const float sum = fma(fit.D[p] * miss, miss, cost);
      if (sum < best.cost) Choose<P, p - 1>::run(fit, exponent, reach, sum, q, misses, best);
    }
  }
};
template <int P>
struct Choose<P, -1> {
  MLXEFF_INLINE void run(const Fit<P>&, int exponent, int, float cost, int* q, float*, Rounded<P>& best) {
    best.cost = cost;
    best.exponent = exponent;
    for (int i = 0; i < P; ++i) best.q[i] = q[i];
  }
};

// Returns the error of the block that results from decoding these coefficients.
template <int C, int P>
MLXEFF_INLINE float error_of(const BlockSearch& block, const uint16_t* states, const Rounded<P>& rounded) {
  const float scale = power_of_two(rounded.exponent) * (1.0f / 32767.0f);
  float error = 0;
  for (int c = 0; c < C; ++c) {
    int sum = 0;
    for (int p = 0; p < P; ++p) sum += rounded.q[p] * (int(states[c * P + p]) - 32768);
    float miss = fma(-float(sum), scale, block.w[c]);
    if (fabsf(miss) < least_miss) miss = 0;
    error = fma(block.h[c] * miss, miss, error);
  }
  return error;
}

template <int C, int P>
void evaluate(BlockSearch& block, const uint16_t* states) {
  Fit<P> fit;
  if (!solve<C, P>(block, states, fit)) return;
  float largest = 0;
  for (int p = 0; p < P; ++p) largest = fmaxf(largest, fabsf(fit.t[p]));
  uint32_t bits;
  memcpy(&bits, &largest, 4);
  const int wanted = int(bits >> 23) - 129, exponent = max_of(block.lowest, min_of(block.highest, wanted));
  Rounded<P> best = {INFINITY, exponent, {}};
  int q[P];
  float misses[P];
  Choose<P, P - 1>::run(fit, exponent, block.refine, 0, q, misses, best);
  if (block.refine && exponent > block.lowest) Choose<P, P - 1>::run(fit, exponent - 1, 1, 0, q, misses, best);
  const float error = error_of<C, P>(block, states, best);
  if (error > block.error || (error == block.error && states[0] >= block.seed)) return;
  block.error = error;
  block.seed = states[0];
  block.exponent = best.exponent;
  for (int p = 0; p < P; ++p) block.coefficients[p] = int8_t(best.q[p]);
}

}  // namespace

void evaluate_seed(BlockSearch& block, const uint16_t* states) {
  if (block.states_per_row == 3) evaluate<8, 3>(block, states);
  else if (block.columns == 8) evaluate<8, 4>(block, states);
  else evaluate<12, 4>(block, states);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
