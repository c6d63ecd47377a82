// Checks of attention, its gradients, and of what is done to heads: their norm and the rotary embedding.
#pragma once
#include "checks.h"

struct AttentionCase {
  int64_t B, H, G, S, T, E, window;
};

// The plain loops, for one head at a time: weights (B, H, S, T) and the logarithms of their sums (B, H, S).
struct AttentionReference {
  AttentionCase c;
  std::vector<double> weights, lse;

  AttentionReference(const AttentionCase& c, const Matrix& q, HeadsView queries, const Matrix& k, HeadsView keys,
                     double scale)
      : c(c), weights(size_t(c.B * c.H * c.S * c.T), 0) {
    for (int64_t b = 0; b < c.B; ++b)
      for (int64_t h = 0; h < c.H; ++h)
        for (int64_t i = 0; i < c.S; ++i) {
          const int64_t end = c.T - c.S + i + 1, begin = c.window > 0 && end > c.window ? end - c.window : 0;
          double total = 0;
          for (int64_t t = begin; t < end; ++t) {
            double score = 0;
            for (int64_t e = 0; e < c.E; ++e)
              score += q.at(queries.row(b, h, i), e) * k.at(keys.row(b, h * c.G / c.H, t), e);
            total += at(b, h, i, t) = std::exp(score * scale);
          }
          for (int64_t t = begin; t < end; ++t) at(b, h, i, t) /= total;
          lse.push_back(std::log(total));
        }
  }
  double& at(int64_t b, int64_t h, int64_t i, int64_t t) {
    return weights[size_t(((b * c.H + h) * c.S + i) * c.T + t)];
  }
  double at(int64_t b, int64_t h, int64_t i, int64_t t) const {
    return const_cast<AttentionReference*>(this)->at(b, h, i, t);
  }
};

// A Matrix-shaped array of doubles, to sum into.
struct Sums {
  int64_t columns;
  std::vector<double> values;
  Sums(int64_t rows, int64_t columns) : columns(columns), values(size_t(rows * columns), 0) {}
  double& at(int64_t r, int64_t c) { return values[size_t(r * columns + c)]; }
};

inline void check_attention(const AttentionCase& c, int q_dtype, int kv_dtype, int out_dtype, bool by_token) {
  const HeadsView queries = {c.H, c.S, by_token}, keys = {c.G, c.T, by_token};
  const int64_t query_rows = c.B * c.H * c.S, key_rows = c.B * c.G * c.T;
  const Matrix q = Matrix::random(query_rows, c.E, q_dtype, 1, 2), dout = Matrix::random(query_rows, c.E, out_dtype, 1);
  const Matrix k = Matrix::random(key_rows, c.E, kv_dtype, 1, 2), v = Matrix::random(key_rows, c.E, kv_dtype, 1);
  const double scale = 1 / std::sqrt(double(c.E));
  AttentionReference reference(c, q, queries, k, keys, scale);
  Sums out(query_rows, c.E), dq(query_rows, c.E), dk(key_rows, c.E), dv(key_rows, c.E);
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t h = 0; h < c.H; ++h)
      for (int64_t i = 0; i < c.S; ++i) {
        const int64_t row = queries.row(b, h, i);
        std::vector<double> slope(size_t(c.T), 0);
        double mean = 0;
        for (int64_t t = 0; t < c.T; ++t) {
          const int64_t key = keys.row(b, h * c.G / c.H, t);
          const double weight = reference.at(b, h, i, t);
          for (int64_t e = 0; e < c.E; ++e) {
            out.at(row, e) += weight * v.at(key, e);
            dv.at(key, e) += weight * dout.at(row, e);
            slope[size_t(t)] += dout.at(row, e) * v.at(key, e);
          }
          mean += weight * slope[size_t(t)];
        }
        for (int64_t t = 0; t < c.T; ++t) {
          const int64_t key = keys.row(b, h * c.G / c.H, t);
          const double gradient = reference.at(b, h, i, t) * (slope[size_t(t)] - mean) * scale;
          for (int64_t e = 0; e < c.E; ++e)
            dq.at(row, e) += gradient * k.at(key, e), dk.at(key, e) += gradient * q.at(row, e);
        }
      }
  each_setting([&] {
    for (int mode : {MLXEFF_COMPUTE_BF16, MLXEFF_EXACT}) {
      Matrix got(query_rows, c.E, out_dtype, 1), lse(query_rows, 1);
      const mlxeff_attention_args args = {
          queries.of(q), keys.of(k), keys.of(v), queries.of(got), c.B,      c.H,  c.G,
          c.S,           c.T,        c.E,        float(scale),    c.window, mode, lse.floats()};
      RUN(mlxeff_attention(&args));
      got.check("attention", mode == MLXEFF_EXACT ? 1e-5 : 4e-2, [&](int64_t r, int64_t e) { return out.at(r, e); });
      lse.check("lse", mode == MLXEFF_EXACT ? 1e-5 : 4e-2,
                [&](int64_t r, int64_t) { return reference.lse[size_t(r)]; });
      if (mode != MLXEFF_EXACT) continue;
      Matrix got_dq(query_rows, c.E, q_dtype, 1), got_dk(key_rows, c.E, kv_dtype, 1),
          got_dv(key_rows, c.E, kv_dtype, 1);
      const mlxeff_heads dout_heads = queries.of(dout), dq_heads = queries.of(got_dq), dk_heads = keys.of(got_dk),
                         dv_heads = keys.of(got_dv);
      RUN(mlxeff_attention_backward(&args, &dout_heads, &dq_heads, &dk_heads, &dv_heads));
      // The forward result that enters the gradients was rounded to its dtype.
      const double tolerance = 3e-5 * std::sqrt(double(c.E)) + (out_dtype == MLXEFF_F32   ? 0
                                                                : out_dtype == MLXEFF_F16 ? 0x1p-9
                                                                                          : 0x1p-6);
      got_dq.check("dq", tolerance, [&](int64_t r, int64_t e) { return dq.at(r, e); });
      got_dk.check("dk", tolerance, [&](int64_t r, int64_t e) { return dk.at(r, e); });
      got_dv.check("dv", tolerance, [&](int64_t r, int64_t e) { return dv.at(r, e); });
    }
  });
}

inline void check_head_norm(int64_t B, int64_t H, int64_t S, int64_t E, int dtype, bool by_token) {
  const HeadsView view = {H, S, by_token};
  const Matrix x = Matrix::random(B * H * S, E, dtype, 1), weight = Matrix::random(1, E, dtype);
  const std::vector<double> inverse = inverse_rms(x, 1e-5);
  each_setting([&] {
    for (const Matrix* factors : {&weight, static_cast<const Matrix*>(nullptr)}) {
      Matrix y(B * H * S, E, dtype, 1);
      const mlxeff_heads from = view.of(x), to = view.of(y);
      RUN(mlxeff_head_norm(&from, &to, B, H, S, E, factors ? factors->data() : nullptr, dtype, 1e-5f));
      y.check("head_norm", 2e-6, [&](int64_t r, int64_t c) {
        return x.at(r, c) * inverse[size_t(r)] * (factors ? factors->at(0, c) : 1);
      });
    }
  });
}

inline void check_rope(int64_t B, int64_t H, int64_t S, int64_t E, int64_t rotated, int dtype, bool by_token) {
  const HeadsView view = {H, S, by_token};
  const int64_t half = rotated / 2, first = 1000;
  const Matrix x = Matrix::random(B * H * S, E, dtype, 1);
  std::vector<double> frequencies;
  for (int64_t j = 0; j < half; ++j) frequencies.push_back(std::pow(10000, -double(j) / double(half)));
  each_setting([&] {
    Matrix cosines(S, half), sines(S, half);
    RUN(mlxeff_rope_table(frequencies.data(), half, first, S, 1.5, cosines.floats(), sines.floats()));
    for (int inverse : {0, 1}) {
      Matrix y(B * H * S, E, dtype, 1);
      const mlxeff_heads from = view.of(x), to = view.of(y);
      RUN(mlxeff_rope(&from, &to, B, H, S, E, rotated, cosines.floats(), sines.floats(), inverse));
      y.check("rope", 1e-6, [&](int64_t r, int64_t e) {
        if (e >= rotated) return x.at(r, e);
        const int64_t token = by_token ? r / H % S : r % S, j = e % half;
        const double angle = double(first + token) * frequencies[size_t(j)] * (inverse ? -1 : 1);
        const double other = e < half ? -x.at(r, e + half) : x.at(r, e - half);
        return 1.5 * (x.at(r, e) * std::cos(angle) + other * std::sin(angle));
      });
    }
  });
}

inline void check_heads() {
  const AttentionCase cases[] = {{1, 1, 1, 1, 1, 1, 0},      {2, 4, 2, 1, 37, 64, 0},    {1, 9, 3, 1, 1100, 64, 0},
                                 {1, 4, 1, 3, 130, 80, 0},   {1, 6, 2, 23, 23, 96, 0},   {2, 2, 2, 70, 70, 36, 0},
                                 {1, 3, 1, 61, 200, 128, 0}, {1, 2, 1, 33, 90, 256, 20}, {1, 4, 2, 1, 300, 64, 100},
                                 {1, 2, 2, 200, 200, 8, 7},  {1, 5, 5, 13, 14, 3, 0},    {1, 6, 2, 8, 700, 64, 0},
                                 {2, 4, 1, 8, 130, 20, 50},  {1, 5, 1, 7, 300, 16, 0}};
  int i = 0;
  for (const AttentionCase& c : cases)
    for (int layout : {0, 1}) {
      if (i % shape_step == 0)
        check_attention(c, all_dtypes[i % 3], all_dtypes[i / 2 % 3], all_dtypes[i / 3 % 3], layout == 1);
      ++i;
    }
  for (int dtype : all_dtypes)
    for (int64_t E : {1, 7, 64, 129}) {
      check_head_norm(2, 3, 5, E, dtype, dtype == MLXEFF_F16);
      for (int64_t rotated : {E / 2 * 2, E / 4 * 2})
        if (rotated > 0) check_rope(2, 3, 5, E, rotated, dtype, dtype == MLXEFF_BF16);
    }
}
