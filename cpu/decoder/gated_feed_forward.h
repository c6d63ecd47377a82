// The gated feed-forward (SwiGLU): down(silu(gate(x)) * up(x)).
#pragma once
#include "decoder/feed_forward.h"

namespace mlxeff {

class GatedFeedForward : public FeedForward {
 public:
  // The weights of gate and up are (width, dim), those of down are (dim, width). `order` is null, or (width) of the
  // column of down that belongs to each row of gate and up; it must outlive this object.
  GatedFeedForward(const Linear& gate, const Linear& up, const Linear& down, const int32_t* order = nullptr)
      : FeedForward(down.bias), gate_(gate), up_(up), down_(down), order_(order) {}

  Needs needs(int64_t rows, const RunOptions& options) const override;
  void run(PassTeam& pass, const FeedForwardRows& rows, void* workspace) override;

 private:
  Linear gate_, up_, down_;
  const int32_t* order_;
};

// to[order[i]] = from[i].
inline void reorder(const float* from, const int32_t* order, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[order[i]] = from[i];
}

}  // namespace mlxeff
