// A decoder's forward pass inside one parallel region. Activations are fp32; the products are those of the matrix
// families, in their modes; the attention is that of attention.cpp. A step of the pass is one for_chunks: when it
// returns, the step is complete, so steps need no other synchronisation. Members of the team compute the same plan from
// the same arguments.
#include "decoder/decoder.h"

#include <math.h>

#include <atomic>

#include "attention/attention_kernels.h"
#include "base/pool.h"
#include "decoder/decoder_kernels.h"
#include "rows/norm_kernels.h"
#include "rows/rope_kernels.h"
#include "rows/swiglu_kernels.h"

namespace mlxeff {
namespace {

constexpr int most_products = 3;   // that read the same input: query, key, value
constexpr int64_t alignment = 16;  // floats

int64_t padded(int64_t floats) { return round_up(floats, alignment); }

struct Output {
  const Linear* linear;
  float* y;
};

// What the inputs of up to three products need in the form that the products read.
int64_t prepared_bytes(const DecoderSpec& spec, int64_t rows, int mode) {
  const auto bytes = [&](const Linear& linear) {
    return Product(linear.weight, nullptr, nullptr, rows, mode).workspace_bytes();
  };
  int64_t most = bytes(spec.head);
  for (const DecoderLayer& l : spec.layers) {
    most = max_of(most, max_of(bytes(l.q) + bytes(l.k) + bytes(l.v), bytes(l.gate) + bytes(l.up)));
    most = max_of(most, max_of(bytes(l.o), bytes(l.down)));
  }
  return most;
}

// The buffers of one pass, each (rows, width).
struct Buffers {
  float *x, *normed, *queries, *keys, *values, *attended, *gate, *up, *added, *cosines, *sines;
  char* prepared;  // inputs in the form that the products read
  float* partial;  // of attention
};

// What a pass works on: `length` new tokens of each of `batch` sequences, the last one at position end - 1.
struct Span {
  int64_t batch, length, end;
  int64_t rows() const { return batch * length; }
};

AttentionArgs attention_args(const DecoderSpec& spec, const DecoderLayer& l, const Buffers& b, const KvBuffer& kv,
                             const Span& span, int mode) {
  const int64_t size = spec.head_dim, wide = l.heads * size, stride = kv.capacity * size, sequence = l.groups * stride;
  return {{b.queries, span.length * wide, size, wide, MLXEFF_F32},
          {kv.keys, sequence, stride, size, kv.dtype},
          {kv.values, sequence, stride, size, kv.dtype},
          {b.attended, span.length * wide, size, wide, MLXEFF_F32},
          span.batch,
          l.heads,
          l.groups,
          span.length,
          span.end,
          size,
          1.0f / sqrtf(float(size)),
          l.window,
          mode == MLXEFF_EXACT ? MLXEFF_EXACT : MLXEFF_COMPUTE_BF16,
          nullptr};
}

// The largest workspace of the attention of any layer, for a team of any size.
int64_t partial_bytes(const DecoderSpec& spec, const Span& span) {
  int64_t most = 0;
  for (const DecoderLayer& l : spec.layers)
    for (const int64_t length : {span.length, int64_t(1)})
      for (int threads = 1; threads <= num_threads(); ++threads)
        most = max_of(
            most, plan_attention(attention_args(spec, l, {}, {}, {span.batch, length, span.end}, MLXEFF_EXACT), threads)
                      .workspace);
  return most;
}

// Whether the first `layers` buffers have room for the span, which is not empty.
bool fits(const Span& span, const KvBuffer* kv, size_t layers) {
  bool good = span.batch > 0 && span.length > 0 && span.end >= span.length;
  for (size_t i = 0; good && i < layers; ++i) good = kv[i].capacity >= span.end;
  return good;
}

// One call of forward, as one member of the team sees it.
class Pass {
 public:
  Pass(const DecoderSpec& spec, Team& team, const Buffers& buffers, const KvBuffer* kv, const int32_t* tokens,
       const Span& span, int mode, std::atomic<int>& error)
      : spec_(spec), team_(team), b_(buffers), kv_(kv), tokens_(tokens), span_(span), mode_(mode), error_(error),
        row_(MLXEFF_DISPATCH(decoder_kernels)), norm_(MLXEFF_DISPATCH(norm_kernels)),
        rope_(MLXEFF_DISPATCH(rope_kernels)), swiglu_(MLXEFF_DISPATCH(swiglu_kernels)),
        attention_(MLXEFF_DISPATCH(attention_kernels)) {}

  void run(float* logits, bool all_rows) {
    embed();
    const int64_t layers = int64_t(spec_.layers.size());
    for (int64_t i = 0; i < layers; ++i) layer(i, i + 1 == layers && !all_rows);
    head(logits);
  }

  // Keys and values that are given for all layers, of `widest` groups at most, go into the cache.
  void append(const KvRows* given, int64_t widest) {
    angles();
    const int64_t rows = span_.rows(), layers = int64_t(spec_.layers.size());
    team_.for_chunks(rows, row_chunk(rows), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < layers; ++i)
        for (int64_t r = begin; r < end; ++r) append_given(i, r, given[i], b_.keys + r * widest * spec_.head_dim);
    });
  }

  void read(const LayerReading* readings) {
    readings_ = readings;
    embed();
    const int64_t last = int64_t(spec_.layers.size()) - 1;
    for (int64_t i = 0; i < last; ++i) layer(i, false);
    read_last(last);
  }

 private:
  void embed() {
    each_row([&](int64_t r) { read_row(spec_.embedding, tokens_[r], b_.x + r * spec_.dim); });
    angles();
  }

  // Cosines and sines of the new tokens' positions.
  void angles() {
    const int64_t half = spec_.head_dim / 2;
    team_.for_chunks(span_.length, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < half; ++i) {
          const double angle = double(position(t)) * double(spec_.inverse_frequencies[i]);
          b_.cosines[t * half + i] = float(spec_.rope_magnitude * cos(angle));
          b_.sines[t * half + i] = float(spec_.rope_magnitude * sin(angle));
        }
    });
  }

  // With last_only, keys and values of all tokens, and the rest of the layer for each sequence's last token.
  void layer(int64_t index, bool last_only) {
    const DecoderLayer& l = spec_.layers[size_t(index)];
    const Output qkv[] = {{&l.q, b_.queries}, {&l.k, b_.keys}, {&l.v, b_.values}};
    enter(index, qkv, 3);
    each_row([&](int64_t r) { append(index, r); });
    if (last_only && span_.length > 1) keep_last_rows(l);
    attend(l, kv_[index]);
    const Output o[] = {{&l.o, b_.added}};
    multiply(b_.attended, o, 1, [](int64_t) {});
    const Output gated[] = {{&l.gate, b_.gate}, {&l.up, b_.up}};
    multiply(b_.normed, gated, 2, [&](int64_t r) { add_and_norm(r, b_.added, l.o.bias, l.ffn_norm); });
    const int64_t width = l.gate.weight.N;
    const Output down[] = {{&l.down, b_.added}};
    multiply(b_.gate, down, 1, [&](int64_t r) {
      float* const gate = b_.gate + r * width;
      float* const up = b_.up + r * width;
      add(gate, l.gate.bias, width);
      add(up, l.up.bias, width);
      swiglu_.forward(gate, up, gate, width, MLXEFF_F32);
    });
  }

  // The norm of the layer's input and products with it.
  void enter(int64_t index, const Output* outputs, int count) {
    const float* const before = index ? b_.added : nullptr;
    const float* const before_bias = index ? spec_.layers[size_t(index - 1)].down.bias : nullptr;
    float* const input = readings_ ? readings_[index].input : nullptr;
    multiply(b_.normed, outputs, count, [&](int64_t r) {
      add_and_norm(r, before, before_bias, spec_.layers[size_t(index)].attention_norm);
      if (input) memcpy(input + r * spec_.dim, b_.normed + r * spec_.dim, size_t(spec_.dim) * 4);
    });
  }

  void read_last(int64_t index) {
    const DecoderLayer& l = spec_.layers[size_t(index)];
    const Output kv[] = {{&l.k, b_.keys}, {&l.v, b_.values}};
    const bool wanted = readings_[index].keys || readings_[index].values;
    enter(index, kv, wanted ? 2 : 0);
    if (wanted) each_row([&](int64_t r) { finish_kv(index, r); });
  }

  // Bias of the row's keys and values, which are then as a reading wants them.
  void finish_kv(int64_t index, int64_t r) {
    const DecoderLayer& l = spec_.layers[size_t(index)];
    const int64_t width = l.groups * spec_.head_dim;
    float* const k = b_.keys + r * width;
    float* const v = b_.values + r * width;
    add(k, l.k.bias, width);
    add(v, l.v.bias, width);
    if (!readings_) return;
    if (float* const keys = readings_[index].keys) memcpy(keys + r * width, k, size_t(width) * 4);
    if (float* const values = readings_[index].values) memcpy(values + r * width, v, size_t(width) * 4);
  }

  void head(float* logits) {
    const float* const bias = spec_.layers.back().down.bias;
    const Output output[] = {{&spec_.head, logits}};
    multiply(b_.normed, output, 1, [&](int64_t r) { add_and_norm(r, b_.added, bias, spec_.final_norm); });
    const int64_t width = spec_.head.weight.N;
    if (spec_.head.bias) each_row([&](int64_t r) { add(logits + r * width, spec_.head.bias, width); });
  }

  // Narrows the pass to the last token of each sequence: their hidden states and queries move to the first rows.
  void keep_last_rows(const DecoderLayer& l) {
    const int64_t wide = l.heads * spec_.head_dim;
    team_.for_chunks(1, 1, [&](int64_t, int64_t) {
      for (int64_t b = 0; b < span_.batch; ++b) {
        const int64_t last = (b + 1) * span_.length - 1;
        memmove(b_.x + b * spec_.dim, b_.x + last * spec_.dim, size_t(spec_.dim) * 4);
        memmove(b_.queries + b * wide, b_.queries + last * wide, size_t(wide) * 4);
      }
    });
    span_.length = 1;
  }

  int64_t position(int64_t t) const { return span_.end - span_.length + t; }

  template <class Body>
  void each_row(Body&& body) {
    const int64_t rows = span_.rows();
    team_.for_chunks(rows, row_chunk(rows), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) body(r);
    });
  }

  int64_t row_chunk(int64_t rows) const { return max_of(1, rows / (8 * team_.count)); }

  void add_and_norm(int64_t r, const float* added, const float* bias, const float* weight) {
    float* const x = b_.x + r * spec_.dim;
    add(x, added ? added + r * spec_.dim : nullptr, spec_.dim);
    add(x, bias, spec_.dim);
    norm(b_.normed + r * spec_.dim, x, weight, 1, spec_.dim);
  }

  void add(float* x, const float* term, int64_t n) {
    if (term) row_.add(x, term, n);
  }

  // `count` vectors of n elements, one after the other; out may be x.
  void norm(float* out, const float* x, const float* weight, int64_t count, int64_t n) {
    const NormRows from = {reinterpret_cast<char*>(const_cast<float*>(x)), n, 0, MLXEFF_F32},
                   to = {reinterpret_cast<char*>(out), n, 0, MLXEFF_F32};
    if (!norm_.rows({from, to, weight, MLXEFF_F32, 1, n, spec_.eps}, 0, count)) error_ = MLXEFF_NO_MEMORY;
  }

  // outputs[i].y (rows, N_i) = x W_i^T, after make_row(r) has written row r of x.
  template <class MakeRow>
  void multiply(const float* x, const Output* outputs, int count, MakeRow&& make_row) {
    const int64_t rows = span_.rows();
    Product products[most_products];
    bool owner[most_products];
    int64_t pieces[most_products], piece[most_products], total = 0;
    char* workspace = b_.prepared;
    for (int i = 0; i < count; ++i) {
      products[i] = Product(outputs[i].linear->weight, x, outputs[i].y, rows, mode_);
      int same = 0;
      while (same < i && !products[i].same_input(products[same])) ++same;
      owner[i] = same == i;
      if (owner[i]) {
        products[i].bind(workspace);
        workspace += products[i].workspace_bytes();
      } else {
        products[i].share_input(products[same]);
      }
      piece[i] = products[i].piece(team_.count);
      pieces[i] = ceil_div(products[i].matrix().N, piece[i]);
      total += pieces[i];
    }
    team_.for_chunks(rows, row_chunk(rows), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) make_row(r);
      for (int i = 0; i < count; ++i)
        if (owner[i]) products[i].prepare(begin, end);
    });
    if (!total) return;
    team_.for_chunks(total, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        int i = 0;
        int64_t index = p;
        while (index >= pieces[i]) index -= pieces[i++];
        const int64_t n = index * piece[i];
        if (const int code = products[i].run(n, min_of(n + piece[i], products[i].matrix().N))) error_ = code;
      }
    });
  }

  // Bias, norm and rotation of the row's queries and keys; keys and values go into the cache.
  void append(int64_t index, int64_t r) {
    const DecoderLayer& l = spec_.layers[size_t(index)];
    const int64_t size = spec_.head_dim;
    float* const q = b_.queries + r * l.heads * size;
    float* const k = b_.keys + r * l.groups * size;
    float* const v = b_.values + r * l.groups * size;
    add(q, l.q.bias, l.heads * size);
    finish_kv(index, r);
    if (l.q_norm) norm(q, q, l.q_norm, l.heads, size);
    if (l.k_norm) norm(k, k, l.k_norm, l.groups, size);
    rotate({q, 0, size, 0, MLXEFF_F32}, {q, 0, size, 0, MLXEFF_F32}, l.heads, r % span_.length);
    keep(index, r, k, size, v, size);
  }

  // The same of keys and values that are given; `normed` has room for the row's keys.
  void append_given(int64_t index, int64_t r, const KvRows& given, float* normed) {
    const DecoderLayer& l = spec_.layers[size_t(index)];
    const int64_t b = r / span_.length, t = r % span_.length, size = spec_.head_dim;
    const auto at = [&](const mlxeff_heads& x) { return static_cast<float*>(x.data) + b * x.batch + t * x.token; };
    float* k = at(given.keys);
    int64_t step = given.keys.head;
    if (l.k_norm) {
      for (int64_t g = 0; g < l.groups; ++g) norm(normed + g * size, k + g * step, l.k_norm, 1, size);
      k = normed;
      step = size;
    }
    keep(index, r, k, step, at(given.values), given.values.head);
  }

  // The row's keys, rotated, and values go into the cache; their heads are `key_step` and `value_step` floats apart.
  void keep(int64_t index, int64_t r, float* k, int64_t key_step, const float* v, int64_t value_step) {
    const KvBuffer& kv = kv_[index];
    const int64_t groups = spec_.layers[size_t(index)].groups, size = spec_.head_dim,
                  width = int64_t(dtype_size(kv.dtype));
    const int64_t t = r % span_.length, stride = kv.capacity * size;
    const int64_t place = (r / span_.length * groups * stride + position(t) * size) * width;
    rotate({k, 0, key_step, 0, MLXEFF_F32}, {static_cast<char*>(kv.keys) + place, 0, stride, 0, kv.dtype}, groups, t);
    for (int64_t g = 0; g < groups; ++g)
      row_.store(static_cast<char*>(kv.values) + place + g * stride * width, kv.dtype, v + g * value_step, size);
  }

  // The heads of one token, to the angles of new token t.
  void rotate(const mlxeff_heads& from, const mlxeff_heads& to, int64_t heads, int64_t t) {
    const int64_t size = spec_.head_dim, half = size / 2;
    rope_.rows({from, to, 1, heads, 1, size, size, b_.cosines + t * half, b_.sines + t * half, false}, 0, heads);
  }

  void attend(const DecoderLayer& l, const KvBuffer& kv) {
    const AttentionArgs args = attention_args(spec_, l, b_, kv, span_, mode_);
    const AttentionPlan plan = plan_attention(args, team_.count);
    team_.for_chunks(plan.tasks, 1, [&](int64_t begin, int64_t end) {
      if (!attention_.run(args, plan, b_.partial, begin, end)) error_ = MLXEFF_NO_MEMORY;
    });
    if (plan.parts > 1)
      team_.for_chunks(args.B * args.H * args.S, 64,
                       [&](int64_t begin, int64_t end) { attention_.merge(args, plan, b_.partial, begin, end); });
  }

  const DecoderSpec& spec_;
  Team& team_;
  const Buffers& b_;
  const KvBuffer* kv_;
  const int32_t* tokens_;
  Span span_;
  int mode_;
  std::atomic<int>& error_;
  const LayerReading* readings_ = nullptr;
  const DecoderKernels& row_;
  const NormKernels& norm_;
  const RopeKernels& rope_;
  const SwigluKernels& swiglu_;
  const AttentionKernels& attention_;
};

}  // namespace

Decoder::Decoder(DecoderSpec spec) : spec_(std::move(spec)) {
  for (const DecoderLayer& l : spec_.layers) {
    widest_heads_ = max_of(widest_heads_, l.heads);
    widest_groups_ = max_of(widest_groups_, l.groups);
    widest_ffn_ = max_of(widest_ffn_, l.gate.weight.N);
  }
}

int Decoder::forward(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, const KvBuffer* kv,
                     float* logits, bool all_rows, int mode) {
  return pass(tokens, batch, length, offset, kv, {logits, all_rows, nullptr}, mode);
}

int Decoder::read(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, const KvBuffer* kv,
                  const LayerReading* readings, int mode) {
  return pass(tokens, batch, length, offset, kv, {nullptr, false, readings}, mode);
}

int Decoder::pass(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, const KvBuffer* kv,
                  const Result& result, int mode) {
  const Span span = {batch, length, offset + length};
  const int64_t rows = span.rows();
  if (spec_.layers.empty() || !fits(span, kv, spec_.layers.size() - (result.readings ? 1 : 0)))
    return MLXEFF_BAD_ARGUMENT;
  for (int64_t r = 0; r < rows; ++r)
    if (tokens[r] < 0 || tokens[r] >= spec_.embedding.N) return MLXEFF_BAD_ARGUMENT;

  const int64_t size = spec_.head_dim, queries = widest_heads_ * size, keys = widest_groups_ * size;
  // Few rows are padded more than many: the last layer's may need more room than all of them.
  const int64_t prepared = max_of(prepared_bytes(spec_, rows, mode), prepared_bytes(spec_, batch, mode)) / 4,
                partial = partial_bytes(spec_, span) / 4;
  const std::lock_guard<std::mutex> lock(busy_);
  std::vector<float*> parts = workspace({rows * spec_.dim, rows * spec_.dim, rows * queries, rows * keys, rows * keys,
                                         rows * queries, rows * widest_ffn_, rows * widest_ffn_, rows * spec_.dim,
                                         length * size / 2, length * size / 2, prepared, partial});
  if (parts.empty()) return MLXEFF_NO_MEMORY;
  const Buffers buffers = {parts[0], parts[1], parts[2], parts[3], parts[4],  parts[5],
                           parts[6], parts[7], parts[8], parts[9], parts[10], reinterpret_cast<char*>(parts[11]),
                           parts[12]};
  std::atomic<int> error{MLXEFF_OK};
  team_run([&](Team& team) {
    Pass one(spec_, team, buffers, kv, tokens, span, mode, error);
    if (result.readings) one.read(result.readings);
    else one.run(result.logits, result.all_rows);
  });
  return error;
}

int Decoder::append(int64_t batch, int64_t length, int64_t offset, const KvBuffer* kv, const KvRows* given) {
  const Span span = {batch, length, offset + length};
  if (!fits(span, kv, spec_.layers.size())) return MLXEFF_BAD_ARGUMENT;
  const int64_t size = spec_.head_dim;
  const std::lock_guard<std::mutex> lock(busy_);
  std::vector<float*> parts = workspace({span.rows() * widest_groups_ * size, length * size / 2, length * size / 2});
  if (parts.empty()) return MLXEFF_NO_MEMORY;
  Buffers buffers = {};
  buffers.keys = parts[0];
  buffers.cosines = parts[1];
  buffers.sines = parts[2];
  std::atomic<int> error{MLXEFF_OK};
  team_run([&](Team& team) {
    Pass(spec_, team, buffers, kv, nullptr, span, MLXEFF_EXACT, error).append(given, widest_groups_);
  });
  return error;
}

std::vector<float*> Decoder::workspace(std::initializer_list<int64_t> widths) {
  int64_t total = alignment;
  for (const int64_t width : widths) total += padded(width);
  if (workspace_floats_ < size_t(total)) {
    workspace_.reset(new (std::nothrow) float[size_t(total)]);
    workspace_floats_ = workspace_ ? size_t(total) : 0;
    if (!workspace_) return {};
  }
  float* next = reinterpret_cast<float*>(round_up(int64_t(reinterpret_cast<intptr_t>(workspace_.get())), 64));
  std::vector<float*> parts;
  for (const int64_t width : widths) {
    parts.push_back(next);
    next += padded(width);
  }
  return parts;
}

}  // namespace mlxeff
