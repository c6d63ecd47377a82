// Checks of whole passes of a decoder, whose steps are those of its stores and feed-forwards too.
#pragma once
#include "checks.h"
#include "decoder/decoder.h"
#include "decoder/gated_feed_forward.h"
#include "kv/dense_kv.h"

// A decoder of two layers with random weights, and stores for it.
struct SmallDecoder {
  static constexpr int64_t dim = 32, size = 16, heads = 4, groups = 2, width = 48, vocabulary = 50, capacity = 40,
                           batch = 2;
  std::vector<std::unique_ptr<Matrix>> held;
  std::unique_ptr<mlxeff::Decoder> decoder;

  const Matrix& random(int64_t rows, int64_t columns, float scale) {
    held.emplace_back(new Matrix(Matrix::random(rows, columns, MLXEFF_F32, 0, scale)));
    return *held.back();
  }
  const float* vector(int64_t n) { return static_cast<const float*>(random(1, n, 1).data()); }
  mlxeff::Linear linear(int64_t rows, int64_t columns, bool bias) {
    mlxeff::Linear linear;
    linear.weight.N = rows, linear.weight.K = linear.weight.ld = columns;
    linear.weight.dense = random(rows, columns, 0.3f).data();
    if (bias) linear.bias = vector(rows);
    return linear;
  }
  SmallDecoder() {
    mlxeff::DecoderSpec spec = {};
    spec.dim = dim, spec.head_dim = size, spec.eps = 1e-5f;
    spec.inverse_frequencies = vector(size / 2), spec.rope_magnitude = 1, spec.final_norm = vector(dim);
    spec.embedding = linear(vocabulary, dim, false).weight;
    spec.head = linear(vocabulary, dim, true);
    for (const bool bias : {false, true}) {
      mlxeff::DecoderLayer l = {};
      l.attention_norm = vector(dim), l.feed_forward_norm = vector(dim);
      if (bias) l.q_norm = vector(size), l.k_norm = vector(size);
      l.q = linear(heads * size, dim, bias), l.o = linear(dim, heads * size, bias);
      l.k = linear(groups * size, dim, bias), l.v = linear(groups * size, dim, bias);
      l.heads = heads, l.groups = groups, l.window = bias ? 9 : 0;
      l.feed_forward.reset(
          new mlxeff::GatedFeedForward(linear(width, dim, bias), linear(width, dim, bias), linear(dim, width, bias)));
      spec.layers.push_back(std::move(l));
    }
    decoder.reset(new mlxeff::Decoder(std::move(spec)));
  }
};

struct SmallStores {
  std::vector<Matrix> buffers;
  std::vector<std::unique_ptr<mlxeff::DenseKv>> held;
  std::vector<mlxeff::KvStore*> stores;
  SmallStores() {
    const int64_t rows = SmallDecoder::batch * SmallDecoder::groups * SmallDecoder::capacity;
    for (int i = 0; i < 4; ++i) buffers.emplace_back(rows, SmallDecoder::size);
    for (size_t i = 0; i < 2; ++i) {
      held.emplace_back(
          new mlxeff::DenseKv(buffers[2 * i].data(), buffers[2 * i + 1].data(), SmallDecoder::capacity, MLXEFF_F32));
      stores.push_back(held.back().get());
    }
  }
};

// One call over all tokens gives what calls over parts of them give; last rows are those of all rows; what the layers
// read goes into another decoder's stores by `append` and continues as if it had been computed there.
inline void check_decoder_pass() {
  SmallDecoder small;
  mlxeff::Decoder& decoder = *small.decoder;
  const int64_t batch = SmallDecoder::batch, length = 36, vocabulary = SmallDecoder::vocabulary;
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < batch * length; ++i) tokens.push_back(int32_t(i * 7 % vocabulary));
  const auto part = [&](int64_t begin, int64_t end) {
    std::vector<int32_t> part;
    for (int64_t b = 0; b < batch; ++b)
      part.insert(part.end(), tokens.begin() + b * length + begin, tokens.begin() + b * length + end);
    return part;
  };
  const mlxeff::RunOptions options;
  RUN(mlxeff_set_isa("scalar"));
  RUN(mlxeff_set_num_threads(1));
  Matrix want(batch * length, vocabulary);
  SmallStores whole;
  RUN(decoder.forward(tokens.data(), batch, length, 0, whole.stores.data(), want.floats(), true, options));
  CHECK(decoder.forward(tokens.data(), batch, length, 5, whole.stores.data(), want.floats(), true, options) ==
        MLXEFF_BAD_ARGUMENT);
  each_setting([&] {
    SmallStores stores;
    const int64_t ends[] = {1, 9, 10, 36};
    int64_t begin = 0;
    for (const int64_t end : ends) {
      const bool all = end != 10;
      Matrix got(batch * (all ? end - begin : 1), vocabulary);
      RUN(decoder.forward(part(begin, end).data(), batch, end - begin, begin, stores.stores.data(), got.floats(), all,
                          options));
      got.check("decoder pass", 1e-4, [&](int64_t row, int64_t n) {
        const int64_t each = all ? end - begin : 1;
        return want.at(row / each * length + (all ? begin + row % each : end - 1), n);
      });
      begin = end;
    }
    SmallStores again;
    Matrix last(batch, vocabulary);
    RUN(decoder.forward(tokens.data(), batch, length, 0, again.stores.data(), last.floats(), false, options));
    last.check("last rows", 1e-4, [&](int64_t b, int64_t n) { return want.at((b + 1) * length - 1, n); });

    const int64_t wide = SmallDecoder::groups * SmallDecoder::size, known = 30;
    std::vector<Matrix> rows;
    for (int i = 0; i < 4; ++i) rows.emplace_back(batch * known, wide);
    const mlxeff::LayerReading readings[] = {{nullptr, rows[0].floats(), rows[1].floats()},
                                             {nullptr, rows[2].floats(), rows[3].floats()}};
    SmallStores reading, filled;
    RUN(decoder.read(part(0, known).data(), batch, known, 0, reading.stores.data(), readings, options));
    std::vector<mlxeff::KvRows> given;
    const auto heads = [&](Matrix& x) {
      return mlxeff_heads{x.data(), known * wide, SmallDecoder::size, wide, MLXEFF_F32};
    };
    for (size_t i = 0; i < 2; ++i) given.push_back({heads(rows[2 * i]), heads(rows[2 * i + 1])});
    RUN(decoder.append(batch, known, 0, filled.stores.data(), given.data(), options));
    RUN(decoder.forward(part(known, length).data(), batch, length - known, known, filled.stores.data(), last.floats(),
                        false, options));
    last.check("read and appended", 1e-4, [&](int64_t b, int64_t n) { return want.at((b + 1) * length - 1, n); });
  });
}
