// Builds the dynamic feed-forward from a dict:
//
//   {"kind": "dynamic",
//    "gate": matrix (F, dim), "up": matrix (F, dim), "down": matrix (dim, F),    of the widest expert
//    "experts": [{"width": k, "down": matrix (dim, k) or None,
//                 "left": matrix (dim, rank) or None, "right": matrix (rank, k) or None}, ...],   the others, rising
//    "router": {"rule": "lagrangian" or "tail", "weight": (scores, dim), "bias": (scores)},
//    "prices": (experts),                                                        by rising width, the widest last
//    "order": int32 (F) or None}     of the column of the widest down that belongs to each neuron; None: in their order
//
// With an order each expert has a matrix `down`. An expert without a matrix `down` takes the first k columns of the
// widest one's. decoder/expert_router.h says what the router does.
#include <cmath>

#include "decoder/dynamic_feed_forward.h"
#include "python/feed_forwards.h"

namespace mlxeff {
namespace {

WeightMatrix matrix_without_bias(const Named& given, const char* name, Weights& weights, int64_t rows,
                                 int64_t columns) {
  const Linear linear = weights.linear(given.dict(name), rows, columns);
  if (linear.bias) given.refuse(std::string(name) + ": wanted no bias, that of the widest down is added");
  return linear.weight;
}

WeightMatrix first_columns(const WeightMatrix& down, int64_t width, const Named& given) {
  WeightMatrix part;
  if (slice_columns(down, 0, width, &part) != MLXEFF_OK)
    given.refuse("width: wanted a multiple of the group size " + std::to_string(down.quantised.group) +
                 " of the widest down, or a down of its own, got " + std::to_string(width));
  return part;
}

DynamicExpert expert(const Named& given, Weights& weights, const WeightMatrix& down, int64_t narrower) {
  given.expect({"width"}, {"down", "left", "right"});
  const int64_t width = given.integer("width"), dim = down.N;
  if (width <= narrower || width >= down.K)
    given.refuse("width: wanted rising widths from 1 to " + std::to_string(down.K - 1) + ", got " +
                 std::to_string(width));
  DynamicExpert made = {given.has("down") ? matrix_without_bias(given, "down", weights, dim, width)
                                          : first_columns(down, width, given)};
  if (given.has("left") != given.has("right")) given.refuse("wanted both left and right, or neither");
  if (!given.has("right")) return made;
  made.right = matrix_without_bias(given, "right", weights, 0, width);
  made.left = matrix_without_bias(given, "left", weights, dim, made.rank());
  return made;
}

const float* finite(const Named& given, const char* name, const mx::Shape& shape, Weights& weights) {
  const mx::array& array = given.array(name, shape);
  const float* const values = weights.floats(array);
  for (size_t i = 0; i < array.size(); ++i)
    if (!std::isfinite(values[i])) given.refuse(std::string(name) + ": wanted finite numbers");
  return values;
}

ExpertRouter router(const Named& given, const Named& prices_of, Weights& weights, int64_t dim, int64_t experts) {
  given.expect({"rule", "weight", "bias"});
  const std::string rule = given.text("rule");
  if (rule != "lagrangian" && rule != "tail") given.refuse("unknown rule '" + rule + "', known are lagrangian, tail");
  ExpertRouter made = {
      rule == "lagrangian" ? ExpertRouter::Rule::lagrangian : ExpertRouter::Rule::tail, nullptr, nullptr, dim, {}};
  const float* const prices = finite(prices_of, "prices", {int(experts)}, weights);
  made.prices.assign(prices, prices + experts);
  made.weight = finite(given, "weight", {int(made.scores()), int(dim)}, weights);
  made.bias = finite(given, "bias", {int(made.scores())}, weights);
  return made;
}

std::vector<int32_t> order(const Named& given, Weights& weights, int64_t width) {
  const std::optional<mx::array> array = given.array_or_none("order");
  if (!array) return {};
  if (array->dtype() != mx::int32 || array->shape() != mx::Shape{int(width)})
    given.refuse("order: wanted int32 of shape " + text_of({int(width)}) + ", got " + text_of(array->shape()));
  const int32_t* const columns = weights.keep(*array).data<int32_t>();
  std::vector<bool> seen(size_t(width), false);
  for (int64_t i = 0; i < width; ++i) {
    if (columns[i] < 0 || columns[i] >= width || seen[size_t(columns[i])])
      given.refuse("order: wanted each column once");
    seen[size_t(columns[i])] = true;
  }
  return {columns, columns + width};
}

std::unique_ptr<FeedForward> make_dynamic(const Named& given, Weights& weights, int64_t dim) {
  given.expect({"gate", "up", "down", "experts", "router", "prices"}, {"order"});
  const Linear gate = weights.linear(given.dict("gate"), 0, dim);
  const int64_t width = gate.weight.N;
  const Linear up = weights.linear(given.dict("up"), width, dim), down = weights.linear(given.dict("down"), dim, width);
  std::vector<DynamicExpert> narrower;
  for (const Named& each : given.dicts("experts"))
    narrower.push_back(expert(each, weights, down.weight, narrower.empty() ? 0 : narrower.back().width()));
  if (narrower.empty() || narrower.size() >= ExpertRouter::most_experts)
    given.refuse("experts: wanted 1 to " + std::to_string(ExpertRouter::most_experts - 1) + " beside the widest, got " +
                 std::to_string(narrower.size()));
  ExpertRouter made = router(given.dict("router"), given, weights, dim, int64_t(narrower.size()) + 1);
  std::vector<int32_t> columns = order(given, weights, width);
  if (!columns.empty())
    for (const Named& each : given.dicts("experts"))
      if (!each.has("down")) given.refuse("order: wanted experts with a down of their own");
  return std::make_unique<DynamicFeedForward>(gate, up, down, std::move(narrower), std::move(made), std::move(columns));
}

}  // namespace

const FeedForwardKind dynamic_kind = {"dynamic", make_dynamic};

}  // namespace mlxeff
