// Checks of a decoder's appending of given keys and values: layers of different widths, keys normed and rotated.
#pragma once
#include "checks.h"
#include "decoder/decoder.h"
#include "kv/dense_kv.h"

inline void check_decoder_append_to(int dtype) {
  const int64_t size = 16, half = size / 2, batch = 2, length = 21, offset = 3, capacity = 30, rows = batch * length,
                groups[] = {1, 4, 2};
  const Matrix norm = Matrix::random(1, size), frequencies = Matrix::random(1, half);
  mlxeff::DecoderSpec spec = {};
  spec.dim = 8;
  spec.head_dim = size;
  spec.eps = 1e-5f;
  spec.inverse_frequencies = static_cast<const float*>(frequencies.data());
  spec.rope_magnitude = 1.5f;
  std::vector<Matrix> keys, values;  // given: (batch, length, groups, size), with a gap after each row
  std::vector<Matrix> held;          // keys and values of each layer: (batch * groups * capacity, size)
  for (const int64_t count : groups) {
    mlxeff::DecoderLayer layer = {};
    layer.k_norm = count == 2 ? nullptr : static_cast<const float*>(norm.data());
    layer.heads = layer.groups = count;
    spec.layers.push_back(std::move(layer));
    keys.push_back(Matrix::random(rows, count * size, MLXEFF_F32, 5));
    values.push_back(Matrix::random(rows, count * size, MLXEFF_F32, 7));
    for (int kind = 0; kind < 2; ++kind) held.push_back(Matrix::random(batch * count * capacity, size, dtype));
  }
  const std::vector<Matrix> before = held;
  std::vector<std::unique_ptr<mlxeff::DenseKv>> held_stores;
  std::vector<mlxeff::KvStore*> stores;
  std::vector<mlxeff::KvRows> given;
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto heads = [&](Matrix& x) { return mlxeff_heads{x.data(), length * x.ld, size, x.ld, MLXEFF_F32}; };
    held_stores.emplace_back(new mlxeff::DenseKv(held[2 * i].data(), held[2 * i + 1].data(), capacity, dtype));
    stores.push_back(held_stores.back().get());
    given.push_back({heads(keys[i]), heads(values[i])});
  }
  const float eps = spec.eps, magnitude = spec.rope_magnitude;
  mlxeff::Decoder decoder(std::move(spec));
  CHECK(decoder.append(batch, length, capacity - length + 1, stores.data(), given.data(), {}) == MLXEFF_BAD_ARGUMENT);
  RUN(decoder.append(batch, length, offset, stores.data(), given.data(), {}));
  for (size_t i = 0; i < held.size(); ++i) {
    const int64_t count = groups[i / 2];
    held[i].check("decoder append", 1e-5, [&](int64_t row, int64_t e) {
      const int64_t place = row % capacity, g = row / capacity % count, t = place - offset,
                    r = row / capacity / count * length + t;
      if (t < 0 || t >= length) return before[i].at(row, e);
      if (i % 2) return values[i / 2].at(r, g * size + e);
      double squares = 0;
      for (int64_t j = 0; j < size; ++j) squares += keys[i / 2].at(r, g * size + j) * keys[i / 2].at(r, g * size + j);
      const double scale = 1 / std::sqrt(squares / double(size) + double(eps)),
                   angle = double(place) * frequencies.at(0, e % half);
      const auto normed = [&](int64_t j) {
        return keys[i / 2].at(r, g * size + j) * (count == 2 ? 1 : scale * norm.at(0, j));
      };
      const double turned = e < half ? normed(e) * std::cos(angle) - normed(e + half) * std::sin(angle)
                                     : normed(e - half) * std::sin(angle) + normed(e) * std::cos(angle);
      return double(magnitude) * turned;
    });
  }
}

inline void check_decoder_append() {
  each_setting([] {
    for (const int dtype : all_dtypes) check_decoder_append_to(dtype);
  });
}
