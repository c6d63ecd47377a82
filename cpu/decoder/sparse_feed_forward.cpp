// A pass over few rows, in three steps of the team (PassTeam):
//
//   1. rows are made, and the inputs that count are listed
//   2. pieces of gate and up; of the neurons of each, the activations that count are listed
//   3. pieces of down
#include "decoder/sparse_feed_forward.h"

#include "columns/column_kernels.h"
#include "rows/swiglu_kernels.h"

namespace mlxeff {
namespace {

constexpr int64_t turn = 32;     // neurons of which gate and up take turns; a block of the inputs of down
constexpr int64_t padding = 16;  // floats between rows, so that their distance is no multiple of 4 KiB

}  // namespace

FeedForward::Needs SparseFeedForward::needs(int64_t rows, const RunOptions&) const {
  const int64_t dim = gate_up_.K, width = down_.K;
  const int64_t few = KeptInputs::floats(dim, input_unit()) + KeptInputs::floats(width, turn);
  const int64_t many = round_up(dim + padding, 16) + round_up(2 * width + padding, 16);
  return {rows * (rows > few_tokens ? many : few) * int64_t(sizeof(float)), 0};
}

void SparseFeedForward::run(PassTeam& pass, const FeedForwardRows& rows, void* workspace) {
  if (rows.rows > few_tokens) run_many(pass, rows, static_cast<float*>(workspace));
  else run_few(pass, rows, static_cast<float*>(workspace));
}

void SparseFeedForward::run_few(PassTeam& pass, const FeedForwardRows& rows, float* workspace) {
  const ColumnKernels& columns = MLXEFF_DISPATCH(column_kernels);
  const SwigluKernels& swiglu = MLXEFF_DISPATCH(swiglu_kernels);
  const int64_t dim = gate_up_.K, width = down_.K;
  const int64_t input_floats = KeptInputs::floats(dim, input_unit());
  const int64_t row_floats = input_floats + KeptInputs::floats(width, turn);
  const float threshold = pass.options.routed ? pass.options.dial : 0;
  const auto inputs_of = [&](int64_t r) { return KeptInputs::at(workspace + r * row_floats, dim, input_unit()); };
  const auto neurons_of_row = [&](int64_t r) {
    return KeptInputs::at(workspace + r * row_floats + input_floats, width, turn);
  };

  int64_t kept_inputs = 0, kept_neurons = 0, made = 0, bytes = 0;
  pass.team.for_rows(rows.rows, [&](int64_t r) {
    rows.make_row(r);
    const KeptInputs kept = inputs_of(r);
    const float* const x = rows.x + r * dim;
    for (int64_t b = 0; b < ceil_div(dim, kept.unit); ++b)
      kept_inputs += columns.keep(x + b * kept.unit, input_weights_ + b * kept.unit, threshold, dim, b, kept);
    ++made;
  });
  bytes += kept_inputs * gate_up_.input_bytes(gate_up_.N) + made * gate_up_.scale_bytes(gate_up_.N);
  pass.team.for_chunks(gate_up_.pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece)
      for (int64_t r = 0; r < rows.rows; ++r) {
        float both[ColumnMatrix::widest_piece];
        const KeptInputs kept = neurons_of_row(r);
        columns.piece(gate_up_, piece, inputs_of(r), both);
        for (int64_t i = 0; i < gate_up_.width_of(piece); i += 2 * turn) {
          const int64_t neuron = (piece * gate_up_.piece() + i) / 2;
          swiglu.forward(both + i, both + i + turn, both + i, turn, MLXEFF_F32);
          kept_neurons += columns.keep(both + i, neuron_weights_ + neuron, threshold, width, neuron / turn, kept);
        }
      }
  });
  bytes += kept_neurons * down_.input_bytes(down_.N);
  pass.team.for_chunks(down_.pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece)
      for (int64_t r = 0; r < rows.rows; ++r) {
        columns.piece(down_, piece, neurons_of_row(r), rows.out + r * down_.N + piece * down_.piece());
        bytes += down_.scale_bytes(down_.width_of(piece));
      }
  });
  count(made, kept_inputs, kept_neurons, bytes);
}

void SparseFeedForward::run_many(PassTeam& pass, const FeedForwardRows& rows, float* workspace) {
  const ColumnKernels& columns = MLXEFF_DISPATCH(column_kernels);
  const SwigluKernels& swiglu = MLXEFF_DISPATCH(swiglu_kernels);
  const int64_t dim = gate_up_.K, width = down_.K;
  const int64_t ldx = round_up(dim + padding, 16), ldh = round_up(2 * width + padding, 16);
  float *const x = workspace, *const hidden = x + rows.rows * ldx;
  const auto multiply = [&](const ColumnMatrix& w, const float* from, int64_t ld, float* to, int64_t ld_to) {
    pass.team.for_chunks(ceil_div(w.N, 64), 1, [&](int64_t begin, int64_t end) {
      pass.check(columns.all_inputs(w, from, ld, rows.rows, begin * 64, end * 64, to, ld_to));
    });
  };
  int64_t made = 0;
  pass.team.for_rows(rows.rows, [&](int64_t r) {
    rows.make_row(r);
    memcpy(x + r * ldx, rows.x + r * dim, size_t(dim) * sizeof(float));
    if (r == 0) count(0, 0, 0, gate_up_.bytes() + down_.bytes());
    ++made;
  });
  multiply(gate_up_, x, ldx, hidden, ldh);
  // The activations of a row move to its front, where what they are made of has been read.
  pass.team.for_rows(rows.rows, [&](int64_t r) {
    float* const row = hidden + r * ldh;
    for (int64_t n = 0; n < width; n += turn)
      swiglu.forward(row + 2 * n, row + 2 * n + turn, row + n, turn, MLXEFF_F32);
  });
  multiply(down_, hidden, ldh, rows.out, down_.N);
  count(made, made * dim, made * width, 0);
}

void SparseFeedForward::count(int64_t rows, int64_t inputs, int64_t neurons, int64_t bytes) {
  rows_.fetch_add(rows, std::memory_order_relaxed);
  inputs_.fetch_add(inputs, std::memory_order_relaxed);
  neurons_.fetch_add(neurons, std::memory_order_relaxed);
  bytes_.fetch_add(bytes, std::memory_order_relaxed);
}

std::optional<FeedForward::Usage> SparseFeedForward::usage() const {
  const auto value = [](const std::atomic<int64_t>& each) { return each.load(std::memory_order_relaxed); };
  return Usage{{value(rows_), value(inputs_), value(neurons_)}, value(bytes_)};
}

}  // namespace mlxeff
