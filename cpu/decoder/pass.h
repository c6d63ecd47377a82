// One call of a decoder, step by step, as one member of the team sees it.
//
// Activations are fp32. A step is one for_chunks: when it returns, the step is complete, so steps need no other
// synchronisation. Members of the team compute the same plan from the same arguments.
#pragma once
#include "decoder/decoder.h"
#include "decoder/decoder_kernels.h"
#include "rows/norm_kernels.h"
#include "rows/rope_kernels.h"

namespace mlxeff {

// The buffers of one pass, each (rows, width).
struct Buffers {
  float *x, *normed, *queries, *keys, *values, *attended, *added, *cosines, *sines;
  char* prepared;   // inputs in the form that the products read
  void* workspace;  // of the stores and the feed-forwards, one after the other
};

class Pass {
 public:
  Pass(const DecoderSpec& spec, Team& team, const Buffers& buffers, KvStore* const* stores, const int32_t* tokens,
       const Span& span, const RunOptions& options, std::atomic<int>& error);

  // Logits of all rows, or of each sequence's last one.
  void run(float* logits, bool all_rows);
  // What each layer reads (LayerReading).
  void read(const LayerReading* readings);
  // Keys and values that are given for all layers, of `widest` groups at most, go into the stores.
  void append(const KvRows* given, int64_t widest);

 private:
  void embed();
  void angles();
  void layer(int64_t index, bool last_only);
  void enter(int64_t index, std::initializer_list<Output> outputs);
  void read_last(int64_t index);
  void head(float* logits);

  void store(int64_t index, RowFunction<NewRow> finish);
  NewRow finish_row(int64_t index, int64_t r);
  NewRow finish_given(int64_t index, int64_t r, const KvRows& given, float* normed);
  void finish_kv(int64_t index, int64_t r);
  void keep_last_rows(const DecoderLayer& l);

  void add_and_norm(int64_t r, const float* added, const float* bias, const float* weight);
  void add(float* x, const float* term, int64_t n);
  void norm(float* out, const float* x, const float* weight, int64_t count, int64_t n);

  const DecoderSpec& spec_;
  PassTeam team_;
  const Buffers& b_;
  KvStore* const* stores_;
  const int32_t* tokens_;
  Span span_;
  const LayerReading* readings_ = nullptr;
  const DecoderKernels& row_;
  const NormKernels& norm_;
  const RopeKernels& rope_;
};

}  // namespace mlxeff
