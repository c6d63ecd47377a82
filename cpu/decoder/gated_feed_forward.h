// The gated feed-forward (SwiGLU): down(silu(gate(x)) * up(x)).
#pragma once
#include "decoder/feed_forward.h"

namespace mlxeff {

class GatedFeedForward : public FeedForward {
 public:
  // The weights of gate and up are (width, dim), those of down are (dim, width).
  GatedFeedForward(const Linear& gate, const Linear& up, const Linear& down)
      : FeedForward(down.bias), gate_(gate), up_(up), down_(down) {}

  Needs needs(int64_t rows, const RunOptions& options) const override;
  void run(PassTeam& pass, const FeedForwardRows& rows, void* workspace) override;

 private:
  Linear gate_, up_, down_;
};

}  // namespace mlxeff
