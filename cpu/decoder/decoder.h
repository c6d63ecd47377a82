// A whole decoder (RMSNorm, GQA attention with RoPE, gated feed-forward) as one call: token ids -> logits.
#pragma once
#include <initializer_list>
#include <memory>
#include <mutex>
#include <vector>

#include "products/product.h"

namespace mlxeff {

// y = x W^T + bias; bias (N) is fp32 or null.
struct Linear {
  WeightMatrix weight = {};
  const float* bias = nullptr;
};

// Norm weights are fp32; q_norm and k_norm (head_dim) are null where the model has none. window 0: full attention.
struct DecoderLayer {
  const float *attention_norm, *q_norm, *k_norm, *ffn_norm;
  Linear q, k, v, o, gate, up, down;
  int64_t heads, groups, window;
};

// Keys and values of one layer: (batch, groups, capacity, head_dim), row-major.
struct KvBuffer {
  void *keys, *values;
  int64_t capacity;
  int dtype;
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
};

class Decoder {
 public:
  explicit Decoder(DecoderSpec spec);

  // Append tokens (batch, length) after `offset` tokens in the cache, kv[layer]; write fp32 logits of all of them,
  // (batch, length, vocabulary), or of each sequence's last one, (batch, vocabulary).
  // Returns an MLXEFF_* code; MLXEFF_BAD_ARGUMENT for a token outside the vocabulary or a cache that is too short.
  int forward(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, const KvBuffer* kv, float* logits,
              bool all_rows, int mode);

  // The same without the head: readings[layer] of all tokens. Of the last layer nothing else is computed, and kv ends
  // before it.
  int read(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, const KvBuffer* kv,
           const LayerReading* readings, int mode);

  // Append keys and values that are given for all layers: the keys are normed and rotated here.
  int append(int64_t batch, int64_t length, int64_t offset, const KvBuffer* kv, const KvRows* given);

 private:
  struct Result {
    float* logits;
    bool all_rows;
    const LayerReading* readings;  // null: logits are wanted
  };
  int pass(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, const KvBuffer* kv,
           const Result& result, int mode);

  // The parts of the workspace, `widths` floats each; none without memory.
  std::vector<float*> workspace(std::initializer_list<int64_t> widths);

  DecoderSpec spec_;
  int64_t widest_heads_ = 0, widest_groups_ = 0, widest_ffn_ = 0;
  std::mutex busy_;  // the workspace serves one call at a time
  std::unique_ptr<float[]> workspace_;
  size_t workspace_floats_ = 0;
};

}  // namespace mlxeff
