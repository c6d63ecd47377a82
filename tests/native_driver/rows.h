// Checks of the families that work on rows: norm, SwiGLU, softmax, cross-entropy, argmax, sampling.
#pragma once
#include "checks.h"

inline void check_rms_norm(int64_t rows, int64_t n, int dtype, int other) {
  const Matrix x = Matrix::random(rows, n, dtype, 1), weight = Matrix::random(1, n, other);
  const Matrix dy = Matrix::random(rows, n, other, 1);
  const double eps = 1e-5;
  const std::vector<double> inverse = inverse_rms(x, eps);
  std::vector<double> projection(size_t(rows), 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < n; ++c) projection[size_t(r)] += dy.at(r, c) * weight.at(0, c) * x.at(r, c);
  each_setting([&] {
    Matrix y(rows, n, other, 3), dx(rows, n, dtype, 1), dw(1, n);
    RUN(mlxeff_rms_norm(x.data(), x.ld, dtype, weight.data(), other, y.data(), y.ld, other, rows, n, float(eps)));
    y.check("rms_norm", 3e-6, [&](int64_t r, int64_t c) { return x.at(r, c) * inverse[size_t(r)] * weight.at(0, c); });
    Matrix plain = x;
    RUN(mlxeff_rms_norm(plain.data(), plain.ld, dtype, nullptr, 0, plain.data(), plain.ld, dtype, rows, n, float(eps)));
    plain.check("rms_norm in place", 3e-6, [&](int64_t r, int64_t c) { return x.at(r, c) * inverse[size_t(r)]; });

    RUN(mlxeff_rms_norm_backward(x.data(), x.ld, dtype, weight.data(), other, dy.data(), dy.ld, other, dx.data(), dx.ld,
                                 dtype, dw.floats(), rows, n, float(eps)));
    dx.check("rms_norm dx", 1e-5, [&](int64_t r, int64_t c) {
      const double i = inverse[size_t(r)];
      return i * (dy.at(r, c) * weight.at(0, c) - x.at(r, c) * projection[size_t(r)] * i * i / double(n));
    });
    dw.check("rms_norm dw", 1e-5, [&](int64_t, int64_t c) {
      double total = 0;
      for (int64_t r = 0; r < rows; ++r) total += dy.at(r, c) * x.at(r, c) * inverse[size_t(r)];
      return total;
    });
  });
}

inline void check_swiglu(int64_t rows, int64_t n, int dtype) {
  const Matrix gate = Matrix::random(rows, n, dtype, 1, 6), up = Matrix::random(rows, n, dtype, 2),
               dy = Matrix::random(rows, n, dtype, 3);
  const auto sigmoid = [&](int64_t r, int64_t c) { return 1 / (1 + std::exp(-gate.at(r, c))); };
  each_setting([&] {
    Matrix y(rows, n, dtype, 4), silu(rows, n, dtype, 1), dgate(rows, n, dtype, 1), dup(rows, n, dtype, 2);
    RUN(mlxeff_swiglu(gate.data(), gate.ld, up.data(), up.ld, y.data(), y.ld, rows, n, dtype));
    RUN(mlxeff_swiglu(gate.data(), gate.ld, nullptr, 0, silu.data(), silu.ld, rows, n, dtype));
    y.check("swiglu", 2e-6, [&](int64_t r, int64_t c) { return gate.at(r, c) * sigmoid(r, c) * up.at(r, c); });
    silu.check("silu", 2e-6, [&](int64_t r, int64_t c) { return gate.at(r, c) * sigmoid(r, c); });
    RUN(mlxeff_swiglu_backward(gate.data(), gate.ld, up.data(), up.ld, dy.data(), dy.ld, dgate.data(), dgate.ld,
                               dup.data(), dup.ld, rows, n, dtype));
    dgate.check("swiglu dgate", 4e-6, [&](int64_t r, int64_t c) {
      return dy.at(r, c) * up.at(r, c) * sigmoid(r, c) * (1 + gate.at(r, c) * (1 - sigmoid(r, c)));
    });
    dup.check("swiglu dup", 2e-6, [&](int64_t r, int64_t c) { return dy.at(r, c) * gate.at(r, c) * sigmoid(r, c); });
  });
}

inline void check_softmax(int64_t rows, int64_t n, int dtype, int other) {
  const Matrix x = Matrix::random(rows, n, dtype, 1, 5), dloss = Matrix::random(rows, 1);
  std::vector<int32_t> targets;
  std::vector<double> lse;
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0;
    for (int64_t c = 0; c < n; ++c) total += std::exp(x.at(r, c));
    lse.push_back(std::log(total));
    targets.push_back(r % 4 == 3 ? -1 : int32_t(r * 5 % n));
  }
  const auto probability = [&](int64_t r, int64_t c) { return std::exp(x.at(r, c) - lse[size_t(r)]); };
  each_setting([&] {
    Matrix y(rows, n, other, 2), logs(rows, 1), loss(rows, 1), kept(rows, 1), dx(rows, n, other, 3);
    RUN(mlxeff_softmax(x.data(), x.ld, dtype, y.data(), y.ld, other, rows, n));
    y.check("softmax", 2e-6, probability);
    RUN(mlxeff_logsumexp(x.data(), x.ld, dtype, logs.floats(), rows, n));
    logs.check("logsumexp", 2e-6, [&](int64_t r, int64_t) { return lse[size_t(r)]; });
    Matrix logarithms(rows, n, other, 2);
    RUN(mlxeff_log_softmax(x.data(), x.ld, dtype, logarithms.data(), logarithms.ld, other, rows, n));
    logarithms.check("log_softmax", 2e-6, [&](int64_t r, int64_t c) { return x.at(r, c) - lse[size_t(r)]; });
    RUN(mlxeff_cross_entropy(x.data(), x.ld, dtype, targets.data(), loss.floats(), kept.floats(), rows, n));
    kept.check("lse of the loss", 2e-6, [&](int64_t r, int64_t) { return lse[size_t(r)]; });
    loss.check("cross_entropy", 1e-5, [&](int64_t r, int64_t) {
      const int32_t target = targets[size_t(r)];
      return target < 0 ? 0 : lse[size_t(r)] - x.at(r, target);
    });
    const Matrix factors = dloss;
    RUN(mlxeff_cross_entropy_backward(x.data(), x.ld, dtype, targets.data(), kept.floats(),
                                      static_cast<const float*>(factors.data()), dx.data(), dx.ld, other, rows, n));
    dx.check("cross_entropy dx", 4e-6, [&](int64_t r, int64_t c) {
      return targets[size_t(r)] < 0 ? 0 : (probability(r, c) - (c == targets[size_t(r)])) * dloss.at(r, 0);
    });
    std::vector<int32_t> largest(size_t(rows), -1);
    RUN(mlxeff_argmax(x.data(), x.ld, dtype, largest.data(), rows, n));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c)
        CHECK(c < largest[size_t(r)] ? x.at(r, c) < x.at(r, largest[size_t(r)])
                                     : x.at(r, c) <= x.at(r, largest[size_t(r)]));
  });
}

// The token is the one at which the distribution function of the filtered logits passes u; next to a step, either side.
inline void check_sample(int64_t V, int dtype, float temp, int64_t top_k, float top_p, float min_p) {
  const Matrix x = Matrix::random(1, V, dtype, 0, 6);
  std::vector<int32_t> order;
  for (int64_t i = 0; i < V; ++i) order.push_back(int32_t(i));
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return x.at(0, a) > x.at(0, b) || (x.at(0, a) == x.at(0, b) && a < b); });
  double total = 0, before = 0;
  for (int32_t id : order) total += std::exp(x.at(0, id));
  std::vector<double> weight(size_t(V), 0);
  for (int64_t rank = 0; rank < V; ++rank) {
    const int32_t id = order[size_t(rank)];
    const double logit = x.at(0, id);
    const bool kept = (top_p <= 0 || before < double(top_p) * total) &&
                      std::exp(logit - x.at(0, order[0])) >= double(min_p) && (top_k == 0 || rank < top_k);
    if (kept) weight[size_t(id)] = std::exp((logit - x.at(0, order[0])) / double(temp));
    before += std::exp(logit);
  }
  double mass = 0;
  for (double w : weight) mass += w;
  each_setting([&] {
    for (double u : {0.0, 0.3, 0.77, 0.999}) {
      int32_t token = -1;
      RUN(mlxeff_sample(x.data(), dtype, V, temp, top_k, top_p, min_p, u, &token));
      CHECK(token >= 0 && token < V && weight[size_t(token)] > 0);
      double below = 0;
      for (int32_t id = 0; id < token; ++id) below += weight[size_t(id)];
      CHECK(below <= (u + 1e-5) * mass && below + weight[size_t(token)] >= (u - 1e-5) * mass);
    }
    int32_t coldest = -1;
    RUN(mlxeff_sample(x.data(), dtype, V, 0, 0, 0, 0, 0.5, &coldest));
    CHECK(coldest == order[0]);
  });
}

inline void check_rows() {
  int i = 0;
  for (int64_t n : {1, 5, 16, 37, 300, 1029})
    for (int64_t rows : {1, 7}) {
      const int dtype = all_dtypes[i % 3], other = all_dtypes[i / 2 % 3];
      if (i++ % shape_step != 0) continue;
      check_rms_norm(rows, n, dtype, other);
      check_swiglu(rows, n, dtype);
      check_softmax(rows, n, dtype, other);
    }
  check_swiglu(shape_step > 1 ? 30 : 300, 1000, MLXEFF_F32);
  for (int64_t V : {1, 63, 5000})
    for (int dtype : {MLXEFF_F32, MLXEFF_BF16}) {
      if (i++ % shape_step != 0) continue;
      check_sample(V, dtype, 1, 0, 0, 0);
      check_sample(V, dtype, 0.7f, 40, 0, 0);
      check_sample(V, dtype, 1.3f, 0, 0.9f, 0);
      check_sample(V, dtype, 0.9f, 50, 0.8f, 0.05f);
    }
}
