// Checks of the encoding of new tokens in planes of 4 bits: every byte of the arrays.
#pragma once
#include "plane_arrays.h"

// The codes, scale and zero of a group, in single precision as the definition says.
struct PlaneGroup {
  std::vector<int> codes;
  float scale, zero;
  bool finite;

  PlaneGroup(const float* row, int64_t size) : codes(size_t(size), 0), finite(true) {
    std::vector<float> x(row, row + size);
    const int64_t block = size & -size;
    for (int64_t step = 1; step < block; step *= 2)
      for (int64_t i = 0; i < size; ++i)
        if (!(i & step)) {
          const float a = x[size_t(i)], b = x[size_t(i + step)];
          x[size_t(i)] = a + b, x[size_t(i + step)] = a - b;
        }
    const float factor = 1.0f / std::sqrt(float(block));
    for (float& number : x) {
      number *= factor;
      finite = finite && std::isfinite(number);
    }
    if (!finite) return;
    const float low = *std::min_element(x.begin(), x.end()), high = *std::max_element(x.begin(), x.end());
    mlxeff::f16 half[2];
    mlxeff::from_float((high - low) * (16.0f / 255.0f), half);
    mlxeff::from_float(low, half + 1);
    scale = mlxeff::to_float(half[0]), zero = mlxeff::to_float(half[1]);
    const float width = scale / 16;
    for (size_t e = 0; e < x.size() && width > 0; ++e) {
      const float code = std::nearbyint((x[e] - zero) / width);
      if (code > 0) codes[e] = int(std::min(code, 255.0f));  // NaN gives 0
    }
  }
};

inline void check_plane_append(const AttentionCase& c, const PlaneView& view) {
  const int64_t half = c.E / 2, rows = c.B * c.S, offset = c.T - c.S, tiles = (c.T + 15) / 16 + 1;
  Matrix keys = Matrix::random(rows, c.G * c.E), values = Matrix::random(rows, c.G * c.E, MLXEFF_F32, 0, 3);
  for (int64_t r = 1; r < rows; ++r) {  // groups that are special in the one way or the other
    const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, 7e4f, 1e-30f};
    if (r % 3 == 0) values.set(r, r % c.E, odd[r / 3 % 6]);
    if (r % 7 == 0) keys.set(r, r % (c.G * c.E), odd[r / 7 % 6]);
    for (int64_t e = 0; e < c.E && r % 5 == 0; ++e) values.set(r, e, r % 2 ? 0.0f : 1e-6f * float(e));
  }
  Matrix cosines = Matrix::random(c.S, half), sines = Matrix::random(c.S, half);
  const mlxeff::AttentionSizes sizes = {c.H, c.G, c.E, c.window};
  const PlaneArrays before(c.B * c.G, c.E, tiles, view);
  each_setting([&] {
    const auto append = [&](PlaneArrays& arrays, int64_t begin, int64_t length) {
      mlxeff::PlaneKv store(arrays.planes());
      const mlxeff::Span span = {c.B, length, offset + begin + length};
      CHECK(store.fits(span) && !store.fits({c.B, 1, 16 * tiles + 1}));
      std::vector<int> finished(size_t(c.B * length), 0);
      const auto finish = [&](int64_t r) -> mlxeff::NewRow {
        ++finished[size_t(r)];
        const int64_t from = r / length * c.S + begin + r % length;
        return {keys.floats() + from * c.G * c.E, c.E, values.floats() + from * c.G * c.E, c.E};
      };
      const mlxeff::NewRows fresh = {span, sizes, cosines.floats() + begin * half, sines.floats() + begin * half,
                                     &finish};
      run_store(store, span, sizes, [&](mlxeff::Team& team, const mlxeff::RunOptions& options, void* workspace) {
        return store.append(team, fresh, options, workspace);
      });
      for (const int count : finished) CHECK(count == 1);
    };
    PlaneArrays got = before, single = before, want = before;
    append(got, 0, c.S);
    for (int64_t i = 0; i < c.S; ++i) append(single, i, 1);
    CHECK(got == single);

    const auto finish = [&](int64_t) -> mlxeff::NewRow { return {}; };
    const mlxeff::NewRows fresh = {{c.B, c.S, c.T}, sizes, cosines.floats(), sines.floats(), &finish};
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<float> turned(size_t(c.G * c.E));
      fresh.rotate(r, {keys.floats() + r * c.G * c.E, c.E, nullptr, 0}, {turned.data(), 0, c.E, 0, MLXEFF_F32});
      for (int64_t g = 0; g < c.G; ++g)
        for (const int kind : {0, 1}) {
          const int64_t head = r / c.S * c.G + g, token = offset + r % c.S;
          const float* const row = (kind ? values.floats() + r * c.G * c.E : turned.data()) + g * c.E;
          const PlaneGroup group(row, c.E);
          for (int64_t e = 0; e < c.E; ++e) want.set_code(kind, head, token, e, group.codes[size_t(e)]);
          want.set_numbers(kind, head, token, group.scale, group.zero);
          if (!group.finite) {
            CHECK(!std::isfinite(got.number_of(kind, 0, head, token)));
            for (const int which : {0, 1})
              *want.number(kind, which, head, token) = *got.number(kind, which, head, token);
            continue;
          }
          if (!std::isfinite(group.scale) || !std::isfinite(group.zero) || !got.has_lower(kind, token)) continue;
          // What is read back is near what was given.
          const std::vector<double> exact = hadamard(std::vector<float>(row, row + c.E));
          double largest = 0;
          for (const double x : exact) largest = std::max(largest, std::fabs(x));
          for (int64_t e = 0; e < c.E; ++e) {
            const int code = 16 * got.half(kind, false, head, token, e) + got.half(kind, true, head, token, e);
            const double number = code * double(group.scale) / 16 + double(group.zero);
            CHECK(std::fabs(number - exact[size_t(e)]) <= double(group.scale) / 16 * 0.51 + largest * 0x1p-9 + 1e-6);
          }
        }
    }
    CHECK(got == want);
  });
}

inline void check_plane_appends() {
  const AttentionCase cases[] = {{1, 3, 1, 1, 1, 64, 0},   {2, 3, 3, 1, 29, 80, 0},  {1, 2, 2, 40, 57, 96, 0},
                                 {2, 2, 2, 33, 33, 64, 0}, {1, 4, 1, 5, 20, 128, 0}, {2, 2, 1, 17, 48, 16, 0}};
  for (const AttentionCase& c : cases)
    for (const PlaneView& view : {PlaneView{0, 0, 0, 0}, {1, 0, 1, 2}, {2, 9, 3, 9}}) check_plane_append(c, view);
}
