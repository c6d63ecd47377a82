// The feed-forward of one layer of a decoder: from normed rows to what is added to the residual.
#pragma once
#include "decoder/pass_team.h"

namespace mlxeff {

// x (rows, dim) and out (rows, dim) fp32. make_row(r) writes row r of x and is called once for each row, in one step
// (PassTeam::multiply does so); it may read `out`, which is written in later steps only.
struct FeedForwardRows {
  float *x, *out;
  int64_t rows;
  RowFunction<void> make_row;
};

// Every member of the team calls `run` once a pass and takes the same steps (Team::for_chunks), those too that join
// when a step, or the whole pass, is done. So the number of steps and of their pieces may only depend on what stays the
// same while the pass runs. The workspace does not: what a step leaves there lasts until the call returns, then another
// layer's takes its place. A decoder's passes run one at a time: a feed-forward may count what it does.
class FeedForward {
 public:
  // `bias` (dim) is added to every row by the pass, after `out`; null: none.
  explicit FeedForward(const float* bias) : bias(bias) {}
  virtual ~FeedForward() = default;

  const float* const bias;

  // Bytes of workspace, and the most that a multiply of `run` prepares, for `rows` rows.
  struct Needs {
    int64_t workspace, prepared;
  };
  virtual Needs needs(int64_t rows, const RunOptions& options) const = 0;

  // out = the feed-forward of x, without `bias`.
  virtual void run(PassTeam& pass, const FeedForwardRows& rows, void* workspace) = 0;
};

}  // namespace mlxeff
