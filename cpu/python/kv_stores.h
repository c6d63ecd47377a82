// The stores of keys and values that Python gives, a dict for each layer, and their way through a primitive: the arrays
// of a store are inputs of the primitive and, with the new tokens in them, outputs of it. A new kind is a file that
// defines its StoreKind, and a line in kv_stores.cpp.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "decoder/decoder.h"
#include "python/named.h"

namespace mlxeff {

struct StoreKind {
  const char* name;
  std::vector<const char*> arrays;  // the names of its arrays, all that its dict holds beside "kind"
  // Refuses arrays that do not fit a layer, or lack room for the span.
  void (*check)(const Named& given, const AttentionSizes& sizes, const Span& span);
  // A store for one pass over the span, in the memory of the arrays, which come in the order of their names.
  std::unique_ptr<KvStore> (*open)(mx::array* arrays, const Span& span);
};

extern const StoreKind dense_kv_kind;

// The names of all kinds.
std::vector<std::string> store_kinds();

// The stores of one call.
class GivenStores {
 public:
  // One for each of the first `layers`, with room for the span.
  GivenStores(const nb::list& given, const DecoderSpec& spec, size_t layers, const Span& span);

  const std::vector<const StoreKind*>& kinds() const { return kinds_; }
  // Appends the stores' arrays to a primitive's inputs, and their shapes and types to those of its outputs.
  void add_to(std::vector<mx::array>& inputs, std::vector<mx::Shape>& shapes, std::vector<mx::Dtype>& dtypes) const;
  // The dicts again, with the primitive's outputs that stand for the stores.
  nb::list updated(const mx::array* outputs) const;

 private:
  std::vector<const StoreKind*> kinds_;
  std::vector<mx::array> arrays_;
};

// While a primitive is evaluated: each output array of a store is the input's own memory where nobody else holds it, or
// a copy.
class StoreUpdate {
 public:
  StoreUpdate(const std::vector<const StoreKind*>& kinds, const Span& span, const mx::array* inputs,
              mx::array* outputs);

  // In the task, once: the stores with what they held before it.
  KvStore* const* ready();

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<Copy> copies_;
  std::vector<std::shared_ptr<KvStore>> held_;
  std::vector<KvStore*> stores_;
};

// Each output of a primitive holds all inputs, so that no input of one with several outputs seems free to be reused.
// MLX drops these references right after the evaluation, unless the graph is being traced; dropping those of the other
// outputs before it lets `is_donatable` tell whether anybody else holds a buffer. To be called before a StoreUpdate.
void drop_inputs_of_siblings(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

}  // namespace mlxeff
