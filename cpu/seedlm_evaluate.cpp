// One seed for one block, in fp64: the least-squares coefficients, their rounding and the error of the result.
//
// Rounding: the exponent e puts the largest |t| into [4, 8); q = round(t / 2^e), clipped to [-8, 7]. Refined: the best of e and e - 1, and of
// the 3^P neighbours q - 1, q, q + 1 of the rounded coefficients. Compiled once, so that all levels choose alike.
#include <math.h>

#include "seedlm_search_kernels.h"

namespace mlxeff {
namespace {

// R upper triangular with G = R^T R; t least-squares; |R (q - t)|^2 + bound is the error of coefficients q.
struct Fit {
  double R[most_states][most_states], t[most_states], bound;
};

bool solve(const BlockSearch& block, const uint16_t* states, Fit& fit) {
  const int C = block.columns, P = block.states_per_row;
  double b[most_states] = {}, G[most_states][most_states] = {};
  for (int c = 0; c < C; ++c) {
    double u[most_states];
    for (int p = 0; p < P; ++p) u[p] = (int(states[c * P + p]) - 32768) / 32767.0;
    for (int p = 0; p < P; ++p) {
      const double hu = block.h[c] * u[p];
      b[p] += hu * block.w[c];
      for (int j = 0; j <= p; ++j) G[j][p] += hu * u[j];
    }
  }
  double y[most_states];
  fit.bound = block.norm;
  for (int p = 0; p < P; ++p) {  // Cholesky, row by row, with the forward substitution
    double pivot = G[p][p];
    for (int k = 0; k < p; ++k) pivot -= fit.R[k][p] * fit.R[k][p];
    if (!(pivot > 1e-9 * G[p][p])) return false;
    fit.R[p][p] = sqrt(pivot);
    y[p] = b[p];
    for (int k = 0; k < p; ++k) y[p] -= fit.R[k][p] * y[k];
    y[p] /= fit.R[p][p];
    fit.bound -= y[p] * y[p];
    for (int j = p + 1; j < P; ++j) {
      double sum = G[p][j];
      for (int k = 0; k < p; ++k) sum -= fit.R[k][p] * fit.R[k][j];
      fit.R[p][j] = sum / fit.R[p][p];
    }
  }
  for (int p = P - 1; p >= 0; --p) {
    fit.t[p] = y[p];
    for (int j = p + 1; j < P; ++j) fit.t[p] -= fit.R[p][j] * fit.t[j];
    fit.t[p] /= fit.R[p][p];
  }
  return true;
}

class Rounding {
 public:
  Rounding(BlockSearch& block, const Fit& fit, int index, int exponent, int reach)
      : block_(block), fit_(fit), index_(index), exponent_(exponent), reach_(reach), unit_(ldexp(1.0, exponent)) {}

  // Chooses the coefficients p, p - 1, …, 0; `error` is what the later ones contribute.
  void choose(int p, double error) {
    if (p < 0) {
      block_.error = error;
      block_.index = index_;
      block_.exponent = exponent_;
      for (int i = 0; i < block_.states_per_row; ++i) block_.coefficients[i] = int8_t(q_[i]);
      return;
    }
    const int middle = int(fmax(-8, fmin(7, nearbyint(fit_.t[p] / unit_))));
    double later = 0;
    for (int j = p + 1; j < block_.states_per_row; ++j) later += fit_.R[p][j] * (q_[j] * unit_ - fit_.t[j]);
    for (int step = 0; step <= 2 * reach_; ++step) {  // 0, -1, +1
      const int q = middle + (step + 1) / 2 * (step % 2 ? -1 : 1);
      if (q < -8 || q > 7) continue;
      const double miss = later + fit_.R[p][p] * (q * unit_ - fit_.t[p]), sum = error + miss * miss;
      if (sum >= block_.error) continue;
      q_[p] = q;
      choose(p - 1, sum);
    }
  }

 private:
  BlockSearch& block_;
  const Fit& fit_;
  int index_, exponent_, reach_, q_[most_states];
  double unit_;
};

}  // namespace

void evaluate_seed(BlockSearch& block, const uint16_t* cycle, int index) {
  Fit fit;
  if (!solve(block, cycle + index, fit) || fit.bound >= block.error) return;
  double largest = 0;
  for (int p = 0; p < block.states_per_row; ++p) largest = fmax(largest, fabs(fit.t[p]));
  int exponent;
  frexp(largest, &exponent);
  exponent = exponent - 3 < block.lowest ? block.lowest : exponent - 3 > block.highest ? block.highest : exponent - 3;
  const int last = block.states_per_row - 1;
  const double bound = fmax(fit.bound, 0.0);
  Rounding(block, fit, index, exponent, block.refine).choose(last, bound);
  if (block.refine && exponent > block.lowest) Rounding(block, fit, index, exponent - 1, 1).choose(last, bound);
}

}  // namespace mlxeff
