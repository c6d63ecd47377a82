// The interface of a key/value store: the cache of one decoder layer, which also computes the attention over its
// content.
//
// The members `batch`, `length`, `groups` and `size` are the shape letters B, S, G and E of attention_kernels.h. All
// rows are fp32. A row is one new token of one sequence: row r is token r % length of sequence r / length.
#pragma once
#include "attention/attention_kernels.h"
#include "base/pool.h"
#include "base/row_function.h"
#include "base/run_options.h"

namespace mlxeff {

// The tokens that a pass adds: `length` tokens to each of `batch` sequences. The last token of each is at position end
// - 1.
struct Span {
  int64_t batch, length, end;
  int64_t rows() const { return batch * length; }
  int64_t position(int64_t token) const { return end - length + token; }
};

// The number of query heads, of key/value heads, and of elements in a head. With a `window` other than 0, a query
// attends only to the last `window` tokens; 0 means full attention.
struct AttentionSizes {
  int64_t heads, groups, size, window;
};

// The keys of one row, ready for RoPE, and its values. Consecutive heads of the `groups` heads are `key_step` and
// `value_step` floats apart.
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
  const float *cosines, *sines;  // RoPE tables of the new tokens' positions, (length, size / 2)
  // Completes row r before it is stored: adds biases, normalises its keys and queries, and rotates its queries. Must be
  // called exactly once for each row. The returned pointers stay valid until the pass appends the rows of another
  // layer.
  RowFunction<NewRow> finish;

  // Applies RoPE to the keys of row r and writes them to `to`: one token of `groups` heads, of any dtype.
  void rotate(int64_t r, const NewRow& row, const mlxeff_heads& to) const;

  // Completes all rows and stores them in `keys` and `values`, row-major (batch, groups, capacity, size) arrays of
  // `dtype`. Every member of the team calls this once.
  void store(Team& team, void* keys, void* values, int dtype, int64_t capacity) const;
};

// The rotated queries of one layer, and `attended`, the output of their attention; both (batch, length, heads, size).
struct Queries {
  Span span;
  AttentionSizes sizes;
  float *queries, *attended;
};

// The arguments of attention over all `span.end` tokens, without the arrays.
AttentionArgs attention_args(const Span& span, const AttentionSizes& sizes, const RunOptions& options);

// A store object serves one pass and already holds the tokens of earlier passes. Every member of the team calls
// `append` once and then `attend` once; both return an MLXEFF_* code for the work of that member. A pass that needs
// only the results of the last tokens calls `attend` with a shorter span that has the same `end`.
//
// Every member goes through the same steps (calls of Team::for_chunks), even a member that joins after a step, or the
// whole pass, has been completed by the others. The number of steps and of their pieces may therefore depend only on
// values that stay constant during the pass, and not on the contents of the workspace: another layer overwrites the
// workspace as soon as the call returns.
class KvStore {
 public:
  virtual ~KvStore() = default;

  // True if the store has room for the tokens of the span.
  virtual bool fits(const Span& span) const = 0;
  // Bytes of workspace that `append` and `attend` need with a team of `threads` members.
  virtual int64_t workspace_bytes(const Span& span, const AttentionSizes& sizes, const RunOptions& options,
                                  int threads) const = 0;

  // Writes the new keys and values to the store, at the positions of their tokens.
  virtual int append(Team& team, const NewRows& rows, const RunOptions& options, void* workspace) = 0;
  // Computes causal attention: each query attends to the stored tokens up to and including its own.
  virtual int attend(Team& team, const Queries& queries, const RunOptions& options, void* workspace) = 0;
};

}  // namespace mlxeff
