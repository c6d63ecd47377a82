// The native kernels as MLX primitives: the Python module mlxeff._native. Only the files mlx_* know MLX and Python.
//
// A primitive's work is handed to the stream's command encoder with raw pointers; MLX keeps inputs and outputs alive
// until it is done. So the graph stays lazy and the calls compose with mx.eval, mx.async_eval and streams.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string.h>

#include <string>

#include "decoder/decoder.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "mlx/version.h"
#include "python/mlx_ops.h"
#include "python/mlx_seedlm.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace {

using mlxeff::Decoder;
using mlxeff::DecoderSpec;

using mlxeff::check;
using mlxeff::dtype_of;

// Weights that a decoder reads for as long as it lives: evaluated, row-contiguous, kept.
class Kept {
 public:
  const mx::array& operator()(const mx::array& given) {
    mx::array a = given.flags().row_contiguous ? given : mx::contiguous(given);
    a.eval();
    arrays_.push_back(a);
    return arrays_.back();
  }
  const float* floats(const std::optional<mx::array>& given) {
    return given ? (*this)(mx::astype(*given, mx::float32)).data<float>() : nullptr;
  }

 private:
  std::vector<mx::array> arrays_;
};

// A matrix and its bias: three arrays, the numbers that tell how to read them, the bias or None. By the count of
// numbers:
//   0  dense:             matrix, None, None
//   2  affine-quantised:  packed, scales, biases; group size, bits
//   4  SeedLM blocks:     blocks, None, None, or seeds, coefficients, exponents; columns of W, columns and states of a
//   block, exponent bias
using Arrays = std::tuple<mx::array, std::optional<mx::array>, std::optional<mx::array>, std::vector<int>,
                          std::optional<mx::array>>;

class Model {
 public:
  Model(int64_t dim, int64_t head_dim, float eps, const mx::array& inverse_frequencies, float rope_magnitude,
        const mx::array& final_norm, const Arrays& embedding, const Arrays& head) {
    spec_.dim = dim;
    spec_.head_dim = head_dim;
    spec_.eps = eps;
    spec_.inverse_frequencies = kept_.floats(inverse_frequencies);
    spec_.rope_magnitude = rope_magnitude;
    spec_.final_norm = kept_.floats(final_norm);
    spec_.embedding = matrix(embedding).weight;
    spec_.head = matrix(head);
    if (inverse_frequencies.size() != size_t(head_dim / 2) || head_dim % 2 || final_norm.size() != size_t(dim) ||
        spec_.embedding.K != dim || spec_.head.weight.K != dim)
      throw std::invalid_argument("decoder: sizes do not agree");
  }

  void add_layer(const mx::array& attention_norm, const mx::array& ffn_norm, const std::optional<mx::array>& q_norm,
                 const std::optional<mx::array>& k_norm, const std::vector<Arrays>& matrices, int64_t heads,
                 int64_t groups, int64_t window) {
    if (decoder_) throw std::logic_error("decoder: a layer after the first call");
    if (matrices.size() != 7) throw std::invalid_argument("decoder: wanted 7 matrices");
    mlxeff::Linear m[7];
    for (int i = 0; i < 7; ++i) m[i] = matrix(matrices[size_t(i)]);
    const int64_t size = spec_.head_dim, width = m[4].weight.N;
    const int64_t shapes[7][2] = {{heads * size, spec_.dim}, {groups * size, spec_.dim}, {groups * size, spec_.dim},
                                  {spec_.dim, heads * size}, {width, spec_.dim},         {width, spec_.dim},
                                  {spec_.dim, width}};
    bool good = heads > 0 && groups > 0 && heads % groups == 0 && window >= 0;
    for (int i = 0; i < 7; ++i) good = good && m[i].weight.N == shapes[i][0] && m[i].weight.K == shapes[i][1];
    good = good && attention_norm.size() == size_t(spec_.dim) && ffn_norm.size() == size_t(spec_.dim);
    if (!good) throw std::invalid_argument("decoder: a layer's sizes do not agree");
    spec_.layers.push_back({kept_.floats(attention_norm), kept_.floats(q_norm), kept_.floats(k_norm),
                            kept_.floats(ffn_norm), m[0], m[1], m[2], m[3], m[4], m[5], m[6], heads, groups, window});
  }

  Decoder& decoder() {
    if (!decoder_) decoder_ = std::make_unique<Decoder>(spec_);
    return *decoder_;
  }
  const DecoderSpec& spec() const { return spec_; }

 private:
  mlxeff::Linear matrix(const Arrays& m) {
    const auto& [first, second, third, scheme, bias] = m;
    mlxeff::Linear linear;
    if (scheme.size() == 4)
      linear.weight = seeds(first, second, third, {first.shape(0), scheme[0], scheme[1], scheme[2], scheme[3]});
    else if (scheme.size() == 2 && second && third)
      linear.weight = quantised(first, *second, *third, scheme[0], scheme[1]);
    else if (scheme.empty()) linear.weight = dense(first);
    else throw std::invalid_argument("decoder: wanted a dense, affine-quantised or seed-encoded matrix");
    if (bias && bias->size() != size_t(linear.weight.N))
      throw std::invalid_argument("decoder: a bias does not fit its matrix");
    linear.bias = kept_.floats(bias);
    return linear;
  }

  mlxeff::WeightMatrix quantised(const mx::array& packed, const mx::array& scales, const mx::array& biases, int group,
                                 int bits) {
    if (packed.dtype() != mx::uint32 || packed.ndim() != 2 || scales.shape() != biases.shape() ||
        scales.dtype() != biases.dtype())
      throw std::invalid_argument("decoder: wanted an affine-quantised matrix");
    const int64_t rows = packed.shape(0), columns = int64_t(packed.shape(1)) * 32 / bits;
    if (scales.shape() != mx::Shape{packed.shape(0), int(columns / group)})
      throw std::invalid_argument("decoder: scales do not fit their matrix");
    return mlxeff::WeightMatrix::of(mlxeff_qweight{kept_(packed).data<uint32_t>(), kept_(scales).data<void>(),
                                                   kept_(biases).data<void>(), rows, columns, columns, bits, group,
                                                   dtype_of(scales)});
  }

  mlxeff::WeightMatrix seeds(const mx::array& first, const std::optional<mx::array>& second,
                             const std::optional<mx::array>& third, const mlxeff::SeedLayout& layout) {
    std::vector<mx::array> arrays = {kept_(first)};
    if (second && third) arrays.insert(arrays.end(), {kept_(*second), kept_(*third)});
    layout.check_arrays(arrays);
    return mlxeff::WeightMatrix::of(layout.weight(arrays, 0));
  }

  mlxeff::WeightMatrix dense(const mx::array& weight) {
    if (weight.ndim() != 2) throw std::invalid_argument("decoder: wanted a matrix");
    return mlxeff::WeightMatrix::of(kept_(weight).data<void>(), dtype_of(weight), weight.shape(0), weight.shape(1));
  }

  Kept kept_;
  DecoderSpec spec_ = {};
  std::unique_ptr<Decoder> decoder_;
};

// Each output of a primitive holds all inputs, so that no input of one with several outputs seems free to be reused.
// MLX drops these references right after the evaluation, unless the graph is being traced; dropping those of the other
// outputs before it lets `is_donatable` tell whether anybody else holds a buffer.
void drop_inputs_of_siblings(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (const mx::array& output : outputs)
    if (output.is_tracer()) return;
  for (mx::array& output : outputs)
    if (&output.inputs() != &inputs) output.inputs().clear();
}

// The cache buffers of a primitive, keys of each layer and then values of each layer: each output is the input's own
// memory where nobody else holds it, or a copy.
class CacheUpdate {
 public:
  CacheUpdate(const mx::array* inputs, mx::array* outputs, size_t layers)
      : kv_(layers), copies_(2 * layers, {nullptr, 0}) {
    for (size_t i = 0; i < 2 * layers; ++i) {
      const mx::array& in = inputs[i];
      mx::array& out = outputs[i];
      if (!in.flags().row_contiguous) throw std::invalid_argument("decoder: wanted row-contiguous cache buffers");
      if (in.is_donatable()) {
        out.copy_shared_buffer(in);
      } else {
        out.set_data(mx::allocator::malloc(out.nbytes()));
        copies_[i] = {in.data<void>(), in.nbytes()};
      }
      mlxeff::KvBuffer& buffer = kv_[i % layers];
      (i < layers ? buffer.keys : buffer.values) = out.data<void>();
      buffer.capacity = out.shape(2);
      buffer.dtype = dtype_of(out);
    }
  }

  // In the task, once: the buffers, as they were before it.
  const mlxeff::KvBuffer* buffers() const {
    for (size_t i = 0; i < copies_.size(); ++i)
      if (copies_[i].first)
        memcpy(i < kv_.size() ? kv_[i].keys : kv_[i - kv_.size()].values, copies_[i].first, copies_[i].second);
    return kv_.data();
  }

 private:
  std::vector<mlxeff::KvBuffer> kv_;
  std::vector<std::pair<const void*, size_t>> copies_;
};

// The shape of each layer's buffers, keys and then values; refuses those that do not fit the model or have no room for
// `end` tokens.
void add_buffers(const DecoderSpec& spec, size_t layers, int batch, int64_t end, const std::vector<mx::array>& keys,
                 const std::vector<mx::array>& values, std::vector<mx::array>& inputs, std::vector<mx::Shape>& shapes,
                 std::vector<mx::Dtype>& dtypes) {
  if (keys.size() != layers || values.size() != layers)
    throw std::invalid_argument("decoder: wanted a cache buffer for each layer");
  for (const auto* buffers : {&keys, &values})
    for (size_t i = 0; i < layers; ++i) {
      const mx::array& buffer = (*buffers)[i];
      const mx::Shape wanted = {batch, int(spec.layers[i].groups), keys[i].shape(2), int(spec.head_dim)};
      if (buffer.shape() != wanted || buffer.shape(2) < end || buffer.dtype() != keys[i].dtype())
        throw std::invalid_argument("decoder: a cache buffer does not fit");
      dtype_of(buffer);
      inputs.push_back(buffer);
      shapes.push_back(buffer.shape());
      dtypes.push_back(buffer.dtype());
    }
}

// What a pass is for: logits, or some of what each layer reads (see LayerReading).
struct Purpose {
  bool all_logits = false;
  std::vector<int> inputs = {}, pairs = {};  // layers, rising; without any the pass gives logits
  bool reads() const { return !inputs.empty() || !pairs.empty(); }
};

// Inputs: tokens, keys of each layer, values of each layer. Outputs: logits, or the inputs, raw keys and raw values of
// the layers of the purpose; then the buffers with the new tokens in them. A reading leaves out the last layer's
// buffers.
class DecoderForward : public mx::Primitive {
 public:
  DecoderForward(mx::Stream stream, std::shared_ptr<Model> model, int64_t offset, Purpose purpose, int mode)
      : mx::Primitive(stream), model_(std::move(model)), offset_(offset), purpose_(std::move(purpose)), mode_(mode) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    drop_inputs_of_siblings(inputs, outputs);
    const size_t layers = (inputs.size() - 1) / 2, results = outputs.size() - 2 * layers;
    std::vector<float*> written(results);
    for (size_t i = 0; i < results; ++i) {
      outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
      written[i] = outputs[i].data<float>();
    }
    CacheUpdate cache(inputs.data() + 1, outputs.data() + results, layers);
    const int64_t batch = inputs[0].shape(0), length = inputs[0].shape(1);
    encoder.dispatch([model = model_, cache = std::move(cache), layers, tokens = inputs[0].data<int32_t>(), batch,
                      length, offset = offset_, written = std::move(written), purpose = purpose_, mode = mode_]() {
      const mlxeff::KvBuffer* const kv = cache.buffers();
      mlxeff::Decoder& decoder = model->decoder();
      if (!purpose.reads())
        return check(decoder.forward(tokens, batch, length, offset, kv, written[0], purpose.all_logits, mode));
      std::vector<mlxeff::LayerReading> readings(layers + 1);
      float* const* next = written.data();
      for (const int i : purpose.inputs) readings[size_t(i)].input = *next++;
      for (const int i : purpose.pairs) readings[size_t(i)].keys = *next++;
      for (const int i : purpose.pairs) readings[size_t(i)].values = *next++;
      check(decoder.read(tokens, batch, length, offset, kv, readings.data(), mode));
    });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("decoder: has no GPU form");
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
                             const std::vector<mx::array>&) override {
    throw std::invalid_argument(
        "native decoder: has no gradient; call model.train() first, which computes operator by operator");
  }
  const char* name() const override { return "MlxeffDecoder"; }

 private:
  std::shared_ptr<Model> model_;
  int64_t offset_;
  Purpose purpose_;
  int mode_;
};

// What Python holds. A task in flight shares the model itself, never a Python object: it may outlive the interpreter.
struct Handle {
  std::shared_ptr<Model> model;
};

std::vector<mx::array> run(const Handle& handle, const mx::array& tokens, const std::vector<mx::array>& keys,
                           const std::vector<mx::array>& values, int64_t offset, Purpose purpose, int mode) {
  const DecoderSpec& spec = handle.model->spec();
  const size_t layers = spec.layers.size() - (purpose.reads() ? 1 : 0);
  for (const auto* read : {&purpose.inputs, &purpose.pairs})
    for (size_t i = 0; i < read->size(); ++i)
      if ((*read)[i] < (i ? (*read)[i - 1] + 1 : 0) || size_t((*read)[i]) > layers)
        throw std::invalid_argument("decoder: wanted rising layers to read");
  if (tokens.ndim() != 2 || tokens.size() < 1) throw std::invalid_argument("decoder: wanted tokens of shape (B, S)");
  const int batch = tokens.shape(0), length = tokens.shape(1);
  const mx::Stream stream = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs = {mx::contiguous(mx::astype(tokens, mx::int32, stream), false, stream)};
  std::vector<mx::Shape> shapes;
  if (!purpose.reads()) shapes.push_back({batch, purpose.all_logits ? length : 1, int(spec.head.weight.N)});
  shapes.insert(shapes.end(), purpose.inputs.size(), {batch, length, int(spec.dim)});
  for (int kind = 0; kind < 2; ++kind)
    for (const int i : purpose.pairs)
      shapes.push_back({batch, length, int(spec.layers[size_t(i)].groups * spec.head_dim)});
  std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
  add_buffers(spec, layers, batch, offset + length, keys, values, inputs, shapes, dtypes);
  return mx::array::make_arrays(
      std::move(shapes), dtypes,
      std::make_shared<DecoderForward>(stream, handle.model, offset, std::move(purpose), mode), std::move(inputs));
}

// Inputs: raw keys of each layer, raw values of each layer, both (B, G, S, E) float32; then the buffers, which with the
// new tokens in them are the outputs.
class DecoderAppend : public mlxeff::NativePrimitive {
 public:
  DecoderAppend(mx::Stream stream, std::shared_ptr<Model> model, int64_t offset)
      : NativePrimitive(stream, "native append"), model_(std::move(model)), offset_(offset) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    drop_inputs_of_siblings(inputs, outputs);
    const size_t layers = outputs.size() / 2;
    std::vector<mlxeff::KvRows> given(layers);
    for (size_t i = 0; i < layers; ++i) given[i] = {heads(inputs[i]), heads(inputs[layers + i])};
    const int64_t batch = inputs[0].shape(0), length = inputs[0].shape(2);
    dispatch([model = model_, cache = CacheUpdate(inputs.data() + 2 * layers, outputs.data(), layers),
              given = std::move(given), batch, length, offset = offset_] {
      check(model->decoder().append(batch, length, offset, cache.buffers(), given.data()));
    });
  }

 private:
  std::shared_ptr<Model> model_;
  int64_t offset_;
};

std::vector<mx::array> append(const Handle& handle, const std::vector<mx::array>& given_keys,
                              const std::vector<mx::array>& given_values, const std::vector<mx::array>& keys,
                              const std::vector<mx::array>& values, int64_t offset) {
  const DecoderSpec& spec = handle.model->spec();
  const size_t layers = spec.layers.size();
  if (given_keys.size() != layers || given_values.size() != layers)
    throw std::invalid_argument("decoder: wanted keys and values of each layer");
  const int batch = given_keys[0].ndim() == 4 ? given_keys[0].shape(0) : 0, length = batch ? given_keys[0].shape(2) : 0;
  const mx::Stream stream = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs;
  for (const auto* given : {&given_keys, &given_values})
    for (size_t i = 0; i < layers; ++i) {
      const mx::Shape wanted = {batch, int(spec.layers[i].groups), length, int(spec.head_dim)};
      if ((*given)[i].shape() != wanted || (*given)[i].size() == 0)
        throw std::invalid_argument("decoder: keys and values do not fit the model");
      inputs.push_back(mx::astype((*given)[i], mx::float32, stream));
    }
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  add_buffers(spec, layers, batch, offset + length, keys, values, inputs, shapes, dtypes);
  return mx::array::make_arrays(std::move(shapes), dtypes,
                                std::make_shared<DecoderAppend>(stream, handle.model, offset), std::move(inputs));
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("mlx_version") = std::to_string(MLX_VERSION_MAJOR) + "." + std::to_string(MLX_VERSION_MINOR) + "." +
                          std::to_string(MLX_VERSION_PATCH);
  m.def("accepts", [](const mx::array&) {}, "Fails where arrays of this MLX are unknown here.");
  m.attr("EXACT") = int(MLXEFF_EXACT);
  m.attr("COMPUTE_BF16") = int(MLXEFF_COMPUTE_BF16);
  m.attr("COMPUTE_INT8") = int(MLXEFF_COMPUTE_INT8);
  m.def("isa", [] { return std::string(mlxeff_isa()); }, "Name of the instruction-set level in use.");
  m.def(
      "isa_available", [] { return std::string(mlxeff_isa_available()); },
      "Names of the levels usable here, lowest first.");
  m.def(
      "set_isa", [](std::optional<std::string> name) { check(mlxeff_set_isa(name ? name->c_str() : nullptr)); },
      nb::arg("name").none());
  m.def("num_threads", [] { return mlxeff_num_threads(); });
  m.def("set_num_threads", [](int n) { check(mlxeff_set_num_threads(n)); }, "0 restores the default.");
  mlxeff::bind_seedlm(m);
  nb::class_<Handle>(m, "Decoder")
      .def("__init__",
           [](Handle* self, int64_t dim, int64_t head_dim, float eps, const mx::array& inverse_frequencies,
              float rope_magnitude, const mx::array& final_norm, const Arrays& embedding, const Arrays& head) {
             new (self) Handle{std::make_shared<Model>(dim, head_dim, eps, inverse_frequencies, rope_magnitude,
                                                       final_norm, embedding, head)};
           })
      .def(
          "add_layer",
          [](Handle& self, const mx::array& attention_norm, const mx::array& ffn_norm,
             const std::optional<mx::array>& q_norm, const std::optional<mx::array>& k_norm,
             const std::vector<Arrays>& matrices, int64_t heads, int64_t groups, int64_t window) {
            self.model->add_layer(attention_norm, ffn_norm, q_norm, k_norm, matrices, heads, groups, window);
          },
          nb::arg("attention_norm"), nb::arg("ffn_norm"), nb::arg("q_norm").none(), nb::arg("k_norm").none(),
          nb::arg("matrices"), nb::arg("heads"), nb::arg("groups"), nb::arg("window"));
  mlxeff::bind_ops(m);
  m.def(
      "forward",
      [](const Handle& decoder, const mx::array& tokens, const std::vector<mx::array>& keys,
         const std::vector<mx::array>& values, int64_t offset, bool all_rows,
         int mode) { return run(decoder, tokens, keys, values, offset, {all_rows}, mode); },
      nb::arg("decoder"), nb::arg("tokens"), nb::arg("keys"), nb::arg("values"), nb::arg("offset"), nb::arg("all_rows"),
      nb::arg("mode"), "(logits, keys..., values...): the buffers hold the new tokens after `offset`.");
  m.def(
      "read",
      [](const Handle& decoder, const mx::array& tokens, const std::vector<mx::array>& keys,
         const std::vector<mx::array>& values, int64_t offset, std::vector<int> inputs, std::vector<int> pairs,
         int mode) {
        if (inputs.empty() && pairs.empty()) throw std::invalid_argument("decoder: wanted layers to read, got none");
        return run(decoder, tokens, keys, values, offset, {false, std::move(inputs), std::move(pairs)}, mode);
      },
      nb::arg("decoder"), nb::arg("tokens"), nb::arg("keys"), nb::arg("values"), nb::arg("offset"), nb::arg("inputs"),
      nb::arg("pairs"), nb::arg("mode"),
      "(read..., keys..., values...) without the last layer's buffers; read: normed inputs of the layers `inputs`, raw "
      "keys, then raw values of the "
      "layers `pairs`, which rise; rows (B, S, width).");
  m.def("append", &append, nb::arg("decoder"), nb::arg("given_keys"), nb::arg("given_values"), nb::arg("keys"),
        nb::arg("values"), nb::arg("offset"),
        "(keys..., values...): the buffers hold the given keys, normed and rotated, and values, (B, G, S, E) of each "
        "layer, after `offset`.");
}
