// Checks of the sparse feed-forward and of matrices in columns, called as a pass calls them: against plain loops in
// double, and of few rows together against the same rows alone.
#pragma once
#include "columns/column_kernels.h"
#include "decoder/sparse_feed_forward.h"
#include "dynamic.h"

// A matrix (N, K) in columns of one of several kinds.
struct Columns {
  static constexpr const char* kinds[] = {"4 bits", "8 bits", "f16", "bf16", "f32"};
  int64_t N, K;
  std::vector<uint32_t> packed;
  std::vector<Matrix> arrays;  // scales and biases (K / group, N), or the dense values (K, N)
  mlxeff::ColumnMatrix c;

  Columns(const std::string& kind, int64_t N, int64_t K, int64_t group, int dtype) : N(N), K(K) {
    const int bits = kind == "4 bits" ? 4 : kind == "8 bits" ? 8 : 0;
    if (!bits) {
      const int own = kind == "f16" ? MLXEFF_F16 : kind == "bf16" ? MLXEFF_BF16 : MLXEFF_F32;
      arrays.push_back(Matrix::random(K, N, own, 0, 0.3f));
      c = {K, N, arrays[0].data(), 0, own, K, nullptr, nullptr};
      return;
    }
    for (int64_t i = 0; i < K * N * bits / 32; ++i) packed.push_back(uint32_t(int32_t(uniform() * 0x1p31f)));
    for (int i = 0; i < 2; ++i)
      arrays.push_back(Matrix::random(K / group, N, dtype, 0, i ? 0.3f : 0.6f / float(1 << bits)));
    c = {K, N, packed.data(), bits, dtype, group, arrays[0].data(), arrays[1].data()};
  }
  double at(int64_t n, int64_t k) const {
    if (!c.bits) return arrays[0].at(k, n);
    const int64_t before = n / c.piece() * c.piece();  // outputs of earlier strips
    const int64_t width = std::min(c.piece(), N - before), place = n - before, words = 2 * c.bits;
    const int64_t word = (K * before + k * width) * c.bits / 32 + place / 64 * words + place % 64 % words;
    const uint32_t q = packed[size_t(word)] >> (place % 64 / words * c.bits) & ((1u << c.bits) - 1);
    const int64_t scale = K / c.group * before + k / c.group * width + place;
    return q * arrays[0].at(scale / N, scale % N) + arrays[1].at(scale / N, scale % N);
  }
};

// The products of pieces, of all inputs, some and none, as exact as sums of floats are.
inline void check_column_pieces() {
  for (const char* kind : Columns::kinds)
    for (const int64_t N : {64, 128, 448}) {
      const Columns given(kind, N, 384, 128, MLXEFF_F32);
      Matrix x = Matrix::random(1, given.K), weights = Matrix::random(1, given.K);
      for (const float threshold : {-9.0f, 0.1f, 0.4f, 9.0f})
        each_setting([&] {
          using namespace mlxeff;
          const ColumnKernels& kernels = MLXEFF_DISPATCH(column_kernels);
          std::vector<float> memory(size_t(mlxeff::KeptInputs::floats(given.K, 64)), NAN);
          const auto kept = mlxeff::KeptInputs::at(memory.data(), given.K, 64);
          for (int64_t b = 0; b < given.K / 64; ++b)
            kernels.keep(x.floats() + b * 64, weights.floats() + b * 64, threshold, given.K, b, kept);
          for (int64_t piece = 0; piece < given.c.pieces(); ++piece) {
            float y[mlxeff::ColumnMatrix::widest_piece];
            kernels.piece(given.c, piece, kept, y);
            for (int64_t n = 0; n < given.c.width_of(piece); ++n) {
              double want = 0, size = 0;
              for (int64_t k = 0; k < given.K; ++k) {
                if (std::fabs(x.at(0, k)) * weights.at(0, k) < threshold) continue;
                const double product = given.at(piece * given.c.piece() + n, k) * x.at(0, k);
                want += product, size += std::fabs(product);
              }
              CHECK(std::fabs(y[n] - want) <= 0x1p-21 * size);
            }
          }
        });
    }
}

struct SparseCase {
  const int64_t dim, width;
  Columns gate_up, down;
  Matrix input_weights, neuron_weights;
  mlxeff::SparseFeedForward sparse;

  SparseCase(const std::string& kind, const std::string& other, int64_t dim, int64_t width, int64_t group, int dtype)
      : dim(dim), width(width), gate_up(kind, 2 * width, dim, group, dtype), down(other, dim, width, group, dtype),
        input_weights(positive(dim)), neuron_weights(positive(width)),
        sparse(gate_up.c, down.c, input_weights.floats(), neuron_weights.floats(), nullptr) {}

  static Matrix positive(int64_t n) {
    Matrix made(1, n);
    for (int64_t i = 0; i < n; ++i) made.set(0, i, 0.5f + std::fabs(uniform()));
    return made;
  }
  static bool counts(double x, double weight, double threshold) { return !(std::fabs(x) * weight < threshold); }

  // The output for a row, and how many inputs and neurons it keeps.
  std::vector<double> want(const Matrix& input, int64_t row, double threshold, int64_t* inputs,
                           int64_t* neurons) const {
    const int64_t half = 32;
    std::vector<double> out(size_t(dim), 0);
    for (int64_t k = 0; k < dim; ++k) *inputs += counts(input.at(row, k), input_weights.at(0, k), threshold);
    for (int64_t n = 0; n < width; ++n) {
      double g = 0, u = 0;
      const int64_t place = n / half * 2 * half + n % half;
      for (int64_t k = 0; k < dim; ++k) {
        const double x = counts(input.at(row, k), input_weights.at(0, k), threshold) ? input.at(row, k) : 0;
        g += gate_up.at(place, k) * x, u += gate_up.at(place + half, k) * x;
      }
      const double hidden = g / (1 + std::exp(-g)) * u;
      if (!counts(hidden, neuron_weights.at(0, n), threshold)) continue;
      ++*neurons;
      for (int64_t k = 0; k < dim; ++k) out[size_t(k)] += down.at(k, n) * hidden;
    }
    return out;
  }
  int64_t bytes(int64_t rows, int64_t inputs, int64_t neurons) const {
    return inputs * gate_up.c.input_bytes(2 * width) + neurons * down.c.input_bytes(dim) +
           rows * (gate_up.c.scale_bytes(2 * width) + down.c.scale_bytes(dim));
  }
};

// Rows against plain loops, with the counters. No activation is so close to the threshold that rounding decides.
inline void check_sparse_rows(SparseCase& given, int64_t rows, float threshold) {
  const bool few = rows <= mlxeff::SparseFeedForward::few_tokens;
  Matrix input = Matrix::random(rows, given.dim);
  int64_t inputs = 0, neurons = 0, passes = 0;
  double size = 1;
  std::vector<std::vector<double>> want;
  for (int64_t r = 0; r < rows; ++r) {
    want.push_back(given.want(input, r, few ? threshold : 0, &inputs, &neurons));
    for (const double each : want.back()) size = std::max(size, std::fabs(each));
  }
  const mlxeff::FeedForward::Usage before = *given.sparse.usage();
  each_setting([&] {
    const mlxeff::RunOptions options = {MLXEFF_EXACT, threshold > 0, threshold > 0 ? threshold : 9};
    const Matrix out = run_feed_forward(given.sparse, input, 0, rows, options);
    out.check("sparse feed-forward", size * 2e-3, [&](int64_t r, int64_t n) { return want[size_t(r)][size_t(n)]; });
    ++passes;
  });
  const mlxeff::FeedForward::Usage after = *given.sparse.usage();
  CHECK(after.counts[0] - before.counts[0] == passes * rows);
  CHECK(after.counts[1] - before.counts[1] == passes * inputs);
  CHECK(std::llabs(after.counts[2] - before.counts[2] - passes * neurons) <= passes * (threshold > 0 ? 2 : 0));
  const int64_t kept = after.counts[2] - before.counts[2];
  CHECK(after.bytes - before.bytes ==
        (few ? passes * given.bytes(rows, inputs, 0) + kept * given.down.c.input_bytes(given.dim)
             : passes * (given.gate_up.c.bytes() + given.down.c.bytes())));
}

// Up to 8 rows have the bits that each has alone; a value that is not a number spoils its own row only.
inline void check_sparse_alone(SparseCase& given) {
  Matrix input = Matrix::random(8, given.dim);
  each_setting([&] {
    const mlxeff::RunOptions options = {MLXEFF_EXACT, true, 0.5f};
    for (int64_t count : {2, 5, 8}) {
      const Matrix together = run_feed_forward(given.sparse, input, 0, count, options);
      for (int64_t r = 0; r < count; ++r) {
        const Matrix alone = run_feed_forward(given.sparse, input, r, 1, options);
        for (int64_t k = 0; k < given.dim; ++k) CHECK(alone.at(0, k) == together.at(r, k));
      }
    }
    Matrix spoilt = input;
    spoilt.set(1, 3, NAN);
    const Matrix out = run_feed_forward(given.sparse, spoilt, 0, 3, options);
    for (int64_t k = 0; k < given.dim; ++k) CHECK(out.at(1, k) != out.at(1, k) && out.at(0, k) == out.at(0, k));
  });
}

inline void check_sparse() {
  check_column_pieces();
  int index = 0;
  for (const char* kind : Columns::kinds)
    for (const char* other : Columns::kinds) {
      if (index++ % shape_step) continue;
      const int64_t group = index % 3 == 0 ? 128 : index % 3 == 1 ? 32 : 64;
      SparseCase given(kind, other, index % 2 ? 128 : 64 * (group == 128 ? 2 : 3), 256, group,
                       index % 2   ? MLXEFF_F16
                       : index % 4 ? MLXEFF_BF16
                                   : MLXEFF_F32);
      for (int64_t rows : {1, 3, 8, 9, 21})
        for (float threshold : {0.0f, 0.6f, 1e30f}) check_sparse_rows(given, rows, threshold);
      check_sparse_alone(given);
    }
}
