// Checks of attention over planes of 4 bits: beside plain loops over the decoded numbers, with places that hold no
// tokens, and the bits of rows that are computed alone and by other numbers of threads.
#pragma once
#include <map>

#include "decoder_stores.h"
#include "plane_append.h"

// Random planes for T tokens of every head. Slots and tiles without tokens have scales of NaN.
inline PlaneArrays random_planes(const AttentionCase& c, const PlaneView& view) {
  PlaneArrays arrays(c.B * c.G, c.E, (c.T + 15) / 16 + 2, view);
  for (int64_t head = 0; head < arrays.heads; ++head)
    for (int64_t t = 0; t < 16 * arrays.tiles; ++t)
      for (const int kind : {0, 1}) {
        if (t < c.T) arrays.set_numbers(kind, head, t, 0.1f + 0.05f * uniform(), uniform() * 0.2f - 0.8f);
        else arrays.set_numbers(kind, head, t, NAN, NAN);
      }
  return arrays;
}

// The keys or values (B * G * T, E) of planes, rotated back.
inline Matrix decoded_planes(const PlaneArrays& arrays, int kind, int64_t tokens) {
  Matrix decoded(arrays.heads * tokens, arrays.size);
  for (int64_t row = 0; row < decoded.rows; ++row) {
    std::vector<double> numbers;
    for (int64_t e = 0; e < arrays.size; ++e) numbers.push_back(arrays.at(kind, row / tokens, row % tokens, e));
    numbers = hadamard(numbers);
    for (int64_t e = 0; e < arrays.size; ++e) decoded.set(row, e, float(numbers[size_t(e)]));
  }
  return decoded;
}

inline bool same_bits(const Matrix& a, int64_t row, const Matrix& b, int64_t other) {
  const size_t bytes = size_t(a.columns) * sizeof(float);
  return !std::memcmp(static_cast<const float*>(a.data()) + row * a.ld,
                      static_cast<const float*>(b.data()) + other * b.ld, bytes);
}
inline Matrix one_row(const Matrix& x, int64_t r) {
  Matrix row(1, x.columns);
  for (int64_t e = 0; e < x.columns; ++e) row.set(0, e, float(x.at(r, e)));
  return row;
}

inline void check_plane_attend(const AttentionCase& c, const PlaneView& view, float logits) {
  const mlxeff::AttentionSizes sizes = {c.H, c.G, c.E, c.window};
  const int64_t rows = c.B * c.S;
  PlaneArrays arrays = random_planes(c, view);
  const Matrix keys = decoded_planes(arrays, 0, c.T), values = decoded_planes(arrays, 1, c.T);
  const Matrix queries = Matrix::random(rows, c.H * c.E, MLXEFF_F32, 0, logits);
  const StoreReference want(c, queries, keys, values);
  const bool few = c.S * (c.H / c.G) <= 32;
  std::map<std::string, Matrix> first;  // of each level
  each_setting([&] {
    mlxeff::PlaneKv store(arrays.planes());
    CHECK(store.fits({c.B, c.S, c.T}) && !store.fits({c.B, c.S, 16 * arrays.tiles + 1}));
    Matrix attended(rows, c.H * c.E);
    run_attend(store, {c.B, c.S, c.T}, sizes, queries, attended);
    attended.check("planes attend", 2e-4 * std::max(1.0, double(logits)), want);
    if (!few) return;  // the dense kernels, for many rows, do not promise the bits
    const Matrix& before = first.emplace(mlxeff_isa(), attended).first->second;
    for (int64_t r = 0; r < rows; ++r) CHECK(same_bits(before, r, attended, r));
    if (c.B > 1) return;
    for (int64_t i = 0; i < c.S; ++i) {
      Matrix alone(1, c.H * c.E);
      run_attend(store, {1, 1, c.T - c.S + i + 1}, sizes, one_row(queries, i), alone);
      CHECK(same_bits(alone, 0, attended, i));
    }
  });
}

// Values that are equal give themselves, whatever their weights; equal weights give the mean.
inline void check_plane_sums(int64_t tokens, float logits) {
  const AttentionCase c = {1, 3, 1, 2, tokens, 64, 0};
  const mlxeff::AttentionSizes sizes = {c.H, c.G, c.E, 0};
  PlaneArrays arrays = random_planes(c, {0, 0, 0, logits != 0 ? 0 : 1});
  Matrix queries = Matrix::random(c.S, c.H * c.E, MLXEFF_F32, 0, logits);
  if (logits != 0)
    for (int64_t t = 0; t < tokens; ++t) {
      arrays.set_numbers(1, 0, t, 0.25f, -2);
      for (int64_t e = 0; e < c.E; ++e) arrays.set_code(1, 0, t, e, int(16 * (e % 16)) + 8);
    }
  const Matrix values = decoded_planes(arrays, 1, tokens);
  each_setting([&] {
    mlxeff::PlaneKv store(arrays.planes());
    Matrix attended(c.S, c.H * c.E);
    run_attend(store, {1, c.S, tokens}, sizes, queries, attended);
    attended.check("sums of planes", logits != 0 ? 5e-6 : 4e-5, [&](int64_t r, int64_t column) {
      const int64_t seen = tokens - c.S + r + 1;
      double total = 0;
      for (int64_t t = 0; t < seen; ++t) total += values.at(t, column % c.E);
      return total / double(seen);
    });
  });
}

// Many weights, each less than half a step of their integers beside a large one, add up.
inline void check_plane_small_weights() {
  const AttentionCase c = {1, 1, 1, 1, 512, 64, 0};
  const mlxeff::AttentionSizes sizes = {c.H, c.G, c.E, 0};
  PlaneArrays arrays = random_planes(c, {0, 0, 0, 0});
  for (int64_t t = 0; t < c.T; ++t) {
    arrays.set_numbers(1, 0, t, t ? 0.01f : 1000.0f, t ? 0.0f : -8000.0f);
    for (int64_t e = 0; e < c.E; ++e) arrays.set_code(1, 0, t, e, t ? 255 : 128);
  }
  const Matrix values = decoded_planes(arrays, 1, c.T);
  Matrix queries(1, c.E);
  for (int64_t e = 0; e < c.E; ++e) queries.set(0, e, 0);
  each_setting([&] {
    mlxeff::PlaneKv store(arrays.planes());
    Matrix attended(1, c.E);
    run_attend(store, {1, 1, c.T}, sizes, queries, attended);
    attended.check("small weights", 0.05, [&](int64_t, int64_t e) {
      double total = 0;
      for (int64_t t = 0; t < c.T; ++t) total += values.at(t, e);
      return total / double(c.T);
    });
  });
}

// What is not finite in a number that a row sees makes the row NaN, and leaves the other rows as they were.
inline void check_plane_poison(const PlaneView& view) {
  const AttentionCase c = {1, 6, 2, 3, 530, 80, 0};
  const mlxeff::AttentionSizes sizes = {c.H, c.G, c.E, 0};
  PlaneArrays arrays = random_planes(c, view);
  const Matrix queries = Matrix::random(c.S, c.H * c.E, MLXEFF_F32, 0, 3);
  each_setting([&] {
    mlxeff::PlaneKv store(arrays.planes());
    const mlxeff::Span span = {1, c.S, c.T};
    Matrix clean(c.S, c.H * c.E);
    run_attend(store, span, sizes, queries, clean);
    const auto expect = [&](const Matrix& got, int64_t first_row, int64_t first_head, int64_t heads) {
      for (int64_t r = 0; r < c.S; ++r)
        for (int64_t column = 0; column < c.H * c.E; ++column) {
          const int64_t head = column / c.E;
          const bool poisoned = r >= first_row && head >= first_head && head < first_head + heads;
          CHECK(poisoned ? std::isnan(got.at(r, column)) : got.at(r, column) == clean.at(r, column));
        }
    };
    for (const int kind : {0, 1})
      for (const int which : {0, 1})
        for (const float number : {NAN, INFINITY, -INFINITY}) {
          mlxeff::f16* const at = arrays.number(kind, which, 1, c.T - 2);
          const mlxeff::f16 held = *at;
          mlxeff::from_float(number, at);
          Matrix got(c.S, c.H * c.E);
          run_attend(store, span, sizes, queries, got);
          *at = held;
          expect(got, 1, 3, 3);
        }
    for (const float number : {NAN, INFINITY}) {
      Matrix broken = queries, got(c.S, c.H * c.E);
      broken.set(2, 4 * c.E + 7, number);
      run_attend(store, span, sizes, broken, got);
      expect(got, 2, 4, 1);
    }
  });
}

inline void check_plane_stores() {
  check_plane_appends();
  int i = 0;
  for (const int64_t tokens : {1, 15, 16, 17, 511, 512, 513, 1100})
    for (const int64_t size : {64, 80, 96, 128}) {
      if (++i % shape_step) continue;
      const int64_t repeats[] = {1, 3, 4, 8}, windows[] = {0, 0, 5, 0, 100, 0, 600}, tiles = (tokens + 15) / 16;
      const int64_t R = repeats[(i + i / 4) % 4], G = 1 + i % 2,
                    M = std::min<int64_t>(tokens, 1 + i % (R == 8 ? 4 : 8));
      const PlaneView views[] = {{0, 0, 0, 0},
                                 {0, 0, tiles / 2, tiles / 2},
                                 {tiles / 2, tiles / 2, tiles / 2, tiles / 2},
                                 {0, tiles + 2, 0, tiles + 2},
                                 {1, 0, 3, 5}};
      const AttentionCase c = {1 + i % 3 / 2, R * G, G, M, tokens, size, windows[i % 7]};
      check_plane_attend(c, views[i % 5], i % 4 ? 2.0f : 40.0f);
      if (tokens > 16)
        check_plane_attend({1, R * G, G, std::min<int64_t>(tokens, 45), tokens, size, windows[i % 7]},
                           views[(i + 2) % 5], 2);
    }
  check_plane_attend({1, 3, 1, 8, 72, 64, 40}, {0, 0, 0, 0}, 2);  // the rows' windows begin in tiles 1 and 2
  check_plane_small_weights();
  for (const int64_t tokens : {2, 16, 700}) {
    check_plane_sums(tokens, 0);
    check_plane_sums(tokens, 20);
  }
  for (const PlaneView& view : {PlaneView{0, 0, 0, 0}, {0, 0, 40, 40}}) check_plane_poison(view);
}
