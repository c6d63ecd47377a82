// The key/value stores that Python passes to a decoder, one dict per layer, ready to be read and written by one pass.
// To add a kind of store, write a file that defines its StoreKind and add a line to kv_stores.cpp.
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

// The names of all kinds.
std::vector<std::string> store_kinds();

// The stores that Python passed to one call of a decoder. The call writes into the memory of their arrays where nobody
// else would notice: where nothing refers to an array but its dict and one owner, the layer of the cache that gave it.
// Other arrays are copied first, and the copies take their places in the dicts.
class GivenStores {
 public:
  // Checks that `given` holds one store for each of the first `layers` layers, with room for the span, and evaluates
  // their arrays. Must be called with Python's lock, and so must the destructor.
  GivenStores(const nb::list& given, const DecoderSpec& spec, size_t layers, const Span& span);

  KvStore* const* stores() const { return stores_.data(); }

 private:
  std::vector<mx::array> arrays_;
  std::vector<std::unique_ptr<KvStore>> held_;
  std::vector<KvStore*> stores_;
};

}  // namespace mlxeff
