// The calls of a native decoder: forward, read and append. A call computes at once, on the thread that calls it, and
// without Python's lock: a step of decoding is too short for the detour through MLX's graph and the thread of its
// stream.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>

#include "python/at_once.h"
#include "python/decoder_model.h"
#include "python/kv_stores.h"

namespace mlxeff {
namespace {

using Arrays = std::vector<mx::array>;

// Token ids (B, S) in memory, as 32-bit integers without gaps.
class Tokens {
 public:
  explicit Tokens(const mx::array& given) : ids_(given) {
    if (given.ndim() != 2 || given.size() < 1) throw std::invalid_argument("decoder: wanted tokens of shape (B, S)");
    // An id that fits into no signed integer is outside of every vocabulary, and refused as such.
    if (given.dtype() != mx::int32 && given.dtype() != mx::uint32) ids_ = mx::astype(given, mx::int32, cpu_stream());
    ids_ = in_memory(ids_);
  }
  int64_t batch() const { return ids_.shape(0); }
  int64_t length() const { return ids_.shape(1); }
  const int32_t* ids() const { return reinterpret_cast<const int32_t*>(ids_.data<char>()); }

 private:
  mx::array ids_;
};

RunOptions run_options(int mode, std::optional<float> dial) {
  if (mode < MLXEFF_EXACT || mode > MLXEFF_COMPUTE_INT8)
    throw std::invalid_argument("decoder: wanted mode EXACT, COMPUTE_BF16 or COMPUTE_INT8, got " +
                                std::to_string(mode));
  if (dial && !std::isfinite(*dial)) throw std::invalid_argument("decoder: dial: wanted a finite number or None");
  return {mode, dial.has_value(), dial.value_or(0)};
}

mx::array forward(DecoderModel& model, const mx::array& tokens, const nb::list& given, int64_t offset, bool all_rows,
                  int mode, std::optional<float> dial) {
  Decoder& decoder = model.decoder();
  const RunOptions options = run_options(mode, dial);
  const Tokens ids(tokens);
  const int64_t batch = ids.batch(), length = ids.length();
  const GivenStores stores(given, decoder.spec(), decoder.spec().layers.size(), {batch, length, offset + length});
  const int vocabulary = int(decoder.spec().head.weight.N);
  const mx::Shape all = {int(batch), int(length), vocabulary}, last = {int(batch), vocabulary};
  mx::array logits = new_array(all_rows ? all : last, mx::float32);
  const nb::gil_scoped_release unlocked;
  check(decoder.forward(ids.ids(), batch, length, offset, stores.stores(), logits.data<float>(), all_rows, options));
  return logits;
}

void require_rising(const std::vector<int>& layers, size_t most) {
  for (size_t i = 0; i < layers.size(); ++i)
    if (layers[i] < (i ? layers[i - 1] + 1 : 0) || size_t(layers[i]) > most)
      throw std::invalid_argument("decoder: wanted rising layers to read");
}

std::tuple<Arrays, Arrays, Arrays> read(DecoderModel& model, const mx::array& tokens, const nb::list& given,
                                        int64_t offset, const std::vector<int>& inputs, const std::vector<int>& pairs,
                                        int mode, std::optional<float> dial) {
  if (inputs.empty() && pairs.empty()) throw std::invalid_argument("decoder: wanted layers to read, got none");
  Decoder& decoder = model.decoder();
  const DecoderSpec& spec = decoder.spec();
  const size_t stored = spec.layers.size() - 1;  // the last layer appends nothing
  require_rising(inputs, stored);
  require_rising(pairs, stored);
  const RunOptions options = run_options(mode, dial);
  const Tokens ids(tokens);
  const int64_t batch = ids.batch(), length = ids.length();
  const GivenStores stores(given, spec, stored, {batch, length, offset + length});
  std::vector<LayerReading> readings(spec.layers.size());
  Arrays rows, keys, values;
  const auto place = [&](Arrays& arrays, int64_t width) {
    arrays.push_back(new_array({int(batch), int(length), int(width)}, mx::float32));
    return arrays.back().data<float>();
  };
  for (const int i : inputs) readings[size_t(i)].input = place(rows, spec.dim);
  for (const int i : pairs) {
    const int64_t width = spec.layers[size_t(i)].groups * spec.head_dim;
    readings[size_t(i)].keys = place(keys, width);
    readings[size_t(i)].values = place(values, width);
  }
  {
    const nb::gil_scoped_release unlocked;
    check(decoder.read(ids.ids(), batch, length, offset, stores.stores(), readings.data(), options));
  }
  return {std::move(rows), std::move(keys), std::move(values)};
}

void append(DecoderModel& model, const Arrays& keys, const Arrays& values, const nb::list& given, int64_t offset) {
  Decoder& decoder = model.decoder();
  const DecoderSpec& spec = decoder.spec();
  const size_t layers = spec.layers.size();
  if (keys.size() != layers || values.size() != layers)
    throw std::invalid_argument("decoder: wanted keys and values of each layer");
  const int batch = keys[0].ndim() == 4 ? keys[0].shape(0) : 0, length = batch ? keys[0].shape(2) : 0;
  Arrays rows;
  for (size_t i = 0; i < layers; ++i)
    for (const mx::array* array : {&keys[i], &values[i]}) {
      const mx::Shape wanted = {batch, int(spec.layers[i].groups), length, int(spec.head_dim)};
      if (array->shape() != wanted || array->size() == 0)
        throw std::invalid_argument("decoder: keys and values do not fit the model");
      rows.push_back(mx::astype(*array, mx::float32, cpu_stream()));
    }
  evaluate(rows);
  for (mx::array& array : rows)
    if (array.strides(3) != 1) array = in_memory(array);
  const auto heads = [](mx::array& x) {
    return mlxeff_heads{x.data<char>(), x.strides(0), x.strides(1), x.strides(2), MLXEFF_F32};
  };
  std::vector<KvRows> each;
  for (size_t i = 0; i < layers; ++i) each.push_back({heads(rows[2 * i]), heads(rows[2 * i + 1])});
  const GivenStores stores(given, spec, layers, {batch, length, offset + length});
  const nb::gil_scoped_release unlocked;
  check(decoder.append(batch, length, offset, stores.stores(), each.data(), {}));
}

}  // namespace

void bind_passes(nb::module_& m) {
  m.def("forward", &forward, nb::arg("decoder"), nb::arg("tokens"), nb::arg("stores"), nb::arg("offset"),
        nb::arg("all_rows"), nb::arg("mode"), nb::arg("dial") = nb::none(),
        "Tokens (B, S) -> logits (B, S, V), or (B, V) without all_rows: of the last token. A store is a dict for each "
        "layer, {'kind': 'dense', 'keys': (B, G, "
        "capacity, E), 'values': the same}, that holds `offset` tokens, and the new ones too after the call: it writes "
        "into the arrays where only the dict and one owner refer to them, else into copies that it puts into the dict. "
        "With a dial, dynamic feed-forwards choose an expert for each token by it; without one, all tokens take the "
        "widest.");
  m.def("read", &read, nb::arg("decoder"), nb::arg("tokens"), nb::arg("stores"), nb::arg("offset"), nb::arg("inputs"),
        nb::arg("pairs"), nb::arg("mode"), nb::arg("dial") = nb::none(),
        "(inputs, keys, values): normed inputs of the layers `inputs`, raw keys and raw values of the layers `pairs`, "
        "which rise; rows (B, S, width). Stores as in `forward`, without the last layer's.");
  m.def("append", &append, nb::arg("decoder"), nb::arg("keys"), nb::arg("values"), nb::arg("stores"), nb::arg("offset"),
        "Adds keys, which it norms and rotates, and values, (B, G, S, E) of each layer, to stores as in `forward`.");
}

}  // namespace mlxeff
