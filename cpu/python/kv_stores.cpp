#include "python/kv_stores.h"

#include "python/at_once.h"

namespace mlxeff {

static const StoreKind* const known_kinds[] = {&dense_kv_kind, &plane_kv_kind};

std::vector<std::string> store_kinds() {
  std::vector<std::string> names;
  for (const StoreKind* kind : known_kinds) names.push_back(kind->name);
  return names;
}

GivenStores::GivenStores(const nb::list& given, const DecoderSpec& spec, size_t layers, const Span& span) {
  if (given.size() != layers)
    throw std::invalid_argument("decoder: wanted a store for each of " + std::to_string(layers) + " layers, got " +
                                std::to_string(given.size()));
  std::vector<Named> dicts;
  std::vector<const StoreKind*> kinds;
  for (size_t i = 0; i < layers; ++i) {
    Named store(given[i], "decoder: store " + std::to_string(i));
    const StoreKind* const kind = store.kind(known_kinds);
    std::vector<const char*> names = kind->arrays;
    names.insert(names.end(), kind->integers.begin(), kind->integers.end());
    store.expect(names);
    kind->check(store, spec.sizes(spec.layers[i]), span);
    dicts.push_back(std::move(store));
    kinds.push_back(kind);
  }
  std::vector<mx::array> given_arrays;
  for (size_t i = 0; i < layers; ++i)
    for (const char* name : kinds[i]->arrays) given_arrays.push_back(dicts[i].array(name));
  evaluate(given_arrays);
  given_arrays.clear();  // so that only the dicts and their owners are left
  for (size_t i = 0; i < layers; ++i)
    for (const char* name : kinds[i]->arrays) arrays_.push_back(dicts[i].writable(name));
  mx::array* next = arrays_.data();
  for (size_t i = 0; i < layers; ++i) {
    std::vector<int64_t> integers;
    for (const char* name : kinds[i]->integers) integers.push_back(dicts[i].integer(name));
    held_.push_back(kinds[i]->open(next, integers.data(), span));
    stores_.push_back(held_.back().get());
    next += kinds[i]->arrays.size();
  }
}

}  // namespace mlxeff
