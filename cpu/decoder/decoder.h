// The native decoder: one call computes a whole transformer (RMSNorm, grouped-query attention with RoPE, feed-forward)
// from token ids to logits. Two interfaces let a model vary: the key/value store of a layer (kv/kv_store.h) and its
// feed-forward (feed_forward.h).
#pragma once
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "base/isa.h"
#include "decoder/feed_forward.h"
#include "kv/kv_store.h"

namespace mlxeff {

// The weights and sizes of one layer. Norm weights are fp32; attention_norm and feed_forward_norm have `dim` elements,
// q_norm and k_norm have `head_dim` and are null if the model does not normalise its queries or keys. `heads` counts
// query heads and `groups` key/value heads. `window` is the sliding attention window in tokens; 0 means full attention.
struct DecoderLayer {
  const float *attention_norm, *q_norm, *k_norm, *feed_forward_norm;
  Linear q, k, v, o;
  int64_t heads, groups, window;
  std::unique_ptr<FeedForward> feed_forward;
};

// The outputs of Decoder::read for one layer, all fp32: the normalised input of its attention (batch, length, dim), and
// its keys and values (batch, length, groups, head_dim) before the key norm and RoPE. A null pointer means that the
// caller does not need that output.
struct LayerReading {
  float *input, *keys, *values;
};

// Keys before the key norm and RoPE, and values, of one layer, given by the caller: fp32 (batch, groups, length,
// head_dim).
struct KvRows {
  mlxeff_heads keys, values;
};

struct DecoderSpec {  // the weights and hyperparameters of a model
  int64_t dim, head_dim;
  float eps;
  const float* inverse_frequencies;  // of RoPE: (head_dim / 2), in radians per position
  float rope_magnitude;              // scale of the rotated queries and keys (as in YaRN; 1 for plain RoPE)
  const float* final_norm;
  WeightMatrix embedding;
  Linear head;
  std::vector<DecoderLayer> layers;

  AttentionSizes sizes(const DecoderLayer& layer) const { return {layer.heads, layer.groups, head_dim, layer.window}; }
};

class Pass;

// Each call adds `length` tokens to each of `batch` sequences, for which stores[layer] already holds `offset` tokens.
// It returns an MLXEFF_* code; MLXEFF_BAD_ARGUMENT reports a token id outside the vocabulary or a store without room.
class Decoder {
 public:
  explicit Decoder(DecoderSpec spec);

  const DecoderSpec& spec() const { return spec_; }

  // Computes fp32 logits from the token ids `tokens` (batch, length): for every token, (batch, length, vocabulary), if
  // `all_rows` is true, else for the last token of each sequence, (batch, vocabulary).
  int forward(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, KvStore* const* stores,
              float* logits, bool all_rows, const RunOptions& options);

  // Runs the layers without the output head and writes readings[layer] for all tokens. The last layer computes only its
  // reading and appends nothing, so `stores` holds one store for each layer but the last.
  int read(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, KvStore* const* stores,
           const LayerReading* readings, const RunOptions& options);

  // Appends the keys and values given[layer] to stores[layer], for all layers. This call applies the key norm and RoPE.
  int append(int64_t batch, int64_t length, int64_t offset, KvStore* const* stores, const KvRows* given,
             const RunOptions& options);

 private:
  // Runs one pass over the tokens: calls run(pass) on every member of the team. The pass uses the first `layers`
  // stores.
  int pass(const int32_t* tokens, const Span& span, KvStore* const* stores, size_t layers, const RunOptions& options,
           const std::function<void(Pass&)>& run);

  // The largest buffer of prepared inputs (see PassTeam::multiply) and the largest feed-forward workspace that any step
  // of a pass over `rows` rows needs. For a few rows it is computed once: it takes as long as a layer of one row.
  FeedForward::Needs needs(int64_t rows, const RunOptions& options);

  // Divides the workspace into one aligned part for each element of `widths`, which gives the part's size in floats.
  // Grows the workspace if needed; returns an empty vector if memory is exhausted.
  std::vector<float*> workspace(std::initializer_list<int64_t> widths);

  DecoderSpec spec_;
  int64_t widest_heads_ = 0, widest_groups_ = 0;
  std::mutex busy_;  // held during a call, because all calls use the same workspace
  std::map<std::tuple<int64_t, int, bool, Isa>, FeedForward::Needs> needs_;  // by rows, mode, routed, level
  std::unique_ptr<float[]> workspace_;
  size_t workspace_floats_ = 0;
};

}  // namespace mlxeff
