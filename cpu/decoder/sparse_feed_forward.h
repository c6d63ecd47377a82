// The sparse feed-forward: a gated feed-forward whose tokens leave out the inputs of its matrices that matter least for
// them. An input counts if its size times its weight reaches a threshold, the pass's dial. What does not count is not
// multiplied, and its column is not read.
#pragma once
#include <atomic>

#include "columns/column_matrix.h"
#include "decoder/feed_forward.h"

namespace mlxeff {

class SparseFeedForward : public FeedForward {
 public:
  static constexpr int64_t few_tokens = 8;  // the most rows of a pass whose rows leave out inputs

  // `gate_up` (2 * width, dim) has gate and up in turns of 32 outputs, those of the same neurons. `down` is (dim,
  // width). The weights of the inputs are (dim) and (width); `bias` is that of down or null.
  SparseFeedForward(const ColumnMatrix& gate_up, const ColumnMatrix& down, const float* input_weights,
                    const float* neuron_weights, const float* bias)
      : FeedForward(bias), gate_up_(gate_up), down_(down), input_weights_(input_weights),
        neuron_weights_(neuron_weights) {}

  Needs needs(int64_t rows, const RunOptions& options) const override;
  // Passes of more rows than few_tokens multiply by all inputs: their rows would leave out different ones, and each
  // column would be read for some of them. Products are exact (fp32) whatever the mode of the pass.
  void run(PassTeam& pass, const FeedForwardRows& rows, void* workspace) override;
  // Counts {rows; inputs of gate and up that rows kept; inputs of down that rows kept}, and the bytes for each row of a
  // few, once for all rows of many.
  std::optional<Usage> usage() const override;

 private:
  void run_few(PassTeam& pass, const FeedForwardRows& rows, float* workspace);
  void run_many(PassTeam& pass, const FeedForwardRows& rows, float* workspace);
  int64_t input_unit() const { return min_of(gate_up_.group, 64); }
  void count(int64_t rows, int64_t inputs, int64_t neurons, int64_t bytes);

  ColumnMatrix gate_up_, down_;
  const float *input_weights_, *neuron_weights_;
  std::atomic<int64_t> rows_{0}, inputs_{0}, neurons_{0}, bytes_{0};
};

}  // namespace mlxeff
