// The registry of feed-forward kinds that Python can request. To add a kind, write a file that defines its
// FeedForwardKind and add a line to feed_forwards.cpp.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "decoder/feed_forward.h"
#include "python/weights.h"

namespace mlxeff {

struct FeedForwardKind {
  const char* name;
  // Builds the feed-forward of a model with hidden size `dim` from the dict `given`, or throws std::invalid_argument if
  // the dict does not fit. `weights` keeps the arrays alive that the feed-forward points into.
  std::unique_ptr<FeedForward> (*make)(const Named& given, Weights& weights, int64_t dim);
};

extern const FeedForwardKind gated_kind, dynamic_kind, sparse_kind;

// The names of all kinds.
std::vector<std::string> feed_forward_kinds();

std::unique_ptr<FeedForward> make_feed_forward(Named given, Weights& weights, int64_t dim);

}  // namespace mlxeff
