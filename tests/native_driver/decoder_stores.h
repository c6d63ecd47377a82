// Checks of the dense store of keys and values, called as a pass calls it, on every member of a team.
#pragma once
#include "attention.h"
#include "kv/dense_kv.h"

// What attention over the keys and values (B, G, T) of a store gives, for queries (B, S, H, E).
class StoreReference {
 public:
  StoreReference(const AttentionCase& c, const Matrix& queries, const Matrix& keys, const Matrix& values)
      : c_(c), values_(values),
        reference_(c, by_head(c, queries), {c.H, c.S, true}, keys, {c.G, c.T, false}, 1 / std::sqrt(double(c.E))) {}

  // The element in a column of row r, which has all heads.
  double operator()(int64_t r, int64_t column) const {
    const int64_t b = r / c_.S, i = r % c_.S, h = column / c_.E;
    double sum = 0;
    for (int64_t t = 0; t < c_.T; ++t)
      sum += reference_.at(b, h, i, t) * values_.at((b * c_.G + h * c_.G / c_.H) * c_.T + t, column % c_.E);
    return sum;
  }

 private:
  static Matrix by_head(const AttentionCase& c, const Matrix& queries) {
    Matrix rows(c.B * c.S * c.H, c.E);
    for (int64_t r = 0; r < rows.rows; ++r)
      for (int64_t e = 0; e < c.E; ++e) rows.set(r, e, float(queries.at(r / c.H, r % c.H * c.E + e)));
    return rows;
  }
  const AttentionCase c_;
  const Matrix& values_;
  AttentionReference reference_;
};

// Rows are stored at their positions, keys rotated; attention then sees what was there and what is new.
inline void check_dense_kv(const AttentionCase& c, int dtype) {
  const int64_t half = c.E / 2, capacity = c.T + 3, offset = c.T - c.S, rows = c.B * c.S;
  const Matrix held[] = {Matrix::random(c.B * c.G * capacity, c.E, dtype),
                         Matrix::random(c.B * c.G * capacity, c.E, dtype)};
  const Matrix keys = Matrix::random(rows, c.G * c.E), values = Matrix::random(rows, c.G * c.E);
  Matrix queries = Matrix::random(rows, c.H * c.E, MLXEFF_F32, 0, 2);
  const mlxeff::Span span = {c.B, c.S, c.T};
  const mlxeff::AttentionSizes sizes = {c.H, c.G, c.E, c.window};
  Matrix cosines(c.S, half), sines(c.S, half);
  for (int64_t t = 0; t < c.S; ++t)
    for (int64_t i = 0; i < half; ++i) {
      cosines.set(t, i, float(std::cos(double(offset + t) / double(i + 1))));
      sines.set(t, i, float(std::sin(double(offset + t) / double(i + 1))));
    }
  const auto turned = [&](int64_t r, int64_t g, int64_t e) {
    const int64_t t = r % c.S, i = e % half;
    const double other = keys.at(r, g * c.E + (e < half ? e + half : e - half));
    return keys.at(r, g * c.E + e) * cosines.at(t, i) + (e < half ? -other : other) * sines.at(t, i);
  };
  each_setting([&] {
    std::vector<Matrix> stored(held, held + 2);
    mlxeff::DenseKv store(stored[0].data(), stored[1].data(), capacity, dtype);
    CHECK(store.fits(span) && !store.fits({c.B, c.S, capacity + 1}));
    std::vector<int> finished(size_t(rows), 0);
    const auto finish = [&](int64_t r) -> mlxeff::NewRow {
      ++finished[size_t(r)];
      const auto row = [&](const Matrix& x) { return static_cast<const float*>(x.data()) + r * c.G * c.E; };
      return {row(keys), c.E, row(values), c.E};
    };
    const mlxeff::NewRows fresh = {span, sizes, cosines.floats(), sines.floats(), &finish};
    Matrix attended(rows, c.H * c.E), last(c.B, c.H * c.E), last_queries(c.B, c.H * c.E);
    for (int64_t b = 0; b < c.B; ++b)
      for (int64_t i = 0; i < c.H * c.E; ++i) last_queries.set(b, i, float(queries.at((b + 1) * c.S - 1, i)));
    const mlxeff::Span last_span = {c.B, 1, c.T};
    const mlxeff::RunOptions options;
    int64_t bytes = 0;
    for (int threads = 1; threads <= mlxeff_num_threads(); ++threads)
      for (const mlxeff::Span& each : {span, last_span})
        bytes = std::max(bytes, store.workspace_bytes(each, sizes, options, threads));
    Workspace workspace(bytes);
    std::atomic<int> error{MLXEFF_OK};
    mlxeff::team_run([&](mlxeff::Team& team) {
      const auto run = [&](int code) {
        if (code != MLXEFF_OK) error = code;
      };
      run(store.append(team, fresh, options, workspace.data()));
      run(store.attend(team, {span, sizes, queries.floats(), attended.floats()}, options, workspace.data()));
      run(store.attend(team, {last_span, sizes, last_queries.floats(), last.floats()}, options, workspace.data()));
    });
    CHECK(error == MLXEFF_OK);
    for (const int count : finished) CHECK(count == 1);
    for (int kind = 0; kind < 2; ++kind)
      stored[size_t(kind)].check(kind ? "stored values" : "stored keys", 1e-6, [&](int64_t row, int64_t e) {
        const int64_t t = row % capacity - offset, g = row / capacity % c.G, r = row / capacity / c.G * c.S + t;
        if (t < 0 || t >= c.S) return held[kind].at(row, e);
        return kind ? values.at(r, g * c.E + e) : turned(r, g, e);
      });
    // The rows (b, g, t) of the buffers, as the reference reads them.
    std::vector<Matrix> seen;
    for (const Matrix& buffer : stored) {
      seen.emplace_back(c.B * c.G * c.T, c.E);
      for (int64_t row = 0; row < c.B * c.G * c.T; ++row)
        for (int64_t e = 0; e < c.E; ++e)
          seen.back().set(row, e, float(buffer.at(row / c.T * capacity + row % c.T, e)));
    }
    const StoreReference want(c, queries, seen[0], seen[1]);
    attended.check("store attends", 1e-5, want);
    last.check("store attends for the last tokens", 1e-5,
               [&](int64_t b, int64_t column) { return want((b + 1) * c.S - 1, column); });
  });
}

inline void check_kv_stores() {
  const AttentionCase cases[] = {
      {1, 3, 1, 1, 1, 16, 0}, {2, 4, 2, 5, 5, 12, 0}, {2, 6, 2, 8, 600, 16, 0}, {1, 2, 2, 40, 90, 16, 7}};
  for (const AttentionCase& c : cases)
    for (const int dtype : all_dtypes) check_dense_kv(c, dtype);
}
