// The key/value stores that Python passes to a decoder, one dict per layer, and their conversion to inputs and outputs
// of an MLX primitive. The arrays of a store are inputs of the primitive; its outputs are the same arrays with the new
// tokens added. To add a kind of store, write a file that defines its StoreKind and add a line to kv_stores.cpp.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "decoder/decoder.h"
#include "python/named.h"

namespace mlxeff {

struct StoreKind {
  const char* name;
  std::vector<const char*> arrays;    // names of the arrays in the dict
  std::vector<const char*> integers;  // names of the integers in the dict, which holds nothing else but "kind"
  // Throws std::invalid_argument if the arrays do not fit the layer's sizes or have no room for the span.
  void (*check)(const Named& given, const AttentionSizes& sizes, const Span& span);
  // Returns a store for one pass over the span, which reads and writes the memory of `arrays`. Arrays and integers are
  // given in the order of the names above.
  std::unique_ptr<KvStore> (*open)(mx::array* arrays, const int64_t* integers, const Span& span);
};

extern const StoreKind dense_kv_kind, plane_kv_kind;

// The kind of one given store, with its integers.
struct GivenKind {
  const StoreKind* kind;
  std::vector<int64_t> integers;
};

// The names of all kinds.
std::vector<std::string> store_kinds();

// The stores that Python passed to one call of a decoder.
class GivenStores {
 public:
  // Checks that `given` holds one store for each of the first `layers` layers, with room for the span.
  GivenStores(const nb::list& given, const DecoderSpec& spec, size_t layers, const Span& span);

  const std::vector<GivenKind>& kinds() const { return kinds_; }
  // Appends the stores' arrays to a primitive's inputs, and their shapes and types to those of its outputs.
  void add_to(std::vector<mx::array>& inputs, std::vector<mx::Shape>& shapes, std::vector<mx::Dtype>& dtypes) const;
  // Returns the same list of dicts with the primitive's outputs in place of the given arrays.
  nb::list updated(const mx::array* outputs) const;

 private:
  std::vector<GivenKind> kinds_;
  std::vector<mx::array> arrays_;
};

// The stores of a primitive during its evaluation. Each output array of a store reuses the memory of its input array if
// nothing else refers to that memory; otherwise it is a copy.
class StoreUpdate {
 public:
  StoreUpdate(const std::vector<GivenKind>& kinds, const Span& span, const mx::array* inputs, mx::array* outputs);

  // Makes the copies and returns the stores, which then hold the tokens of earlier passes. The task must call this
  // exactly once, before it uses the stores.
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

// Clears the references that the primitive's other outputs hold to its inputs. Each output of a primitive refers to all
// inputs, so an input of a primitive with several outputs never counts as donatable. MLX drops these references right
// after the evaluation, unless the graph is being traced; dropping them earlier lets `is_donatable` tell whether
// anything else refers to a buffer. Must be called before a StoreUpdate is made.
void drop_inputs_of_siblings(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

}  // namespace mlxeff
