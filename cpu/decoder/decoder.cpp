// The public calls of the native decoder. Each call checks its arguments, reserves the workspace, and runs one Pass
// (pass.cpp) on every thread of a single parallel region.
#include "decoder/decoder.h"

#include <new>

#include "decoder/pass.h"

namespace mlxeff {
namespace {

constexpr int64_t remembered_rows = 64;  // most rows of a pass whose needs are kept
constexpr int64_t alignment = 16;        // of each part of the workspace, in floats (64 bytes)

int64_t padded(int64_t floats) { return round_up(floats, alignment); }
int64_t floats_of(int64_t bytes) { return ceil_div(bytes, int64_t(sizeof(float))); }

FeedForward::Needs computed_needs(const DecoderSpec& spec, int64_t rows, const RunOptions& options) {
  FeedForward::Needs most = {0, prepared_bytes({&spec.head}, rows, options)};
  for (const DecoderLayer& l : spec.layers) {
    const FeedForward::Needs one = l.feed_forward->needs(rows, options);
    most.workspace = max_of(most.workspace, one.workspace);
    most.prepared = max_of(most.prepared, one.prepared);
    most.prepared = max_of(most.prepared, prepared_bytes({&l.q, &l.k, &l.v}, rows, options));
    most.prepared = max_of(most.prepared, prepared_bytes({&l.o}, rows, options));
  }
  return most;
}

// The largest workspace in bytes that one of the first `layers` stores needs, whatever the number of threads in the
// team.
int64_t store_bytes(const DecoderSpec& spec, KvStore* const* stores, size_t layers, const Span& span,
                    const RunOptions& options) {
  int64_t most = 0;
  for (size_t i = 0; i < layers; ++i)
    for (int threads = 1; threads <= num_threads(); ++threads)
      most = max_of(most, stores[i]->workspace_bytes(span, spec.sizes(spec.layers[i]), options, threads));
  return most;
}

// True if the span is valid and not empty, and each of the first `layers` stores has room for it.
bool fits(const Span& span, KvStore* const* stores, size_t layers) {
  bool good = span.batch > 0 && span.length > 0 && span.end >= span.length;
  for (size_t i = 0; good && i < layers; ++i) good = stores[i]->fits(span);
  return good;
}

}  // namespace

Decoder::Decoder(DecoderSpec spec) : spec_(std::move(spec)) {
  for (const DecoderLayer& l : spec_.layers) {
    widest_heads_ = max_of(widest_heads_, l.heads);
    widest_groups_ = max_of(widest_groups_, l.groups);
  }
}

int Decoder::forward(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, KvStore* const* stores,
                     float* logits, bool all_rows, const RunOptions& options) {
  return pass(tokens, {batch, length, offset + length}, stores, spec_.layers.size(), options,
              [&](Pass& pass) { pass.run(logits, all_rows); });
}

int Decoder::read(const int32_t* tokens, int64_t batch, int64_t length, int64_t offset, KvStore* const* stores,
                  const LayerReading* readings, const RunOptions& options) {
  if (spec_.layers.empty()) return MLXEFF_BAD_ARGUMENT;
  return pass(tokens, {batch, length, offset + length}, stores, spec_.layers.size() - 1, options,
              [&](Pass& pass) { pass.read(readings); });
}

int Decoder::pass(const int32_t* tokens, const Span& span, KvStore* const* stores, size_t layers,
                  const RunOptions& options, const std::function<void(Pass&)>& run) {
  const int64_t rows = span.rows();
  if (spec_.layers.empty() || !fits(span, stores, layers)) return MLXEFF_BAD_ARGUMENT;
  for (int64_t r = 0; r < rows; ++r)
    if (tokens[r] < 0 || tokens[r] >= spec_.embedding.N) return MLXEFF_BAD_ARGUMENT;

  const std::lock_guard<std::mutex> lock(busy_);
  // The last layer may process only the last row of each sequence. The kernels for few rows pad their input more than
  // the kernels for many rows, so the smaller pass can need the larger workspace: take the maximum of both.
  const Span last = {span.batch, 1, span.end};
  const FeedForward::Needs all_rows = needs(rows, options), last_rows = needs(last.rows(), options);
  const int64_t prepared = max_of(all_rows.prepared, last_rows.prepared);
  int64_t shared = max_of(all_rows.workspace, last_rows.workspace);
  for (const Span& each : {span, last}) shared = max_of(shared, store_bytes(spec_, stores, layers, each, options));

  const int64_t dim = rows * spec_.dim, size = spec_.head_dim, queries = rows * widest_heads_ * size,
                keys = rows * widest_groups_ * size, angles = span.length * size / 2;
  const std::vector<float*> parts =
      workspace({dim, dim, queries, keys, keys, queries, dim, angles, angles, floats_of(prepared), floats_of(shared)});
  if (parts.empty()) return MLXEFF_NO_MEMORY;
  const Buffers buffers = {parts[0], parts[1], parts[2], parts[3], parts[4],
                           parts[5], parts[6], parts[7], parts[8], reinterpret_cast<char*>(parts[9]),
                           parts[10]};
  std::atomic<int> error{MLXEFF_OK};
  team_run([&](Team& team) {
    Pass one(spec_, team, buffers, stores, tokens, span, options, error);
    run(one);
  });
  return error;
}

int Decoder::append(int64_t batch, int64_t length, int64_t offset, KvStore* const* stores, const KvRows* given,
                    const RunOptions& options) {
  const Span span = {batch, length, offset + length};
  if (!fits(span, stores, spec_.layers.size())) return MLXEFF_BAD_ARGUMENT;
  const int64_t size = spec_.head_dim, angles = length * size / 2,
                shared = store_bytes(spec_, stores, spec_.layers.size(), span, options);
  const std::lock_guard<std::mutex> lock(busy_);
  const std::vector<float*> parts = workspace({span.rows() * widest_groups_ * size, angles, angles, floats_of(shared)});
  if (parts.empty()) return MLXEFF_NO_MEMORY;
  Buffers buffers = {};
  buffers.keys = parts[0];
  buffers.cosines = parts[1];
  buffers.sines = parts[2];
  buffers.workspace = parts[3];
  std::atomic<int> error{MLXEFF_OK};
  team_run([&](Team& team) {
    Pass(spec_, team, buffers, stores, nullptr, span, options, error).append(given, widest_groups_);
  });
  return error;
}

FeedForward::Needs Decoder::needs(int64_t rows, const RunOptions& options) {
  if (rows > remembered_rows) return computed_needs(spec_, rows, options);
  const auto [found, added] = needs_.try_emplace({rows, options.mode, options.routed, active_isa()});
  if (added) found->second = computed_needs(spec_, rows, options);
  return found->second;
}

std::vector<float*> Decoder::workspace(std::initializer_list<int64_t> widths) {
  int64_t total = alignment;
  for (const int64_t width : widths) total += padded(width);
  if (workspace_floats_ < size_t(total)) {
    workspace_.reset();  // before more is asked for, so that both are never held
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
