// Builds the sparse feed-forward from a dict:
//
//   {"kind": "sparse",
//    "gate_up": columns (2 F, dim), "down": columns (dim, F), with a "bias" of down only,
//    "input_weights": (dim), "neuron_weights": (F)}
//
// where columns are {"kind": "columns", "bias": array or None} and
//   affine  "weight": uint32 (inputs * outputs * bits / 32), "scales", "biases": (inputs / group * outputs),
//           "group_size", "bits": 4 or 8
//   dense   "weight": (inputs, outputs)
// columns/column_matrix.h says how the weights of an input lie, decoder/sparse_feed_forward.h how gate and up do.
#include "decoder/sparse_feed_forward.h"
#include "python/feed_forwards.h"

namespace mlxeff {
namespace {

struct ColumnsKind {
  const char* name;
};
constexpr ColumnsKind columns_kind = {"columns"};
constexpr const ColumnsKind* known_kinds[] = {&columns_kind};

ColumnMatrix columns(Named given, Weights& weights, int64_t N, int64_t K) {
  given.kind(known_kinds);
  given.expect({"weight"}, {"scales", "biases", "group_size", "bits", "bias"});
  const mx::array& weight = given.array("weight");
  ColumnMatrix made = {K, N, nullptr, 0, MLXEFF_F32, K, nullptr, nullptr};
  if (given.has("bits")) {
    given.expect({"weight", "scales", "biases", "group_size", "bits"}, {"bias"});
    made.bits = int(given.integer("bits")), made.group = given.integer("group_size");
    if (made.bits != 4 && made.bits != 8) given.refuse("bits: wanted 4 or 8, got " + std::to_string(made.bits));
    if (made.group != 32 && made.group != 64 && made.group != 128) given.refuse("group_size: wanted 32, 64 or 128");
    if (K % made.group) given.refuse("wanted whole groups of inputs, got " + std::to_string(K) + " inputs");
    const mx::Shape groups = {int(K / made.group * N)};
    const mx::array &scales = given.array("scales", groups), &biases = given.array("biases", groups);
    if (scales.dtype() != biases.dtype()) given.refuse("biases: wanted the type of scales");
    made.scales = weights.keep(scales).data<void>(), made.biases = weights.keep(biases).data<void>();
    made.dtype = dtype_of(scales);
    if (weight.dtype() != mx::uint32) given.refuse("weight: wanted uint32");
  } else {
    made.dtype = dtype_of(weight);
  }
  const mx::Shape shape = made.bits ? mx::Shape{int(K * N * made.bits / 32)} : mx::Shape{int(K), int(N)};
  if (weight.shape() != shape)
    given.refuse("weight: wanted shape " + text_of(shape) + ", got " + text_of(weight.shape()));
  if (N % 64 || K % 32)
    given.refuse("wanted multiples of 64 outputs and of 32 inputs, got " + text_of({int(N), int(K)}));
  made.weight = weights.keep(weight).data<void>();
  return made;
}

std::unique_ptr<FeedForward> make_sparse(const Named& given, Weights& weights, int64_t dim) {
  given.expect({"gate_up", "down", "input_weights", "neuron_weights"});
  const int64_t width = int64_t(given.array("neuron_weights").size());
  const ColumnMatrix gate_up = columns(given.dict("gate_up"), weights, 2 * width, dim);
  if (given.dict("gate_up").has("bias") && given.dict("gate_up").array_or_none("bias"))
    given.refuse("gate_up: wanted no bias");
  const ColumnMatrix down = columns(given.dict("down"), weights, dim, width);
  return std::make_unique<SparseFeedForward>(gate_up, down, weights.floats(given.array("input_weights", {int(dim)})),
                                             weights.floats(given.array("neuron_weights", {int(width)})),
                                             weights.floats(given.dict("down").array_or_none("bias", {int(dim)})));
}

}  // namespace

const FeedForwardKind sparse_kind = {"sparse", make_sparse};

}  // namespace mlxeff
