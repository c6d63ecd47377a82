// The interface of a decoder layer's feed-forward, which maps the normalised hidden states to the term that is added to
// the residual.
#pragma once
#include <optional>
#include <vector>

#include "decoder/pass_team.h"

namespace mlxeff {

// The input x and the output `out` of a feed-forward, both fp32 (rows, dim). make_row(r) computes row r of x; the
// feed-forward must call it exactly once for each row, within a single step, which PassTeam::multiply does. make_row
// may read the previous content of `out`, so `out` must not be written before a later step.
struct FeedForwardRows {
  float *x, *out;
  int64_t rows;
  RowFunction<void> make_row;
};

// Every member of the team calls `run` once per pass and goes through the same steps (calls of Team::for_chunks), even
// a member that joins after a step, or the whole pass, has been completed by the others. The number of steps and of
// their pieces may therefore depend only on values that stay constant during the pass, and not on the contents of the
// workspace: another layer overwrites the workspace as soon as `run` returns. The passes of one decoder never overlap,
// so a feed-forward may keep usage counters without synchronising passes.
class FeedForward {
 public:
  // `bias` (dim) is null or a vector that the pass adds to every row together with `out`; `run` must not add it.
  explicit FeedForward(const float* bias) : bias(bias) {}
  virtual ~FeedForward() = default;

  const float* const bias;

  // For a pass over `rows` rows: the bytes of workspace that `run` needs, and the prepared_bytes of its largest
  // PassTeam::multiply.
  struct Needs {
    int64_t workspace, prepared;
  };
  virtual Needs needs(int64_t rows, const RunOptions& options) const = 0;

  // What a feed-forward that leaves out work has computed since it was made: counts whose meaning is its own, such as
  // the tokens that took each expert, and the bytes of the weights that its products have read.
  struct Usage {
    std::vector<int64_t> counts;
    int64_t bytes;
  };
  // Empty for a feed-forward that always computes all. May be called while a pass runs.
  virtual std::optional<Usage> usage() const { return std::nullopt; }

  // Computes out = feed_forward(x) without `bias`.
  virtual void run(PassTeam& pass, const FeedForwardRows& rows, void* workspace) = 0;
};

}  // namespace mlxeff
