#include "decoder/pass.h"

#include <math.h>

namespace mlxeff {

Pass::Pass(const DecoderSpec& spec, Team& team, const Buffers& buffers, KvStore* const* stores, const int32_t* tokens,
           const Span& span, const RunOptions& options, std::atomic<int>& error)
    : spec_(spec), team_(team, options, buffers.prepared, error), b_(buffers), stores_(stores), tokens_(tokens),
      span_(span), row_(MLXEFF_DISPATCH(decoder_kernels)), norm_(MLXEFF_DISPATCH(norm_kernels)),
      rope_(MLXEFF_DISPATCH(rope_kernels)) {}

void Pass::run(float* logits, bool all_rows) {
  embed();
  const int64_t layers = int64_t(spec_.layers.size());
  for (int64_t i = 0; i < layers; ++i) layer(i, i + 1 == layers && !all_rows);
  head(logits);
}

void Pass::read(const LayerReading* readings) {
  readings_ = readings;
  embed();
  const int64_t last = int64_t(spec_.layers.size()) - 1;
  for (int64_t i = 0; i < last; ++i) layer(i, false);
  read_last(last);
}

void Pass::append(const KvRows* given, int64_t widest) {
  angles();
  for (int64_t i = 0; i < int64_t(spec_.layers.size()); ++i) {
    const auto finish = [&](int64_t r) { return finish_given(i, r, given[i], b_.keys + r * widest * spec_.head_dim); };
    store(i, &finish);
  }
}

void Pass::embed() {
  team_.team.for_rows(span_.rows(), [&](int64_t r) { read_row(spec_.embedding, tokens_[r], b_.x + r * spec_.dim); });
  angles();
}

// Computes the RoPE cosines and sines for the positions of the new tokens.
void Pass::angles() {
  const int64_t half = spec_.head_dim / 2;
  team_.team.for_chunks(span_.length, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(span_.position(t)) * double(spec_.inverse_frequencies[i]);
        b_.cosines[t * half + i] = float(spec_.rope_magnitude * cos(angle));
        b_.sines[t * half + i] = float(spec_.rope_magnitude * sin(angle));
      }
  });
}

// Runs one layer. With `last_only`, keys and values are stored for all tokens, but attention and feed-forward are
// computed only for the last token of each sequence.
void Pass::layer(int64_t index, bool last_only) {
  const DecoderLayer& l = spec_.layers[size_t(index)];
  enter(index, {{&l.q, b_.queries}, {&l.k, b_.keys}, {&l.v, b_.values}});
  const auto finish = [&](int64_t r) { return finish_row(index, r); };
  store(index, &finish);
  if (last_only && span_.length > 1) keep_last_rows(l);
  const Queries queries = {span_, spec_.sizes(l), b_.queries, b_.attended};
  team_.check(stores_[index]->attend(team_.team, queries, team_.options, b_.workspace));
  const auto made_already = [](int64_t) {};  // attention has written all rows of the input
  team_.multiply(b_.attended, {{&l.o, b_.added}}, span_.rows(), &made_already);
  const auto make_row = [&](int64_t r) { add_and_norm(r, b_.added, l.o.bias, l.feed_forward_norm); };
  l.feed_forward->run(team_, {b_.normed, b_.added, span_.rows(), &make_row}, b_.workspace);
}

// Adds the previous layer's feed-forward output to the residual, normalises the sum, which is the input of this layer's
// attention, and multiplies it with the matrices of `outputs`.
void Pass::enter(int64_t index, std::initializer_list<Output> outputs) {
  const float* const before = index ? b_.added : nullptr;
  const float* const before_bias = index ? spec_.layers[size_t(index - 1)].feed_forward->bias : nullptr;
  float* const input = readings_ ? readings_[index].input : nullptr;
  const auto make_row = [&](int64_t r) {
    add_and_norm(r, before, before_bias, spec_.layers[size_t(index)].attention_norm);
    if (input) memcpy(input + r * spec_.dim, b_.normed + r * spec_.dim, size_t(spec_.dim) * 4);
  };
  team_.multiply(b_.normed, outputs, span_.rows(), &make_row);
}

void Pass::read_last(int64_t index) {
  const DecoderLayer& l = spec_.layers[size_t(index)];
  if (!readings_[index].keys && !readings_[index].values) return enter(index, {});
  enter(index, {{&l.k, b_.keys}, {&l.v, b_.values}});
  team_.team.for_rows(span_.rows(), [&](int64_t r) { finish_kv(index, r); });
}

void Pass::head(float* logits) {
  const float* const bias = spec_.layers.back().feed_forward->bias;
  const auto make_row = [&](int64_t r) { add_and_norm(r, b_.added, bias, spec_.final_norm); };
  team_.multiply(b_.normed, {{&spec_.head, logits}}, span_.rows(), &make_row);
  const int64_t width = spec_.head.weight.N;
  if (spec_.head.bias)
    team_.team.for_rows(span_.rows(), [&](int64_t r) { add(logits + r * width, spec_.head.bias, width); });
}

// Appends the keys and values of the new tokens to the layer's store.
void Pass::store(int64_t index, RowFunction<NewRow> finish) {
  const NewRows rows = {span_, spec_.sizes(spec_.layers[size_t(index)]), b_.cosines, b_.sines, finish};
  team_.check(stores_[index]->append(team_.team, rows, team_.options, b_.workspace));
}

// Adds the biases to row r of the queries, keys and values, normalises its queries and keys if the model does so, and
// applies RoPE to its queries. The store applies RoPE to the keys.
NewRow Pass::finish_row(int64_t index, int64_t r) {
  const DecoderLayer& l = spec_.layers[size_t(index)];
  const int64_t size = spec_.head_dim, half = size / 2, t = r % span_.length;
  float* const q = b_.queries + r * l.heads * size;
  float* const k = b_.keys + r * l.groups * size;
  add(q, l.q.bias, l.heads * size);
  finish_kv(index, r);
  if (l.q_norm) norm(q, q, l.q_norm, l.heads, size);
  if (l.k_norm) norm(k, k, l.k_norm, l.groups, size);
  const mlxeff_heads heads = {q, 0, size, 0, MLXEFF_F32};
  rope_.rows({heads, heads, 1, l.heads, 1, size, size, b_.cosines + t * half, b_.sines + t * half, false}, 0, l.heads);
  return {k, size, b_.values + r * l.groups * size, size};
}

// Does the same for row r of keys and values that the caller gave, which must not be modified: normalised keys are
// written to `normed`, which has room for one row.
NewRow Pass::finish_given(int64_t index, int64_t r, const KvRows& given, float* normed) {
  const DecoderLayer& l = spec_.layers[size_t(index)];
  const int64_t b = r / span_.length, t = r % span_.length, size = spec_.head_dim;
  const auto at = [&](const mlxeff_heads& x) { return static_cast<const float*>(x.data) + b * x.batch + t * x.token; };
  const NewRow row = {at(given.keys), given.keys.head, at(given.values), given.values.head};
  if (!l.k_norm) return row;
  for (int64_t g = 0; g < l.groups; ++g) norm(normed + g * size, row.keys + g * row.key_step, l.k_norm, 1, size);
  return {normed, size, row.values, row.value_step};
}

// Adds the biases to row r of the keys and values. A LayerReading reports keys and values in this state, so they are
// copied to it here.
void Pass::finish_kv(int64_t index, int64_t r) {
  const DecoderLayer& l = spec_.layers[size_t(index)];
  const int64_t width = l.groups * spec_.head_dim;
  float* const k = b_.keys + r * width;
  float* const v = b_.values + r * width;
  add(k, l.k.bias, width);
  add(v, l.v.bias, width);
  if (!readings_) return;
  if (float* const keys = readings_[index].keys) memcpy(keys + r * width, k, size_t(width) * 4);
  if (float* const values = readings_[index].values) memcpy(values + r * width, v, size_t(width) * 4);
}

// Narrows the pass to the last token of each sequence: moves the hidden states and queries of these tokens to the first
// rows of their buffers.
void Pass::keep_last_rows(const DecoderLayer& l) {
  const int64_t wide = l.heads * spec_.head_dim;
  team_.team.for_chunks(1, 1, [&](int64_t, int64_t) {
    for (int64_t b = 0; b < span_.batch; ++b) {
      const int64_t last = (b + 1) * span_.length - 1;
      memmove(b_.x + b * spec_.dim, b_.x + last * spec_.dim, size_t(spec_.dim) * 4);
      memmove(b_.queries + b * wide, b_.queries + last * wide, size_t(wide) * 4);
    }
  });
  span_.length = 1;
}

void Pass::add_and_norm(int64_t r, const float* added, const float* bias, const float* weight) {
  float* const x = b_.x + r * spec_.dim;
  add(x, added ? added + r * spec_.dim : nullptr, spec_.dim);
  add(x, bias, spec_.dim);
  norm(b_.normed + r * spec_.dim, x, weight, 1, spec_.dim);
}

void Pass::add(float* x, const float* term, int64_t n) {
  if (term) row_.add(x, term, n);
}

// Applies RMSNorm to `count` consecutive vectors of n elements. `out` may be x.
void Pass::norm(float* out, const float* x, const float* weight, int64_t count, int64_t n) {
  const NormRows from = {reinterpret_cast<char*>(const_cast<float*>(x)), n, 0, MLXEFF_F32},
                 to = {reinterpret_cast<char*>(out), n, 0, MLXEFF_F32};
  if (!norm_.rows({from, to, weight, MLXEFF_F32, 1, n, spec_.eps}, 0, count)) team_.check(MLXEFF_NO_MEMORY);
}

}  // namespace mlxeff
