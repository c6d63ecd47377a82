#include "python/feed_forwards.h"

namespace mlxeff {

static const FeedForwardKind* const known_kinds[] = {&gated_kind, &dynamic_kind, &sparse_kind};

std::vector<std::string> feed_forward_kinds() {
  std::vector<std::string> names;
  for (const FeedForwardKind* kind : known_kinds) names.push_back(kind->name);
  return names;
}

std::unique_ptr<FeedForward> make_feed_forward(Named given, Weights& weights, int64_t dim) {
  return given.kind(known_kinds)->make(given, weights, dim);
}

}  // namespace mlxeff
