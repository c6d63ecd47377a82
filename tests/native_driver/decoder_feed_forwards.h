// Checks of the gated feed-forward, called as a pass calls it, on every member of a team.
#pragma once
#include "decoder/gated_feed_forward.h"
#include "products.h"

// out = down(silu(gate(x) + gate bias) * (up(x) + up bias)): x is made row by row, each once, out of what `out` holds.
inline void check_gated(int64_t rows, int64_t dim, int64_t width, bool quantised, bool biases) {
  const QuantizedMatrix gate(width, dim, 4, 32, MLXEFF_F16), up(width, dim, 4, 32, MLXEFF_F16);
  const Matrix down = Matrix::random(dim, width, MLXEFF_BF16), dense_up = Matrix::random(width, dim),
               gate_bias = Matrix::random(1, width), up_bias = Matrix::random(1, width),
               down_bias = Matrix::random(1, dim), input = Matrix::random(rows, dim);
  const auto bias = [&](const Matrix& x) { return biases ? static_cast<const float*>(x.data()) : nullptr; };
  const auto up_at = [&](int64_t n, int64_t k) { return quantised ? up.at(n, k) : dense_up.at(n, k); };
  mlxeff::Linear gate_linear, up_linear, down_linear;
  gate_linear.weight.N = up_linear.weight.N = down_linear.weight.K = width;
  gate_linear.weight.K = up_linear.weight.K = down_linear.weight.N = dim;
  gate_linear.weight.ld = up_linear.weight.ld = dim;
  down_linear.weight.ld = width;
  gate_linear.weight.quantised = gate.c();
  if (quantised) up_linear.weight.quantised = up.c();
  else up_linear.weight.dense = dense_up.data(), up_linear.weight.dtype = MLXEFF_F32;
  down_linear.weight.dense = down.data(), down_linear.weight.dtype = MLXEFF_BF16;
  gate_linear.bias = bias(gate_bias), up_linear.bias = bias(up_bias), down_linear.bias = bias(down_bias);
  const auto product = [&](const auto& w, const float* term, double weight) {
    return sums(rows, width, dim, [&](int64_t r, int64_t n, int64_t k) {
      return 2 * input.at(r, k) * w(n, k) + (term ? weight * double(term[n]) : 0);
    });
  };
  const double share = 1 / double(dim);  // of the bias in each term of the sum
  const std::vector<double> gates =
                                product([&](int64_t n, int64_t k) { return gate.at(n, k); }, gate_linear.bias, share),
                            ups = product(up_at, up_linear.bias, share);
  const std::vector<double> want = sums(rows, dim, width, [&](int64_t r, int64_t n, int64_t k) {
    const double g = gates[size_t(r * width + k)];
    return g / (1 + std::exp(-g)) * ups[size_t(r * width + k)] * down.at(n, k);
  });
  double size = 1;
  for (const double each : want) size = std::max(size, std::fabs(each));
  mlxeff::GatedFeedForward gated(gate_linear, up_linear, down_linear);
  CHECK(gated.bias == down_linear.bias);
  each_setting([&] {
    for (const int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16, MLXEFF_COMPUTE_INT8}) {
      const mlxeff::RunOptions options = {mode};
      mlxeff::FeedForward& feed_forward = gated;
      const mlxeff::FeedForward::Needs needs = feed_forward.needs(rows, options);
      Workspace workspace(needs.workspace), prepared(needs.prepared);
      Matrix x(rows, dim), out = input;
      std::atomic<int> error{MLXEFF_OK};
      mlxeff::team_run([&](mlxeff::Team& team) {
        mlxeff::PassTeam pass(team, options, prepared.data(), error);
        const auto make_row = [&](int64_t r) {
          for (int64_t k = 0; k < dim; ++k) x.set(r, k, float(x.at(r, k) == x.at(r, k) ? NAN : 2 * out.at(r, k)));
        };
        feed_forward.run(pass, {x.floats(), out.floats(), rows, &make_row}, workspace.data());
      });
      CHECK(error == MLXEFF_OK);
      const double tolerance = size * (mode == MLXEFF_EXACT ? 1e-5 : 8e-2);
      out.check("gated feed-forward", tolerance, [&](int64_t r, int64_t n) { return want[size_t(r * dim + n)]; });
    }
  });
}

inline void check_feed_forwards() {
  for (const int64_t rows : {1, 7, 40})
    for (const bool quantised : {false, true}) check_gated(rows, 64, 96, quantised, rows != 7);
}
