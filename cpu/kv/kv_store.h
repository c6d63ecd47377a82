// What one layer of a decoder remembers of the tokens it has seen: a store of keys and values, which attends itself.
//
// Letters as in attention_kernels.h; here B is `batch`, S `length`, E `size`. All rows are fp32. A row is one new token
// of one sequence: row r is token r % length of sequence r / length.
#pragma once
#include "base/pool.h"
#include "base/row_function.h"
#include "base/run_options.h"

namespace mlxeff {

// The tokens that a pass adds: `length` of each of `batch` sequences, the last one at position end - 1.
struct Span {
  int64_t batch, length, end;
  int64_t rows() const { return batch * length; }
  int64_t position(int64_t token) const { return end - length + token; }
};

// Query heads, key/value heads, elements of a head; window 0: all tokens are attended to, else the last `window`.
struct AttentionSizes {
  int64_t heads, groups, size, window;
};

// Keys, ready to be rotated, and values of one row: `groups` heads, `key_step` and `value_step` floats apart.
struct NewRow {
  const float* keys;
  int64_t key_step;
  const float* values;
  int64_t value_step;
};

// The new keys and values of one layer.
struct NewRows {
  Span span;
  AttentionSizes sizes;
  const float *cosines, *sines;  // of the new tokens' positions, (length, size / 2)
  // Finishes row r (biases and norms of its keys, and of the queries that belong to it). To be called once for each
  // row; what it returns stays valid until the pass adds other rows.
  RowFunction<NewRow> finish;

  // The row's keys, rotated to its position, into `to`: one token of `groups` heads, of any dtype.
  void rotate(int64_t r, const NewRow& row, const mlxeff_heads& to) const;
};

// Rotated queries of one layer and where their attention goes, both (batch, length, heads, size).
struct Queries {
  Span span;
  AttentionSizes sizes;
  float *queries, *attended;
};

// A store is opened for one pass and holds the tokens before it. Every member of the team calls `append` once and
// `attend` once, after it; both return the member's MLXEFF_* code. A pass that wants only the last tokens' result
// attends with a shorter span of the same end.
//
// Every member takes the same steps (Team::for_chunks), those too that join when a step, or the whole pass, is done. So
// the number of steps and of their pieces may only depend on what stays the same while the pass runs. The workspace
// does not: what a step leaves there lasts until the call returns, then another layer's takes its place.
class KvStore {
 public:
  virtual ~KvStore() = default;

  // Whether there is room for the span.
  virtual bool fits(const Span& span) const = 0;
  // Bytes that append and attend need beside the store, with a team of `threads`.
  virtual int64_t workspace_bytes(const Span& span, const AttentionSizes& sizes, const RunOptions& options,
                                  int threads) const = 0;

  // Stores the new rows at their positions.
  virtual int append(Team& team, const NewRows& rows, const RunOptions& options, void* workspace) = 0;
  // Causal attention of the queries to the tokens up to their own.
  virtual int attend(Team& team, const Queries& queries, const RunOptions& options, void* workspace) = 0;
};

}  // namespace mlxeff
