// Checks of the store of 4-bit planes: attention beside plain loops over the decoded numbers, places that hold no
// tokens, and the bits of a row that is computed alone.
#pragma once
#include <cstring>

#include "attention.h"
#include "kv/plane_kv.h"

// The planes of keys or of values: `groups` groups of `count` codes each, one after the other.
struct TestPlane {
  std::vector<uint8_t> upper, lower;
  std::vector<mlxeff::f16> scale, zero;
  int64_t count;

  TestPlane(int64_t groups, int64_t count)
      : upper(size_t(groups * count / 2)), lower(upper.size()), scale(size_t(groups)), zero(size_t(groups)),
        count(count) {
    for (uint8_t& byte : upper) byte = uint8_t(int((uniform() + 1) * 128));
    for (uint8_t& byte : lower) byte = uint8_t(int((uniform() + 1) * 128));
    for (mlxeff::f16& each : scale) mlxeff::from_float(0.1f + 0.05f * uniform(), &each);
    for (mlxeff::f16& each : zero) mlxeff::from_float(uniform() - 0.8f, &each);
  }
  mlxeff::Plane plane(bool full) const {
    return {upper.data(), full ? lower.data() : nullptr, scale.data(), zero.data()};
  }
  double at(int64_t group, int64_t i, bool full) const {
    const auto half = [&](const std::vector<uint8_t>& bytes) {
      const int byte = bytes[size_t((group * count + i) / 2)];
      return i % 2 ? byte >> 4 : byte & 15;
    };
    const double s = mlxeff::to_float(scale[size_t(group)]), z = mlxeff::to_float(zero[size_t(group)]);
    return full ? (16 * half(upper) + half(lower)) * s / 16 + z : (half(upper) + 7.5 / 16) * s + z;
  }
  void poison(int64_t first, int64_t last) {  // groups that hold no tokens
    for (int64_t group = first; group < last; ++group)
      mlxeff::from_float(NAN, &scale[size_t(group)]), mlxeff::from_float(NAN, &zero[size_t(group)]);
  }
};

// `filled` of `capacity` blocks of 32 tokens hold tokens, the others are in the tail.
inline void check_plane_kv(const AttentionCase& c, int64_t filled, bool full_keys, bool full_values) {
  const int64_t block = 32, capacity = filled + 2, width = mlxeff::round_up(c.E, 32), stored = filled * block;
  const int64_t room = c.T - stored + 3, heads = c.B * c.G, rows = c.B * c.S;
  TestPlane keys(heads * capacity * c.E, block), values(heads * capacity * block, width);
  for (int64_t head = 0; head < heads; ++head) {
    keys.poison((head * capacity + filled) * c.E, (head + 1) * capacity * c.E);
    values.poison((head * capacity + filled) * block, (head + 1) * capacity * block);
  }
  Matrix tail[] = {Matrix::random(heads * room, c.E, MLXEFF_F16), Matrix::random(heads * room, c.E, MLXEFF_F16)};
  for (Matrix& part : tail)
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t t = c.T - stored; t < room; ++t)
        for (int64_t e = 0; e < c.E; ++e) part.set(head * room + t, e, NAN);
  const mlxeff::AttentionSizes sizes = {c.H, c.G, c.E, c.window};
  Matrix seen[] = {Matrix(heads * c.T, c.E), Matrix(heads * c.T, c.E)};
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t e = 0; e < c.E; ++e) {
        const int64_t place = head * capacity + t / block;
        const bool old = t < stored;
        seen[0].set(head * c.T + t, e,
                    old ? float(keys.at(place * c.E + e, t % block, full_keys))
                        : float(tail[0].at(head * room + t - stored, e)));
        seen[1].set(head * c.T + t, e,
                    old ? float(values.at(place * block + t % block, e, full_values))
                        : float(tail[1].at(head * room + t - stored, e)));
      }
  // Large scores in some cases: there a single token of a block dominates, in others the many of the tail.
  Matrix queries = Matrix::random(rows, c.H * c.E);
  for (int64_t r = 0; r < rows && filled % 2; ++r)
    for (int64_t e = 0; e < c.H * c.E; ++e) queries.set(r, e, 8 * float(queries.at(r, e)));
  Matrix by_head(rows * c.H, c.E);
  for (int64_t r = 0; r < rows * c.H; ++r)
    for (int64_t e = 0; e < c.E; ++e) by_head.set(r, e, float(queries.at(r / c.H, r % c.H * c.E + e)));
  AttentionReference reference(c, by_head, {c.H, c.S, true}, seen[0], {c.G, c.T, false}, 1 / std::sqrt(double(c.E)));
  const auto want = [&](int64_t r, int64_t column) {
    const int64_t b = r / c.S, i = r % c.S, h = column / c.E;
    double sum = 0;
    for (int64_t t = 0; t < c.T; ++t)
      sum += reference.at(b, h, i, t) * seen[1].at((b * c.G + h * c.G / c.H) * c.T + t, column % c.E);
    return sum;
  };
  each_setting([&] {
    mlxeff::PlaneArgs planes = {};
    planes.keys = keys.plane(full_keys);
    planes.values = values.plane(full_values);
    planes.block = block, planes.capacity = capacity, planes.blocks = filled, planes.width = width;
    const auto half = [&](int i) { return static_cast<mlxeff::f16*>(tail[i].data()); };
    mlxeff::PlaneKv store(planes, half(0), half(1), room);
    CHECK(store.fits({c.B, c.S, c.T}) && !store.fits({c.B, c.S, stored + room + 1}));
    const mlxeff::RunOptions options;
    const auto attend = [&](const mlxeff::Span& span, Matrix& from, Matrix& to) {
      int64_t bytes = 0;
      for (int threads = 1; threads <= mlxeff_num_threads(); ++threads)
        bytes = std::max(bytes, store.workspace_bytes(span, sizes, options, threads));
      Workspace workspace(bytes);
      std::atomic<int> error{MLXEFF_OK};
      mlxeff::team_run([&](mlxeff::Team& team) {
        const int code = store.attend(team, {span, sizes, from.floats(), to.floats()}, options, workspace.data());
        if (code != MLXEFF_OK) error = code;
      });
      CHECK(error == MLXEFF_OK);
    };
    Matrix attended(rows, c.H * c.E);
    attend({c.B, c.S, c.T}, queries, attended);
    attended.check("planes attend", 1e-5, want);
    // The dense kernels, for tokens in the tail alone and for many rows, do not promise this.
    if (filled == 0 || c.S * (c.H / c.G) > 32) return;
    for (int64_t i = 0; i < c.S; ++i) {
      Matrix one(c.B, c.H * c.E), alone(c.B, c.H * c.E);
      for (int64_t b = 0; b < c.B; ++b)
        for (int64_t e = 0; e < c.H * c.E; ++e) one.set(b, e, float(queries.at(b * c.S + i, e)));
      attend({c.B, 1, c.T - c.S + i + 1}, one, alone);
      for (int64_t b = 0; b < c.B; ++b)
        CHECK(!std::memcmp(alone.floats() + b * c.H * c.E, attended.floats() + (b * c.S + i) * c.H * c.E,
                           size_t(c.H * c.E) * sizeof(float)));
    }
  });
}

inline void check_plane_stores() {
  const struct {
    AttentionCase shape;
    int64_t filled;
  } cases[] = {{{1, 3, 1, 1, 40, 64, 0}, 1},    {{2, 6, 2, 5, 700, 16, 0}, 20},    {{1, 4, 4, 2, 75, 80, 0}, 2},
               {{1, 8, 1, 8, 140, 96, 0}, 3},   {{1, 2, 2, 1, 600, 128, 100}, 17}, {{1, 2, 1, 3, 130, 32, 50}, 3},
               {{1, 2, 2, 40, 100, 48, 30}, 1}, {{2, 2, 1, 40, 90, 16, 0}, 1},     {{1, 2, 1, 4, 20, 16, 0}, 0}};
  for (const auto& each : cases)
    for (int kind = 0; kind < 3; ++kind) check_plane_kv(each.shape, each.filled, kind > 0, kind > 1);
}
