#include "python/decoder_model.h"

#include <nanobind/stl/vector.h>

namespace mlxeff {

DecoderModel::DecoderModel(int64_t dim, int64_t head_dim, float eps, const Named& rope, const mx::array& norm,
                           const Named& embedding, const Named& head) {
  rope.expect({"frequencies", "magnitude"});
  if (dim < 1 || head_dim < 2 || head_dim % 2)
    throw std::invalid_argument("decoder: wanted dim of at least 1 and an even head_dim");
  if (norm.shape() != mx::Shape{int(dim)}) refuse("decoder: norm", "shape " + text_of({int(dim)}), norm);
  spec_.dim = dim;
  spec_.head_dim = head_dim;
  spec_.eps = eps;
  spec_.inverse_frequencies = weights_.floats(rope.array("frequencies", {int(head_dim / 2)}));
  spec_.rope_magnitude = float(rope.number("magnitude"));
  spec_.final_norm = weights_.floats(norm);
  spec_.embedding = weights_.linear(embedding, 0, dim).weight;
  spec_.head = weights_.linear(head, 0, dim);
}

void DecoderModel::add_layer(const nb::dict& norms, const nb::dict& attention, int64_t heads, int64_t groups,
                             int64_t window, const nb::dict& feed_forward) {
  if (decoder_) throw std::logic_error("decoder: a layer after the first call");
  const std::string where = "decoder: layer " + std::to_string(spec_.layers.size());
  if (heads < 1 || groups < 1 || heads % groups || window < 0)
    throw std::invalid_argument(where + ": wanted heads, groups that divide them, and a window of 0 or more");
  const Named vectors(norms, where + ": norms"), matrices(attention, where + ": attention");
  vectors.expect({"attention", "feed_forward", "query", "key"});
  matrices.expect({"query", "key", "value", "output"});
  const int64_t dim = spec_.dim, size = spec_.head_dim;
  const auto norm = [&](const char* name, int64_t n) { return weights_.floats(vectors.array_or_none(name, {int(n)})); };
  const auto matrix = [&](const char* name, int64_t rows, int64_t columns) {
    return weights_.linear(matrices.dict(name), rows, columns);
  };
  DecoderLayer layer = {};
  layer.attention_norm = weights_.floats(vectors.array("attention", {int(dim)}));
  layer.feed_forward_norm = weights_.floats(vectors.array("feed_forward", {int(dim)}));
  layer.q_norm = norm("query", size);
  layer.k_norm = norm("key", size);
  layer.q = matrix("query", heads * size, dim);
  layer.k = matrix("key", groups * size, dim);
  layer.v = matrix("value", groups * size, dim);
  layer.o = matrix("output", dim, heads * size);
  layer.heads = heads;
  layer.groups = groups;
  layer.window = window;
  layer.feed_forward = make_feed_forward(Named(feed_forward, where + ": feed_forward"), weights_, dim);
  spec_.layers.push_back(std::move(layer));
}

Decoder& DecoderModel::decoder() {
  if (!decoder_ && spec_.layers.empty()) throw std::invalid_argument("decoder: wanted layers, got none");
  if (!decoder_) decoder_ = std::make_unique<Decoder>(std::move(spec_));
  return *decoder_;
}

std::vector<std::optional<FeedForward::Usage>> DecoderModel::usage() const {
  std::vector<std::optional<FeedForward::Usage>> each;
  for (const DecoderLayer& layer : (decoder_ ? decoder_->spec() : spec_).layers)
    each.push_back(layer.feed_forward->usage());
  return each;
}

static nb::list list_of(const std::vector<std::optional<FeedForward::Usage>>& usage) {
  nb::list layers;
  for (const auto& layer : usage) {
    if (!layer) {
      layers.append(nb::none());
      continue;
    }
    nb::dict named;
    named["counts"] = nb::cast(layer->counts);
    named["bytes"] = layer->bytes;
    layers.append(named);
  }
  return layers;
}

void bind_decoder(nb::module_& m) {
  nb::class_<DecoderModel>(m, "Decoder", "A decoder whose weights are given by name; see cpu/python/decoder_model.h.")
      .def(
          "__init__",
          [](DecoderModel* self, int64_t dim, int64_t head_dim, float eps, const nb::dict& rope, const mx::array& norm,
             const nb::dict& embedding, const nb::dict& head) {
            new (self) DecoderModel(dim, head_dim, eps, Named(rope, "decoder: rope"), norm,
                                    Named(embedding, "decoder: embedding"), Named(head, "decoder: head"));
          },
          nb::kw_only(), nb::arg("dim"), nb::arg("head_dim"), nb::arg("eps"), nb::arg("rope"), nb::arg("norm"),
          nb::arg("embedding"), nb::arg("head"))
      .def("add_layer", &DecoderModel::add_layer, nb::kw_only(), nb::arg("norms"), nb::arg("attention"),
           nb::arg("heads"), nb::arg("groups"), nb::arg("window"), nb::arg("feed_forward"))
      .def(
          "usage", [](const DecoderModel& self) { return list_of(self.usage()); },
          "Of each layer, what its feed-forward has computed so far: None for a gated one, else {'counts': [...], "
          "'bytes': bytes of weights that its products have read}. The counts are the tokens that took each expert, or "
          "the tokens, and the inputs of gate and up and those of down that they kept.");
}

}  // namespace mlxeff
