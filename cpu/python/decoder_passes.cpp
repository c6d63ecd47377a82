// The calls of a native decoder (forward, read and append) as MLX primitives. The arrays of the key/value stores are
// inputs of a primitive; its outputs are the same arrays with the new tokens added.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <cmath>

#include "python/decoder_model.h"
#include "python/kv_stores.h"

namespace mlxeff {
namespace {

using Arrays = std::vector<mx::array>;
using Kinds = std::vector<GivenKind>;

// The results that a pass computes: logits, or the attention inputs, keys and values of selected layers (see
// LayerReading).
struct Purpose {
  bool all_logits = false;
  std::vector<int> inputs = {},
                   pairs = {};  // layer indices in ascending order; if both are empty, the pass computes logits
  bool reads() const { return !inputs.empty() || !pairs.empty(); }
};

// Inputs: the tokens, then the arrays of the stores. Outputs: the logits, or the attention inputs, raw keys and raw
// values (before key norm and RoPE) of the layers that `Purpose` selects; then the arrays of the stores. A pass without
// logits does not use the last layer's store.
class DecoderForward : public NativePrimitive {
 public:
  DecoderForward(mx::Stream stream, std::shared_ptr<DecoderModel> model, Kinds kinds, int64_t offset, Purpose purpose,
                 RunOptions options)
      : NativePrimitive(stream, "native decoder"), model_(std::move(model)), kinds_(std::move(kinds)), offset_(offset),
        purpose_(std::move(purpose)), options_(options) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    drop_inputs_of_siblings(inputs, outputs);
    const size_t results = outputs.size() - (inputs.size() - 1);
    std::vector<float*> written(results);
    for (size_t i = 0; i < results; ++i) {
      outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
      written[i] = outputs[i].data<float>();
    }
    const int64_t batch = inputs[0].shape(0), length = inputs[0].shape(1);
    StoreUpdate stores(kinds_, {batch, length, offset_ + length}, inputs.data() + 1, outputs.data() + results);
    dispatch([model = model_, stores = std::move(stores), tokens = inputs[0].data<int32_t>(), batch, length,
              offset = offset_, written = std::move(written), purpose = purpose_, options = options_]() mutable {
      Decoder& decoder = model->decoder();
      if (!purpose.reads())
        return check(
            decoder.forward(tokens, batch, length, offset, stores.ready(), written[0], purpose.all_logits, options));
      std::vector<LayerReading> readings(decoder.spec().layers.size());
      float* const* next = written.data();
      for (const int i : purpose.inputs) readings[size_t(i)].input = *next++;
      for (const int i : purpose.pairs) readings[size_t(i)].keys = *next++;
      for (const int i : purpose.pairs) readings[size_t(i)].values = *next++;
      check(decoder.read(tokens, batch, length, offset, stores.ready(), readings.data(), options));
    });
  }
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override {
    throw std::invalid_argument(
        "native decoder: has no gradient; call model.train() first, which computes operator by operator");
  }

 private:
  std::shared_ptr<DecoderModel> model_;
  Kinds kinds_;
  int64_t offset_;
  Purpose purpose_;
  RunOptions options_;
};

// Inputs: the raw keys of each layer, then the raw values of each layer, all float32 (B, G, S, E); then the arrays of
// the stores. Outputs: the arrays of the stores with the new tokens added.
class DecoderAppend : public NativePrimitive {
 public:
  DecoderAppend(mx::Stream stream, std::shared_ptr<DecoderModel> model, Kinds kinds, int64_t offset)
      : NativePrimitive(stream, "native append"), model_(std::move(model)), kinds_(std::move(kinds)), offset_(offset) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    drop_inputs_of_siblings(inputs, outputs);
    const size_t layers = kinds_.size();
    std::vector<KvRows> given(layers);
    for (size_t i = 0; i < layers; ++i) given[i] = {heads(inputs[i]), heads(inputs[layers + i])};
    const int64_t batch = inputs[0].shape(0), length = inputs[0].shape(2);
    StoreUpdate stores(kinds_, {batch, length, offset_ + length}, inputs.data() + 2 * layers, outputs.data());
    dispatch([model = model_, stores = std::move(stores), given = std::move(given), batch, length,
              offset = offset_]() mutable {
      check(model->decoder().append(batch, length, offset, stores.ready(), given.data(), {}));
    });
  }

 private:
  std::shared_ptr<DecoderModel> model_;
  Kinds kinds_;
  int64_t offset_;
};

// The outputs of a pass: first `results` arrays of results, then the arrays of the stores.
struct Outputs {
  Arrays arrays;
  size_t results;
  nb::list stores;

  nb::list list(size_t begin, size_t end) const {
    nb::list out;
    for (size_t i = begin; i < end; ++i) out.append(arrays[i]);
    return out;
  }
};

Outputs run(const DecoderHandle& handle, const mx::array& tokens, const nb::list& given, int64_t offset,
            const Purpose& purpose, int mode, std::optional<float> dial) {
  const DecoderSpec& spec = handle.model->decoder().spec();
  const size_t layers = spec.layers.size() - (purpose.reads() ? 1 : 0);
  for (const auto* read : {&purpose.inputs, &purpose.pairs})
    for (size_t i = 0; i < read->size(); ++i)
      if ((*read)[i] < (i ? (*read)[i - 1] + 1 : 0) || size_t((*read)[i]) > layers)
        throw std::invalid_argument("decoder: wanted rising layers to read");
  if (mode < MLXEFF_EXACT || mode > MLXEFF_COMPUTE_INT8)
    throw std::invalid_argument("decoder: wanted mode EXACT, COMPUTE_BF16 or COMPUTE_INT8, got " +
                                std::to_string(mode));
  if (dial && !std::isfinite(*dial)) throw std::invalid_argument("decoder: dial: wanted a finite number or None");
  if (tokens.ndim() != 2 || tokens.size() < 1) throw std::invalid_argument("decoder: wanted tokens of shape (B, S)");
  const int batch = tokens.shape(0), length = tokens.shape(1);
  const GivenStores stores(given, spec, layers, {batch, length, offset + length});
  const mx::Stream stream = cpu_stream();
  Arrays inputs = {mx::contiguous(mx::astype(tokens, mx::int32, stream), false, stream)};
  std::vector<mx::Shape> shapes;
  if (!purpose.reads()) shapes.push_back({batch, purpose.all_logits ? length : 1, int(spec.head.weight.N)});
  shapes.insert(shapes.end(), purpose.inputs.size(), {batch, length, int(spec.dim)});
  for (int kind = 0; kind < 2; ++kind)
    for (const int i : purpose.pairs)
      shapes.push_back({batch, length, int(spec.layers[size_t(i)].groups * spec.head_dim)});
  const size_t results = shapes.size();
  std::vector<mx::Dtype> dtypes(results, mx::float32);
  stores.add_to(inputs, shapes, dtypes);
  Arrays outputs =
      mx::array::make_arrays(std::move(shapes), dtypes,
                             std::make_shared<DecoderForward>(stream, handle.model, stores.kinds(), offset, purpose,
                                                              RunOptions{mode, dial.has_value(), dial.value_or(0)}),
                             std::move(inputs));
  nb::list updated = stores.updated(outputs.data() + results);
  return {std::move(outputs), results, std::move(updated)};
}

nb::tuple forward(const DecoderHandle& decoder, const mx::array& tokens, const nb::list& stores, int64_t offset,
                  bool all_rows, int mode, std::optional<float> dial) {
  const Outputs outputs = run(decoder, tokens, stores, offset, {all_rows}, mode, dial);
  return nb::make_tuple(outputs.arrays[0], outputs.stores);
}

nb::tuple read(const DecoderHandle& decoder, const mx::array& tokens, const nb::list& stores, int64_t offset,
               const std::vector<int>& inputs, const std::vector<int>& pairs, int mode, std::optional<float> dial) {
  if (inputs.empty() && pairs.empty()) throw std::invalid_argument("decoder: wanted layers to read, got none");
  const Outputs outputs = run(decoder, tokens, stores, offset, {false, inputs, pairs}, mode, dial);
  const size_t first = inputs.size(), second = first + pairs.size();
  return nb::make_tuple(outputs.list(0, first), outputs.list(first, second), outputs.list(second, outputs.results),
                        outputs.stores);
}

nb::list append(const DecoderHandle& handle, const Arrays& keys, const Arrays& values, const nb::list& given,
                int64_t offset) {
  const DecoderSpec& spec = handle.model->decoder().spec();
  const size_t layers = spec.layers.size();
  if (keys.size() != layers || values.size() != layers)
    throw std::invalid_argument("decoder: wanted keys and values of each layer");
  const int batch = keys[0].ndim() == 4 ? keys[0].shape(0) : 0, length = batch ? keys[0].shape(2) : 0;
  const mx::Stream stream = cpu_stream();
  Arrays inputs;
  for (const auto* rows : {&keys, &values})
    for (size_t i = 0; i < layers; ++i) {
      const mx::Shape wanted = {batch, int(spec.layers[i].groups), length, int(spec.head_dim)};
      if ((*rows)[i].shape() != wanted || (*rows)[i].size() == 0)
        throw std::invalid_argument("decoder: keys and values do not fit the model");
      inputs.push_back(mx::astype((*rows)[i], mx::float32, stream));
    }
  const GivenStores stores(given, spec, layers, {batch, length, offset + length});
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  stores.add_to(inputs, shapes, dtypes);
  const Arrays outputs = mx::array::make_arrays(
      std::move(shapes), dtypes, std::make_shared<DecoderAppend>(stream, handle.model, stores.kinds(), offset),
      std::move(inputs));
  return stores.updated(outputs.data());
}

}  // namespace

void bind_passes(nb::module_& m) {
  m.def("forward", &forward, nb::arg("decoder"), nb::arg("tokens"), nb::arg("stores"), nb::arg("offset"),
        nb::arg("all_rows"), nb::arg("mode"), nb::arg("dial") = nb::none(),
        "Tokens (B, S) -> (logits (B, S or 1, V), stores). A store is a dict for each layer, {'kind': 'dense', 'keys': "
        "(B, G, capacity, E), 'values': the same}, that holds `offset` tokens; those returned hold the new ones too. "
        "With a dial, dynamic "
        "feed-forwards choose an expert for each token by it; without one, all tokens take the widest.");
  m.def("read", &read, nb::arg("decoder"), nb::arg("tokens"), nb::arg("stores"), nb::arg("offset"), nb::arg("inputs"),
        nb::arg("pairs"), nb::arg("mode"), nb::arg("dial") = nb::none(),
        "(inputs, keys, values, stores): normed inputs of the layers `inputs`, raw keys and raw values of the layers "
        "`pairs`, which rise; rows (B, S, width). Stores as in `forward`, without the last layer's.");
  m.def("append", &append, nb::arg("decoder"), nb::arg("keys"), nb::arg("values"), nb::arg("stores"), nb::arg("offset"),
        "Stores as in `forward`, with the given keys, normed and rotated, and values, (B, G, S, E) of each layer.");
}

}  // namespace mlxeff
