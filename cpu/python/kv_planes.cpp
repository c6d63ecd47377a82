// Opens the stores of 4-bit planes. Their dicts hold, beside "kind":
//
//   upper, lower  uint8 (B, G, blocks, bytes): all that belongs to one head of one block, see plane_kernels.h
//   tail          float16 (2, B, G, capacity, E): the newest keys and values
//   block         tokens of a block
//   filled        number of blocks that hold tokens
//
// The kind int8 has lower halves of keys and values, k8v4 of keys; int4 has no lower plane.
#include "kv/plane_kv.h"
#include "python/kv_stores.h"

namespace mlxeff {
namespace {

template <bool lower_keys, bool lower_values>
PlaneArgs described(const AttentionSizes& sizes, int64_t block) {
  PlaneArgs planes = {};
  planes.sizes = sizes;
  planes.block = block;
  planes.lower_keys = lower_keys, planes.lower_values = lower_values;
  return planes;
}

void check_plane(const Named& given, const char* name, const mx::Shape& shape) {
  if (given.array(name).shape() != shape || given.array(name).dtype() != mx::uint8)
    given.refuse(std::string(name) + ": wanted uint8 of another shape for these heads and blocks");
}

template <bool lower_keys, bool lower_values>
void check_planes(const Named& given, const AttentionSizes& sizes, const Span& span) {
  const int64_t block = given.integer("block"), filled = given.integer("filled");
  if (sizes.size % 16 || block % 32 || block <= 0)
    given.refuse("wanted heads of a multiple of 16 and blocks of a multiple of 32, got " + std::to_string(sizes.size) +
                 " and " + std::to_string(block));
  const PlaneArgs planes = described<lower_keys, lower_values>(sizes, block);
  const int batch = int(span.batch), groups = int(sizes.groups);
  const mx::array& upper = given.array("upper");
  const int capacity = upper.ndim() == 4 ? upper.shape(2) : 0;
  check_plane(given, "upper", {batch, groups, capacity, int(planes.upper_bytes())});
  if (lower_keys || lower_values) check_plane(given, "lower", {batch, groups, capacity, int(planes.lower_bytes())});
  const mx::array& tail = given.array("tail");
  const int room = tail.ndim() == 5 ? tail.shape(3) : 0;
  if (given.array("tail", {2, batch, groups, room, int(sizes.size)}).dtype() != mx::float16)
    given.refuse("tail: wanted float16");
  if (filled < 0 || filled > capacity || filled * block > span.end - span.length || filled * block + room < span.end)
    given.refuse("wanted room for " + std::to_string(span.end) + " tokens, got " + std::to_string(filled) +
                 " blocks and a tail of " + std::to_string(room));
}

template <bool lower_keys, bool lower_values>
std::unique_ptr<KvStore> open_planes(mx::array* arrays, const int64_t* integers, const Span&) {
  const mx::array& tail = arrays[1];
  const AttentionSizes sizes = {0, tail.shape(2), tail.shape(4), 0};
  PlaneArgs planes = described<lower_keys, lower_values>(sizes, integers[0]);
  planes.upper = arrays[0].data<uint8_t>();
  if (lower_keys || lower_values) planes.lower = arrays[2].data<uint8_t>();
  planes.capacity = arrays[0].shape(2);
  planes.blocks = integers[1];
  return std::make_unique<PlaneKv>(planes, reinterpret_cast<f16*>(arrays[1].data<mx::float16_t>()), tail.shape(3));
}

}  // namespace

const StoreKind plane_int8_kind = {
    "int8", {"upper", "tail", "lower"}, {"block", "filled"}, check_planes<true, true>, open_planes<true, true>};
const StoreKind plane_k8v4_kind = {
    "k8v4", {"upper", "tail", "lower"}, {"block", "filled"}, check_planes<true, false>, open_planes<true, false>};
const StoreKind plane_int4_kind = {
    "int4", {"upper", "tail"}, {"block", "filled"}, check_planes<false, false>, open_planes<false, false>};

}  // namespace mlxeff
