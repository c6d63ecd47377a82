// A Pass: one call of a decoder, as one member of the thread team executes it.
//
// Activations are fp32. A step is one call of Team::for_chunks. The step is complete when for_chunks returns, so steps
// need no other synchronisation. Every member derives the same sequence of steps from the same arguments.
#pragma once
#include "decoder/decoder.h"
#include "decoder/decoder_kernels.h"
#include "rows/norm_kernels.h"
#include "rows/rope_kernels.h"

namespace mlxeff {

// The buffers of one pass, fp32 (rows, width) each: the residual `x`, its normalised form, queries, keys, values, the
// attention output, the output of the last projection or feed-forward, which is still to be added to `x`, and the RoPE
// tables (length, head_dim / 2).
struct Buffers {
  float *x, *normed, *queries, *keys, *values, *attended, *added, *cosines, *sines;
  char* prepared;   // inputs converted to the layout that the matrix products read
  void* workspace;  // scratch memory that stores and feed-forwards use in turn
};

class Pass {
 public:
  Pass(const DecoderSpec& spec, Team& team, const Buffers& buffers, KvStore* const* stores, const int32_t* tokens,
       const Span& span, const RunOptions& options, std::atomic<int>& error);

  // Computes the logits of all rows, or only of the last row of each sequence (Decoder::forward).
  void run(float* logits, bool all_rows);
  // Writes the LayerReading of each layer (Decoder::read).
  void read(const LayerReading* readings);
  // Appends the given keys and values of all layers to the stores (Decoder::append). `widest` is the largest number of
  // key/value heads of any layer.
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
