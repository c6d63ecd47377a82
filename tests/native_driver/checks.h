// What the checks of the driver share: matrices on the heap without a byte to spare, and the comparison with plain
// loops.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/common.h"

#define CHECK(condition)                                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      std::fprintf(stderr, "%s:%d (%s): %s\n", __FILE__, __LINE__, mlxeff_isa(), #condition); \
      std::exit(1);                                                                           \
    }                                                                                         \
  } while (0)
#define RUN(call) CHECK((call) == MLXEFF_OK)

constexpr int all_dtypes[] = {MLXEFF_F32, MLXEFF_F16, MLXEFF_BF16};

// Calls body() at every instruction-set level of this machine with one thread and with three.
template <class Body>
void each_setting(Body body) {
  for (int threads : {1, 3}) {
    RUN(mlxeff_set_num_threads(threads));
    const std::string levels = mlxeff_isa_available();
    for (size_t begin = 0, end; begin < levels.size(); begin = end + 1) {
      end = std::min(levels.find(' ', begin), levels.size());
      RUN(mlxeff_set_isa(levels.substr(begin, end - begin).c_str()));
      body();
    }
  }
  RUN(mlxeff_set_isa(nullptr));
}

// Of the shapes of a check, each shape_step-th is run.
inline int shape_step = 1;

// In [-1, 1).
inline float uniform() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / 8388608.0f - 1;
}

// rows x columns of a dtype. Rows lie `gap` elements apart, the last one ends where its allocation ends. Elements and
// gaps are NaN at first: what reads a gap or leaves an element unwritten shows in the results; what writes a gap, in
// `check`.
class Matrix {
 public:
  const int64_t rows, columns, ld;
  const int dtype;

  Matrix(int64_t rows, int64_t columns, int dtype = MLXEFF_F32, int64_t gap = 0)
      : rows(rows), columns(columns), ld(columns + gap), dtype(dtype),
        bytes_(size_t(((rows - 1) * ld + columns) * size())) {
    for (int64_t i = 0; i < int64_t(bytes_.size()) / size(); ++i)
      set_element(i, std::numeric_limits<float>::quiet_NaN());
  }
  static Matrix random(int64_t rows, int64_t columns, int dtype = MLXEFF_F32, int64_t gap = 0, float scale = 1) {
    Matrix x(rows, columns, dtype, gap);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) x.set(r, c, uniform() * scale);
    return x;
  }

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  float* floats() {
    CHECK(dtype == MLXEFF_F32);
    return reinterpret_cast<float*>(bytes_.data());
  }
  void set(int64_t r, int64_t c, float value) { set_element(r * ld + c, value); }
  double at(int64_t r, int64_t c) const { return double(element(r * ld + c)); }

  // Every element is within `tolerance` of want(row, column), relative to the larger of 1 and |want|; half a step of
  // the dtype comes on top.
  template <class Want>
  void check(const char* what, double tolerance, Want want) const {
    if (dtype != MLXEFF_F32) tolerance += dtype == MLXEFF_F16 ? 0x1p-11 : 0x1p-8;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const double expected = want(r, c), got = at(r, c);
        if (!(std::fabs(got - expected) <= tolerance * std::fmax(1, std::fabs(expected)))) {
          std::fprintf(stderr, "%s (%s, %d threads): element (%d, %d) of (%d, %d) in dtype %d is %.9g, want %.9g\n",
                       what, mlxeff_isa(), mlxeff_num_threads(), int(r), int(c), int(rows), int(columns), dtype, got,
                       expected);
          std::exit(1);
        }
      }
      for (int64_t c = columns; c < ld && r + 1 < rows; ++c) CHECK(std::isnan(element(r * ld + c)));
    }
  }

 private:
  std::vector<uint8_t> bytes_;

  int64_t size() const { return int64_t(mlxeff::dtype_size(dtype)); }
  void set_element(int64_t i, float value) {
    uint8_t* const p = bytes_.data() + i * size();
    if (dtype == MLXEFF_F32) mlxeff::from_float(value, reinterpret_cast<float*>(p));
    else if (dtype == MLXEFF_F16) mlxeff::from_float(value, reinterpret_cast<mlxeff::f16*>(p));
    else mlxeff::from_float(value, reinterpret_cast<mlxeff::bf16*>(p));
  }
  float element(int64_t i) const {
    const uint8_t* const p = bytes_.data() + i * size();
    if (dtype == MLXEFF_F32) return *reinterpret_cast<const float*>(p);
    if (dtype == MLXEFF_F16) return mlxeff::to_float(*reinterpret_cast<const mlxeff::f16*>(p));
    return mlxeff::to_float(*reinterpret_cast<const mlxeff::bf16*>(p));
  }
};

// A buffer without a cache line to spare, aligned as a decoder's workspace is.
struct Workspace {
  std::unique_ptr<void, void (*)(void*)> memory;
  explicit Workspace(int64_t bytes)
      : memory(std::aligned_alloc(64, size_t(mlxeff::round_up(std::max<int64_t>(bytes, 1), 64))), std::free) {
    CHECK(memory != nullptr);
  }
  char* data() { return static_cast<char*>(memory.get()); }
};

// 1 / sqrt(mean of the squares + eps) of each row.
inline std::vector<double> inverse_rms(const Matrix& x, double eps) {
  std::vector<double> result;
  for (int64_t r = 0; r < x.rows; ++r) {
    double squares = 0;
    for (int64_t c = 0; c < x.columns; ++c) squares += x.at(r, c) * x.at(r, c);
    result.push_back(1 / std::sqrt(squares / double(x.columns) + eps));
  }
  return result;
}

// A (B, heads, tokens, E) array whose rows lie in a Matrix, in the order (B, heads, tokens) or (B, tokens, heads).
struct HeadsView {
  int64_t heads, tokens;
  bool by_token;

  int64_t row(int64_t b, int64_t h, int64_t t) const {
    return by_token ? (b * tokens + t) * heads + h : (b * heads + h) * tokens + t;
  }
  mlxeff_heads of(const Matrix& x) const {
    void* const data = const_cast<void*>(x.data());
    if (by_token) return {data, tokens * heads * x.ld, x.ld, heads * x.ld, x.dtype};
    return {data, heads * tokens * x.ld, tokens * x.ld, x.ld, x.dtype};
  }
};
