// A native decoder as Python builds it: ends first, then layer by layer, everything by name.
#pragma once
#include "decoder/decoder.h"
#include "python/feed_forwards.h"
#include "python/weights.h"

namespace mlxeff {

class DecoderModel {
 public:
  // rope: {"frequencies": (head_dim / 2), "magnitude": number}; norm (dim); matrices as in weights.h, (vocabulary,
  // dim).
  DecoderModel(int64_t dim, int64_t head_dim, float eps, const Named& rope, const mx::array& norm,
               const Named& embedding, const Named& head);

  // norms: {"attention": (dim), "feed_forward": (dim), "query": (head_dim) or None, "key": (head_dim) or None};
  // attention: {"query", "key", "value", "output"}: matrices; window 0: full attention. Not after the first call.
  void add_layer(const nb::dict& norms, const nb::dict& attention, int64_t heads, int64_t groups, int64_t window,
                 const nb::dict& feed_forward);

  // The decoder of the layers added.
  Decoder& decoder();

 private:
  Weights weights_;
  DecoderSpec spec_ = {};  // until the decoder takes it over
  std::unique_ptr<Decoder> decoder_;
};

// What Python holds. A task in flight shares the model itself, never a Python object: it may outlive the interpreter.
struct DecoderHandle {
  std::shared_ptr<DecoderModel> model;
};

void bind_decoder(nb::module_& m);
void bind_passes(nb::module_& m);

}  // namespace mlxeff
