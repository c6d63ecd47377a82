// A whole decoder (RMSNorm, GQA attention with RoPE, feed-forward) as one call: token ids -> logits. It opens at two
// places: what a layer remembers (kv/kv_store.h) and its feed-forward (feed_forward.h).
#pragma once
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <vector>

#include "decoder/feed_forward.h"
#include "kv/kv_store.h"

namespace mlxeff {

// Norm weights are fp32; q_norm and k_norm (head_dim) are null where the model has none. window 0: full attention.
struct DecoderLayer {
  const float *attention_norm, *q_norm, *k_norm, *feed_forward_norm;
  Linear q, k, v, o;
  int64_t heads, groups, window;
  std::unique_ptr<FeedForward> feed_forward;
};

// What a reading pass writes of one layer, fp32, null where it is not wanted: its normed input (batch, length, dim),
// and keys and values (batch, length, groups, head_dim) before norm and rotation.
struct LayerReading {
  float *input, *keys, *values;
};

// Keys before norm and rotation, and values, of one layer: fp32 (batch, groups, length, head_dim).
struct KvRows {
  mlxeff_heads keys, values;
};

struct DecoderSpec {
  int64_t dim, head_dim;
  float eps;
  const float* inverse_frequencies;  // (head_dim / 2), radians a position
  float rope_magnitude;              // factor of rotated queries and keys (YaRN)
  const float* final_norm;
  WeightMatrix embedding;
  Linear head;
  std::vector<DecoderLayer> layers;

  AttentionSizes sizes(const DecoderLayer& layer) const { return {layer.heads, layer.groups, head_dim, layer.window}; }
};

class Pass;

// Each call appends `length` tokens of each of `batch` sequences after `offset` tokens held by stores[layer], and
// returns an MLXEFF_* code: MLXEFF_BAD_ARGUMENT for a token outside the vocabulary or a store without room.
class Decoder {
 public:
  explicit Decoder(DecoderSpec spec);

  const DecoderSpec& spec() const { return spec_; }

  // Tokens (batch, length) -> fp32 logits of all of them, (batch, length, vocabulary), or of each sequence's last one,
  // (batch, vocabulary).
  int forward(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, KvStore* const* stores,
              float* logits, bool all_rows, const RunOptions& options);

  // The same without the head: readings[layer] of all tokens. Of the last layer nothing else is computed, and `stores`
  // ends before it.
  int read(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, KvStore* const* stores,
           const LayerReading* readings, const RunOptions& options);

  // Keys and values that are given for all layers; the keys are normed and rotated here.
  int append(int64_t batch, int64_t length, int64_t offset, KvStore* const* stores, const KvRows* given,
             const RunOptions& options);

 private:
  // A pass over tokens that calls run(pass) on every member of the team; it uses the stores of the first `layers`.
  int pass(const int32_t* tokens, const Span& span, KvStore* const* stores, size_t layers, const RunOptions& options,
           const std::function<void(Pass&)>& run);

  // The parts of the workspace, `widths` floats each; none without memory.
  std::vector<float*> workspace(std::initializer_list<int64_t> widths);

  DecoderSpec spec_;
  int64_t widest_heads_ = 0, widest_groups_ = 0;
  std::mutex busy_;  // the workspace serves one call at a time
  std::unique_ptr<float[]> workspace_;
  size_t workspace_floats_ = 0;
};

}  // namespace mlxeff
