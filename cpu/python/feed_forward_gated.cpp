// Builds the gated feed-forward from {"kind": "gated", "gate": matrix (width, dim), "up": matrix (width, dim), "down":
// matrix (dim, width)}.
#include "decoder/gated_feed_forward.h"
#include "python/feed_forwards.h"

namespace mlxeff {

static std::unique_ptr<FeedForward> make_gated(const Named& given, Weights& weights, int64_t dim) {
  given.expect({"gate", "up", "down"});
  const Linear gate = weights.linear(given.dict("gate"), 0, dim);
  const int64_t width = gate.weight.N;
  return std::make_unique<GatedFeedForward>(gate, weights.linear(given.dict("up"), width, dim),
                                            weights.linear(given.dict("down"), dim, width));
}

const FeedForwardKind gated_kind = {"gated", make_gated};

}  // namespace mlxeff
