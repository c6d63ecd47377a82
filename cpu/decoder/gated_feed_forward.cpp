#include "decoder/gated_feed_forward.h"

#include "decoder/decoder_kernels.h"
#include "rows/swiglu_kernels.h"

namespace mlxeff {
namespace {

int64_t padded(int64_t floats) { return round_up(floats, 16); }

}  // namespace

FeedForward::Needs GatedFeedForward::needs(int64_t rows, const RunOptions& options) const {
  return {2 * padded(rows * gate_.weight.N) * int64_t(sizeof(float)),
          max_of(prepared_bytes({&gate_, &up_}, rows, options), prepared_bytes({&down_}, rows, options))};
}

void GatedFeedForward::run(PassTeam& pass, const FeedForwardRows& rows, void* workspace) {
  const int64_t width = gate_.weight.N;
  float *const gates = static_cast<float*>(workspace), *const ups = gates + padded(rows.rows * width);
  pass.multiply(rows.x, {{&gate_, gates}, {&up_, ups}}, rows.rows, rows.make_row);
  const DecoderKernels& row = MLXEFF_DISPATCH(decoder_kernels);
  const SwigluKernels& swiglu = MLXEFF_DISPATCH(swiglu_kernels);
  const auto activate = [&](int64_t r) {
    float *const gate = gates + r * width, *const up = ups + r * width;
    if (gate_.bias) row.add(gate, gate_.bias, width);
    if (up_.bias) row.add(up, up_.bias, width);
    swiglu.forward(gate, up, order_ ? up : gate, width, MLXEFF_F32);
    if (order_) reorder(up, order_, width, gate);
  };
  pass.multiply(gates, {{&down_, rows.out}}, rows.rows, &activate);
}

}  // namespace mlxeff
