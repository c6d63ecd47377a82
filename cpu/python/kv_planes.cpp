// Opens the stores of 4-bit planes. Their dicts hold, beside "kind":
//
//   key_upper, key_lower      uint32 (B, G, blocks, E, block / 8), key_scale, key_zero float16 (B, G, blocks, E)
//   value_upper, value_lower  uint32 (B, G, blocks, block, width / 8), value_scale, value_zero (B, G, blocks, block)
//   tail_keys, tail_values    float16 (B, G, capacity, E)
//   filled                    number of blocks that hold tokens
//
// The kind int4 lacks the lower planes, and k8v4 that of the values.
#include "kv/plane_kv.h"
#include "python/kv_stores.h"

namespace mlxeff {
namespace {

constexpr int64_t codes_per_word = 8;

struct Shapes {
  mx::Shape plane, scales;
};

void check_plane(const Named& given, const char* name, const Shapes& shapes, mx::Dtype type, bool scales) {
  const mx::array& array = given.array(name);
  if (array.dtype() != type || array.shape() != (scales ? shapes.scales : shapes.plane))
    given.refuse(std::string(name) + ": wanted another type or shape for these heads and blocks");
}

template <bool lower_keys, bool lower_values>
void check_planes(const Named& given, const AttentionSizes& sizes, const Span& span) {
  const mx::array& upper = given.array("key_upper");
  if (upper.ndim() != 5) given.refuse("key_upper: wanted shape (B, G, blocks, E, block / 8)");
  const int capacity = upper.shape(2), block = upper.shape(4) * int(codes_per_word);
  const int width = int(round_up(sizes.size, 32)), batch = int(span.batch), groups = int(sizes.groups);
  if (sizes.size % 16 || block % 32 || block == 0)
    given.refuse("wanted heads of a multiple of 16 and blocks of a multiple of 32, got " + std::to_string(sizes.size) +
                 " and " + std::to_string(block));
  const Shapes keys = {{batch, groups, capacity, int(sizes.size), block / int(codes_per_word)},
                       {batch, groups, capacity, int(sizes.size)}};
  const Shapes values = {{batch, groups, capacity, block, width / int(codes_per_word)},
                         {batch, groups, capacity, block}};
  check_plane(given, "key_upper", keys, mx::uint32, false);
  if (lower_keys) check_plane(given, "key_lower", keys, mx::uint32, false);
  check_plane(given, "value_upper", values, mx::uint32, false);
  if (lower_values) check_plane(given, "value_lower", values, mx::uint32, false);
  for (const char* name : {"key_scale", "key_zero"}) check_plane(given, name, keys, mx::float16, true);
  for (const char* name : {"value_scale", "value_zero"}) check_plane(given, name, values, mx::float16, true);
  const mx::array& tail = given.array("tail_keys");
  const int room = tail.ndim() == 4 ? tail.shape(2) : 0;
  for (const char* name : {"tail_keys", "tail_values"})
    if (given.array(name, {batch, groups, room, int(sizes.size)}).dtype() != mx::float16)
      given.refuse(std::string(name) + ": wanted float16");
  const int64_t filled = given.integer("filled");
  if (filled < 0 || filled > capacity || filled * block > span.end - span.length || filled * block + room < span.end)
    given.refuse("wanted room for " + std::to_string(span.end) + " tokens, got " + std::to_string(filled) +
                 " blocks and a tail of " + std::to_string(room));
}

const uint8_t* bytes(mx::array& array) { return reinterpret_cast<const uint8_t*>(array.data<uint32_t>()); }
f16* halves(mx::array& array) { return reinterpret_cast<f16*>(array.data<mx::float16_t>()); }

template <bool lower_keys, bool lower_values>
std::unique_ptr<KvStore> open_planes(mx::array* arrays, const int64_t* integers, const Span&) {
  PlaneArgs planes = {};
  mx::array &key_upper = *arrays++, &value_upper = *arrays++;
  planes.keys = {bytes(key_upper), nullptr, halves(arrays[0]), halves(arrays[1])};
  planes.values = {bytes(value_upper), nullptr, halves(arrays[2]), halves(arrays[3])};
  f16 *const tail_keys = halves(arrays[4]), *const tail_values = halves(arrays[5]);
  const int64_t tail_capacity = arrays[4].shape(2);
  arrays += 6;
  if (lower_keys) planes.keys.lower = bytes(*arrays++);
  if (lower_values) planes.values.lower = bytes(*arrays++);
  planes.capacity = key_upper.shape(2);
  planes.block = key_upper.shape(4) * codes_per_word;
  planes.width = value_upper.shape(4) * codes_per_word;
  planes.blocks = integers[0];
  return std::make_unique<PlaneKv>(planes, tail_keys, tail_values, tail_capacity);
}

std::vector<const char*> names(bool lower_keys, bool lower_values) {
  std::vector<const char*> all = {"key_upper",   "value_upper", "key_scale", "key_zero",
                                  "value_scale", "value_zero",  "tail_keys", "tail_values"};
  if (lower_keys) all.push_back("key_lower");
  if (lower_values) all.push_back("value_lower");
  return all;
}

}  // namespace

const StoreKind plane_int8_kind = {
    "int8", names(true, true), {"filled"}, check_planes<true, true>, open_planes<true, true>};
const StoreKind plane_int4_kind = {
    "int4", names(false, false), {"filled"}, check_planes<false, false>, open_planes<false, false>};
const StoreKind plane_k8v4_kind = {
    "k8v4", names(true, false), {"filled"}, check_planes<true, false>, open_planes<true, false>};

}  // namespace mlxeff
