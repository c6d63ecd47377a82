// The dynamic feed-forward (DynaMoE, arXiv 2502.12325): a gated feed-forward with nested experts. Expert e is a gated
// feed-forward of the first width[e] neurons, and a router picks an expert for each row. What lies beyond the expert's
// width is neither computed nor read.
#pragma once
#include <atomic>
#include <vector>

#include "decoder/expert_router.h"
#include "decoder/gated_feed_forward.h"

namespace mlxeff {

// An expert. Its output is down h, or down h + left (right h) with a low-rank correction, for its activations h
// (width).
struct DynamicExpert {
  WeightMatrix down;             // (dim, width)
  WeightMatrix left{}, right{};  // (dim, rank) and (rank, width), or both without rows

  int64_t width() const { return down.K; }
  int64_t rank() const { return right.N; }
};

class DynamicFeedForward : public FeedForward {
 public:
  // `gate`, `up` and `down` are those of the widest expert; the bias of `down` is that of all experts. `narrower` are
  // the other experts by rising width, at least one and fewer than ExpertRouter::most_experts. `order` is empty, or
  // has the column of `down` that belongs to each neuron of the widest expert.
  DynamicFeedForward(const Linear& gate, const Linear& up, const Linear& down, std::vector<DynamicExpert> narrower,
                     ExpertRouter router, std::vector<int32_t> order = {});

  Needs needs(int64_t rows, const RunOptions& options) const override;
  void run(PassTeam& pass, const FeedForwardRows& rows, void* workspace) override;
  // Counts the tokens of each expert; matrices once for each product that reads them, however many rows it has, and the
  // router's weight once for each routed pass. Biases are not counted.
  std::optional<Usage> usage() const override;

 private:
  class Routed;

  void run_widest(PassTeam& pass, const FeedForwardRows& rows, void* workspace);
  int64_t experts() const { return int64_t(experts_.size()); }
  int64_t dim() const { return gate_.weight.K; }
  int64_t width() const { return gate_.weight.N; }

  Linear gate_, up_;
  std::vector<DynamicExpert> experts_;  // by rising width
  ExpertRouter router_;
  std::vector<int32_t> order_;
  GatedFeedForward widest_;
  int64_t widest_rank_ = 0;
  std::vector<std::atomic<int64_t>> tokens_;
  std::atomic<int64_t> bytes_{0};
};

}  // namespace mlxeff
