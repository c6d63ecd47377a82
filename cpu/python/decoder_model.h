// DecoderModel: builds a native decoder from Python dicts of named arrays. The constructor takes the embedding, final
// norm and output head; add_layer then adds one layer after the other.
#pragma once
#include "decoder/decoder.h"
#include "python/feed_forwards.h"
#include "python/weights.h"

namespace mlxeff {

class DecoderModel {
 public:
  // `rope` is {"frequencies": array (head_dim / 2) of inverse frequencies, "magnitude": number}. `norm` (dim) is the
  // weight of the final norm. `embedding` and `head` are matrices (vocabulary, dim) in the form of weights.h.
  DecoderModel(int64_t dim, int64_t head_dim, float eps, const Named& rope, const mx::array& norm,
               const Named& embedding, const Named& head);

  // `norms` is {"attention": (dim), "feed_forward": (dim), "query": (head_dim) or None, "key": (head_dim) or None}.
  // `attention` holds the matrices "query", "key", "value" and "output". `window` 0 means full attention. No layer can
  // be added after the first call of decoder().
  void add_layer(const nb::dict& norms, const nb::dict& attention, int64_t heads, int64_t groups, int64_t window,
                 const nb::dict& feed_forward);

  // Builds the decoder from the added layers at the first call, and returns it at every call.
  Decoder& decoder();

  // What FeedForward::usage returns, of each layer.
  std::vector<std::optional<FeedForward::Usage>> usage() const;

 private:
  Weights weights_;
  DecoderSpec spec_ = {};  // empty once the decoder has taken it over
  std::unique_ptr<Decoder> decoder_;
};

void bind_decoder(nb::module_& m);
void bind_passes(nb::module_& m);

}  // namespace mlxeff
