// Opens the stores in planes of 4 bits. Their dicts hold, beside "kind":
//
//   upper           uint8 (B, G, tiles, bytes), see plane_layout.h
//   lower_keys, lower_values      uint8 (B, G, tiles, bytes): lower halves, from the tiles first_keys and first_values
//   on first_keys, first_values      numbers of tiles, as are coarse_keys, coarse_values    before which tiles are read
//   from the upper plane alone
#include "kv/plane_kv.h"
#include "python/kv_stores.h"

namespace mlxeff {
namespace {

// The tiles of an array of planes, whose tiles have `bytes` bytes.
int64_t check_plane(const Named& given, const char* name, const AttentionSizes& sizes, const Span& span,
                    int64_t bytes) {
  const mx::array& array = given.array(name);
  const int tiles = array.ndim() == 4 ? array.shape(2) : 0;
  const mx::Shape wanted = {int(span.batch), int(sizes.groups), tiles, int(bytes)};
  if (array.shape() != wanted || array.dtype() != mx::uint8)
    given.refuse(std::string(name) + ": wanted uint8 (" + std::to_string(span.batch) + ", " +
                 std::to_string(sizes.groups) + ", tiles, " + std::to_string(bytes) + ")");
  return tiles;
}

void check_order(const Named& given, const char* first_name, const char* coarse_name) {
  const int64_t first = given.integer(first_name), coarse = given.integer(coarse_name);
  if (first < 0 || coarse < first || coarse > INT32_MAX)
    given.refuse("wanted 0 <= " + std::string(first_name) + " <= " + coarse_name + ", got " + std::to_string(first) +
                 " and " + std::to_string(coarse));
}

void check_planes(const Named& given, const AttentionSizes& sizes, const Span& span) {
  if (!plane_head_size(sizes.size))
    given.refuse("wanted heads of a multiple of 16 up to " + std::to_string(largest_plane_head) + ", got " +
                 std::to_string(sizes.size));
  check_order(given, "first_keys", "coarse_keys");
  check_order(given, "first_values", "coarse_values");
  Planes planes = {};
  const int64_t half = Planes::half_bytes(sizes.size);
  planes.tiles = check_plane(given, "upper", sizes, span, Planes::upper_bytes(sizes.size));
  planes.key_tiles = check_plane(given, "lower_keys", sizes, span, half);
  planes.value_tiles = check_plane(given, "lower_values", sizes, span, half);
  planes.first_keys = given.integer("first_keys");
  planes.first_values = given.integer("first_values");
  if (!planes.hold(span.end))
    given.refuse("wanted room for " + std::to_string(span.end) + " tokens, got " + std::to_string(planes.tiles) +
                 " tiles of 16 in upper, " + std::to_string(planes.key_tiles) + " from " +
                 std::to_string(planes.first_keys) + " on in lower_keys and " + std::to_string(planes.value_tiles) +
                 " from " + std::to_string(planes.first_values) + " on in lower_values");
}

std::unique_ptr<KvStore> open_planes(mx::array* arrays, const int64_t* integers, const Span&) {
  Planes planes = {};
  planes.upper = arrays[0].data<uint8_t>(), planes.tiles = arrays[0].shape(2);
  planes.lower_keys = arrays[1].data<uint8_t>(), planes.key_tiles = arrays[1].shape(2);
  planes.lower_values = arrays[2].data<uint8_t>(), planes.value_tiles = arrays[2].shape(2);
  planes.first_keys = integers[0], planes.first_values = integers[1];
  planes.coarse_keys = integers[2], planes.coarse_values = integers[3];
  return std::make_unique<PlaneKv>(planes);
}

}  // namespace

const StoreKind plane_kv_kind = {"planes",
                                 {"upper", "lower_keys", "lower_values"},
                                 {"first_keys", "first_values", "coarse_keys", "coarse_values"},
                                 check_planes,
                                 open_planes};

}  // namespace mlxeff
