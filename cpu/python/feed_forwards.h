// The kinds of feed-forward that Python may give. A new one is a file that defines its FeedForwardKind, and a line in
// feed_forwards.cpp.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "decoder/feed_forward.h"
#include "python/weights.h"

namespace mlxeff {

struct FeedForwardKind {
  const char* name;
  // Of a model of `dim`; refuses what does not fit. `weights` keeps the arrays that it refers to.
  std::unique_ptr<FeedForward> (*make)(const Named& given, Weights& weights, int64_t dim);
};

extern const FeedForwardKind gated_kind;

// The names of all kinds.
std::vector<std::string> feed_forward_kinds();

std::unique_ptr<FeedForward> make_feed_forward(Named given, Weights& weights, int64_t dim);

}  // namespace mlxeff
