// The arrays of a store in planes of 4 bits as the tests see them: from the definition of the layout alone.
#pragma once
#include <cstring>

#include "checks.h"
#include "kv/plane_kv.h"

// Which tiles have lower halves, and which of them are read.
struct PlaneView {
  int64_t first_keys, first_values, coarse_keys, coarse_values;
};

// The Hadamard transform of blocks, by its definition.
template <class Number>
std::vector<double> hadamard(const std::vector<Number>& x) {
  const size_t size = x.size(), block = size & -size;
  std::vector<double> result(size, 0.0);
  for (size_t i = 0; i < size; ++i)
    for (size_t j = i / block * block; j < (i / block + 1) * block; ++j) {
      bool odd = false;
      for (size_t both = i & j & (block - 1); both; both &= both - 1) odd = !odd;
      result[i] += (odd ? -1 : 1) * double(x[j]) / std::sqrt(double(block));
    }
  return result;
}

// Keys (kind 0) and values (kind 1) of `heads` heads, with room for `tiles` tiles.
class PlaneArrays {
 public:
  const int64_t heads, size, tiles;
  const PlaneView view;
  std::vector<uint8_t> upper, lower[2];

  PlaneArrays(int64_t heads, int64_t size, int64_t tiles, const PlaneView& view)
      : heads(heads), size(size), tiles(tiles), view(view), upper(size_t(heads * tiles * (16 * size + 128))) {
    for (const int kind : {0, 1}) lower[kind].resize(size_t(heads * lower_tiles(kind) * 8 * size));
    for (std::vector<uint8_t>* bytes : {&upper, &lower[0], &lower[1]})
      for (uint8_t& byte : *bytes) byte = uint8_t(int((uniform() + 1) * 128));
  }
  mlxeff::Planes planes() {
    return {upper.data(),     lower[0].data(),   lower[1].data(), tiles,
            lower_tiles(0),   lower_tiles(1),    view.first_keys, view.first_values,
            view.coarse_keys, view.coarse_values};
  }
  bool operator==(const PlaneArrays& other) const {
    return upper == other.upper && lower[0] == other.lower[0] && lower[1] == other.lower[1];
  }

  bool has_lower(int kind, int64_t token) const { return token / 16 >= first(kind); }
  // Scale 0 or zero 1 of a group.
  mlxeff::f16* number(int kind, int which, int64_t head, int64_t token) {
    return reinterpret_cast<mlxeff::f16*>(tile_of(head, token)) + (2 * kind + which) * 16 + token % 16;
  }
  double number_of(int kind, int which, int64_t head, int64_t token) const {
    return mlxeff::to_float(*const_cast<PlaneArrays*>(this)->number(kind, which, head, token));
  }
  void set_numbers(int kind, int64_t head, int64_t token, float scale, float zero) {
    mlxeff::from_float(scale, number(kind, 0, head, token));
    mlxeff::from_float(zero, number(kind, 1, head, token));
  }
  int half(int kind, bool low, int64_t head, int64_t token, int64_t e) const {
    const Half at = const_cast<PlaneArrays*>(this)->place(kind, low, head, token, e);
    return *at.byte >> at.shift & 15;
  }
  void set_code(int kind, int64_t head, int64_t token, int64_t e, int code) {
    for (const bool low : {false, true}) {
      if (low && !has_lower(kind, token)) continue;
      const Half at = place(kind, low, head, token, e);
      *at.byte = uint8_t((*at.byte & ~(15 << at.shift)) | (low ? code & 15 : code >> 4) << at.shift);
    }
  }
  // The rotated number that a reader of this view sees.
  double at(int kind, int64_t head, int64_t token, int64_t e) const {
    const bool coarse = token / 16 < (kind ? view.coarse_values : view.coarse_keys);
    const double low = coarse ? 7.5 : half(kind, true, head, token, e);
    return (16 * half(kind, false, head, token, e) + low) * number_of(kind, 0, head, token) / 16 +
           number_of(kind, 1, head, token);
  }

 private:
  struct Half {
    uint8_t* byte;
    int shift;
  };
  int64_t first(int kind) const { return kind ? view.first_values : view.first_keys; }
  int64_t lower_tiles(int kind) const { return std::max<int64_t>(tiles - first(kind), 0); }
  uint8_t* tile_of(int64_t head, int64_t token) {
    return upper.data() + (head * tiles + token / 16) * (16 * size + 128);
  }
  Half place(int kind, bool low, int64_t head, int64_t token, int64_t e) {
    const int64_t t = token % 16;
    uint8_t* const plane = low ? lower[kind].data() + (head * lower_tiles(kind) + token / 16 - first(kind)) * 8 * size
                               : tile_of(head, token) + 128 + kind * 8 * size;
    if (kind == 0) return {plane + (e / 8 * 16 + t) * 4 + e % 4, e / 4 % 2 ? 4 : 0};
    return {plane + (t / 8 * size + e) * 4 + t % 4, t / 4 % 2 ? 4 : 0};
  }
};

// Runs one call of a store on every member of a team.
template <class Call>
void run_store(mlxeff::KvStore& store, const mlxeff::Span& span, const mlxeff::AttentionSizes& sizes, Call call) {
  const mlxeff::RunOptions options;
  int64_t bytes = 0;
  for (int threads = 1; threads <= mlxeff_num_threads(); ++threads)
    bytes = std::max(bytes, store.workspace_bytes(span, sizes, options, threads));
  Workspace workspace(bytes);
  std::atomic<int> error{MLXEFF_OK};
  mlxeff::team_run([&](mlxeff::Team& team) {
    const int code = call(team, options, workspace.data());
    if (code != MLXEFF_OK) error = code;
  });
  CHECK(error == MLXEFF_OK);
}
inline void run_attend(mlxeff::KvStore& store, const mlxeff::Span& span, const mlxeff::AttentionSizes& sizes,
                       const Matrix& queries, Matrix& attended) {
  Matrix from = queries;
  run_store(store, span, sizes, [&](mlxeff::Team& team, const mlxeff::RunOptions& options, void* workspace) {
    return store.attend(team, {span, sizes, from.floats(), attended.floats()}, options, workspace);
  });
}
