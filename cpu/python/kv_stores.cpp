#include "python/kv_stores.h"

#include <cstring>

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
  for (size_t i = 0; i < layers; ++i) {
    Named store(given[i], "decoder: store " + std::to_string(i));
    const StoreKind* const kind = store.kind(known_kinds);
    std::vector<const char*> names = kind->arrays;
    names.insert(names.end(), kind->integers.begin(), kind->integers.end());
    store.expect(names);
    kind->check(store, spec.sizes(spec.layers[i]), span);
    kinds_.push_back({kind, {}});
    for (const char* name : kind->integers) kinds_.back().integers.push_back(store.integer(name));
    for (const char* name : kind->arrays) arrays_.push_back(store.array(name));
  }
}

void GivenStores::add_to(std::vector<mx::array>& inputs, std::vector<mx::Shape>& shapes,
                         std::vector<mx::Dtype>& dtypes) const {
  for (const mx::array& array : arrays_) {
    inputs.push_back(array);
    shapes.push_back(array.shape());
    dtypes.push_back(array.dtype());
  }
}

nb::list GivenStores::updated(const mx::array* outputs) const {
  nb::list stores;
  for (const GivenKind& given : kinds_) {
    nb::dict store;
    store["kind"] = given.kind->name;
    for (const char* name : given.kind->arrays) store[name] = *outputs++;
    for (size_t i = 0; i < given.integers.size(); ++i) store[given.kind->integers[i]] = given.integers[i];
    stores.append(store);
  }
  return stores;
}

StoreUpdate::StoreUpdate(const std::vector<GivenKind>& kinds, const Span& span, const mx::array* inputs,
                         mx::array* outputs) {
  for (const GivenKind& given : kinds) {
    const StoreKind* const kind = given.kind;
    for (size_t i = 0; i < kind->arrays.size(); ++i) {
      const mx::array& in = inputs[i];
      mx::array& out = outputs[i];
      if (!in.flags().row_contiguous) throw std::invalid_argument("decoder: wanted row-contiguous arrays of a store");
      if (in.is_donatable()) {
        out.copy_shared_buffer(in);
      } else {
        out.set_data(mx::allocator::malloc(out.nbytes()));
        copies_.push_back({out.data<void>(), in.data<void>(), in.nbytes()});
      }
    }
    held_.push_back(kind->open(outputs, given.integers.data(), span));
    stores_.push_back(held_.back().get());
    inputs += kind->arrays.size();
    outputs += kind->arrays.size();
  }
}

KvStore* const* StoreUpdate::ready() {
  for (const Copy& copy : copies_) std::memcpy(copy.to, copy.from, copy.bytes);
  return stores_.data();
}

void drop_inputs_of_siblings(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (const mx::array& output : outputs)
    if (output.is_tracer()) return;
  for (mx::array& output : outputs)
    if (&output.inputs() != &inputs) output.inputs().clear();
}

}  // namespace mlxeff
