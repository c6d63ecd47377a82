// Checks of the store of 4-bit planes: attention beside plain loops over the decoded numbers, places that hold no
// tokens, and the bits of a row that is computed alone.
#pragma once
#include <cstring>

#include "decoder_stores.h"
#include "kv/plane_kv.h"

// The planes of the heads of a store, with random codes, scales and zeros.
struct TestPlanes {
  mlxeff::PlaneArgs args = {};
  std::vector<uint8_t> upper, lower;

  TestPlanes(const mlxeff::AttentionSizes& sizes, int64_t heads, int64_t capacity, int64_t filled, bool full_keys,
             bool full_values) {
    args.sizes = sizes;
    args.block = 32, args.capacity = capacity, args.blocks = filled;
    args.lower_keys = full_keys, args.lower_values = full_values;
    upper.resize(size_t(heads * capacity * args.upper_bytes()));
    lower.resize(size_t(heads * capacity * args.lower_bytes()));
    for (uint8_t& byte : upper) byte = uint8_t(int((uniform() + 1) * 128));
    for (uint8_t& byte : lower) byte = uint8_t(int((uniform() + 1) * 128));
    args.upper = upper.data();
    args.lower = lower.empty() ? nullptr : lower.data();
    for (int64_t place = 0; place < heads * capacity; ++place) {
      const bool stale = place % capacity >= filled;  // holds no tokens
      set_scales(mlxeff::key_plane(args, place), sizes.size, stale);
      set_scales(mlxeff::value_plane(args, place), args.block, stale);
    }
  }
  static void set_scales(const mlxeff::Plane& plane, int64_t groups, bool stale) {
    for (int64_t i = 0; i < groups; ++i) {
      mlxeff::from_float(stale ? NAN : 0.1f + 0.05f * uniform(), const_cast<mlxeff::f16*>(plane.scale) + i);
      mlxeff::from_float(stale ? NAN : uniform() - 0.8f, const_cast<mlxeff::f16*>(plane.zero) + i);
    }
  }
  static double decode(const mlxeff::Plane& plane, int64_t group, int64_t count, int64_t i) {
    const auto half = [&](const uint8_t* bytes) {
      const int byte = bytes[(group * count + i) / 2];
      return i % 2 ? byte >> 4 : byte & 15;
    };
    const double s = mlxeff::to_float(plane.scale[group]), z = mlxeff::to_float(plane.zero[group]);
    return plane.lower ? (16 * half(plane.upper) + half(plane.lower)) * s / 16 + z
                       : (half(plane.upper) + 7.5 / 16) * s + z;
  }
  // Channel e of the key, or of the value, of token t.
  double at(bool value, int64_t head, int64_t t, int64_t e) const {
    const int64_t place = head * args.capacity + t / args.block;
    return value ? decode(mlxeff::value_plane(args, place), t % args.block, args.width(), e)
                 : decode(mlxeff::key_plane(args, place), e, args.block, t % args.block);
  }
};

// `filled` of `capacity` blocks of 32 tokens hold tokens, the others are in the tail.
inline void check_plane_kv(const AttentionCase& c, int64_t filled, bool full_keys, bool full_values) {
  const int64_t block = 32, stored = filled * block;
  const int64_t room = c.T - stored + 3, heads = c.B * c.G, rows = c.B * c.S;
  const mlxeff::AttentionSizes sizes = {c.H, c.G, c.E, c.window};
  const TestPlanes planes(sizes, heads, filled + 2, filled, full_keys, full_values);
  Matrix tail = Matrix::random(2 * heads * room, c.E, MLXEFF_F16);  // stale places are NaN
  for (int64_t head = 0; head < 2 * heads; ++head)
    for (int64_t t = c.T - stored; t < room; ++t)
      for (int64_t e = 0; e < c.E; ++e) tail.set(head * room + t, e, NAN);
  Matrix seen[] = {Matrix(heads * c.T, c.E), Matrix(heads * c.T, c.E)};
  for (int kind = 0; kind < 2; ++kind)
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t t = 0; t < c.T; ++t)
        for (int64_t e = 0; e < c.E; ++e)
          seen[kind].set(head * c.T + t, e,
                         t < stored ? float(planes.at(kind == 1, head, t, e))
                                    : float(tail.at((kind * heads + head) * room + t - stored, e)));
  // Large scores in some cases: there a single token of a block dominates, in others the many of the tail.
  Matrix queries = Matrix::random(rows, c.H * c.E);
  for (int64_t r = 0; r < rows && filled % 2; ++r)
    for (int64_t e = 0; e < c.H * c.E; ++e) queries.set(r, e, 8 * float(queries.at(r, e)));
  const StoreReference want(c, queries, seen[0], seen[1]);
  each_setting([&] {
    mlxeff::PlaneKv store(planes.args, static_cast<mlxeff::f16*>(tail.data()), room);
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
