// Opens the dense key/value store from {"kind": "dense", "keys": array, "values": array}. Both arrays are (B, G,
// capacity, E), of the same floating-point type.
#include "kv/dense_kv.h"
#include "python/kv_stores.h"

namespace mlxeff {

static void check_dense(const Named& given, const AttentionSizes& sizes, const Span& span) {
  const mx::array& keys = given.array("keys");
  const int capacity = keys.ndim() == 4 ? keys.shape(2) : 0;
  const mx::Shape wanted = {int(span.batch), int(sizes.groups), capacity, int(sizes.size)};
  if (given.array("keys", wanted).dtype() != given.array("values", wanted).dtype())
    given.refuse("values: wanted the type of keys");
  dtype_of(keys);
  if (capacity < span.end)
    given.refuse("wanted room for " + std::to_string(span.end) + " tokens, got " + std::to_string(capacity));
}

static std::unique_ptr<KvStore> open_dense(mx::array* arrays, const int64_t*, const Span&) {
  return std::make_unique<DenseKv>(arrays[0].data<void>(), arrays[1].data<void>(), arrays[0].shape(2),
                                   dtype_of(arrays[0]));
}

const StoreKind dense_kv_kind = {"dense", {"keys", "values"}, {}, check_dense, open_dense};

}  // namespace mlxeff
