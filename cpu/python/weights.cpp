#include "python/weights.h"

#include "python/mlx_seedlm.h"

namespace mlxeff {
namespace {

struct MatrixKind {
  const char* name;
  WeightMatrix (*read)(const Named& given, Weights& weights);
};

WeightMatrix dense(const Named& given, Weights& weights) {
  given.expect({"weight"}, {"bias"});
  const mx::array& weight = given.array("weight");
  if (weight.ndim() != 2) given.refuse("weight: wanted a matrix, got shape " + text_of(weight.shape()));
  return WeightMatrix::of(weights.keep(weight).data<void>(), dtype_of(weight), weight.shape(0), weight.shape(1));
}

mlxeff_qweight packed_matrix(const Named& given, Weights& weights, int64_t bits, const char* name,
                             const char* scales_name, const char* biases_name) {
  const int64_t group = given.integer("group_size");
  if (group != 32 && group != 64 && group != 128) given.refuse("group_size: wanted 32, 64 or 128");
  const mx::array& packed = given.array(name);
  if (packed.dtype() != mx::uint32 || packed.ndim() != 2)
    given.refuse(std::string(name) + ": wanted a matrix of uint32");
  const int64_t rows = packed.shape(0), columns = int64_t(packed.shape(1)) * 32 / bits;
  const mx::Shape groups = {int(rows), int(columns / group)};
  const mx::array &scales = given.array(scales_name, groups), &biases = given.array(biases_name, groups);
  if (scales.dtype() != biases.dtype()) given.refuse(std::string(biases_name) + ": wanted the type of " + scales_name);
  return {weights.keep(packed).data<uint32_t>(),
          weights.keep(scales).data<void>(),
          weights.keep(biases).data<void>(),
          rows,
          columns,
          columns,
          int(bits),
          int(group),
          dtype_of(scales)};
}

WeightMatrix affine(const Named& given, Weights& weights) {
  given.expect({"weight", "scales", "biases", "group_size", "bits"}, {"bias"});
  const int64_t bits = given.integer("bits");
  if (bits < 2 || bits > 8 || bits == 7) given.refuse("bits: wanted 2, 3, 4, 5, 6 or 8");
  return WeightMatrix::of(packed_matrix(given, weights, bits, "weight", "scales", "biases"));
}

WeightMatrix affine_planes(const Named& given, Weights& weights) {
  given.expect({"upper", "scales", "biases", "lower", "lower_scales", "lower_biases", "group_size"}, {"bias"});
  WeightMatrix matrix = WeightMatrix::of(packed_matrix(given, weights, 4, "upper", "scales", "biases"));
  matrix.lower = packed_matrix(given, weights, 4, "lower", "lower_scales", "lower_biases");
  if (matrix.lower.N != matrix.N || matrix.lower.K != matrix.K) given.refuse("lower: wanted the shape of upper");
  return matrix;
}

WeightMatrix seedlm(const Named& given, Weights& weights) {
  const std::vector<const char*> planes = given.has("blocks")
                                              ? std::vector<const char*>{"blocks"}
                                              : std::vector<const char*>{"seeds", "coefficients", "exponents"};
  std::vector<const char*> names = {"cols", "columns", "states", "exponent_bias"};
  names.insert(names.end(), planes.begin(), planes.end());
  given.expect(names, {"bias"});
  std::vector<mx::array> arrays;
  for (const char* name : planes) arrays.push_back(weights.keep(given.array(name)));
  if (arrays[0].ndim() != 2) given.refuse(std::string(planes[0]) + ": wanted a matrix");
  const SeedLayout layout = {arrays[0].shape(0), given.integer("cols"), int(given.integer("columns")),
                             int(given.integer("states")), int(given.integer("exponent_bias"))};
  try {
    layout.check_arrays(arrays);
  } catch (const std::invalid_argument& error) {
    given.refuse(error.what());
  }
  return WeightMatrix::of(layout.weight(arrays, 0));
}

constexpr MatrixKind dense_kind = {"dense", dense}, affine_kind = {"affine", affine}, seedlm_kind = {"seedlm", seedlm},
                     planes_kind = {"affine_planes", affine_planes};
constexpr const MatrixKind* kinds[] = {&dense_kind, &affine_kind, &seedlm_kind, &planes_kind};

}  // namespace

const mx::array& Weights::keep(const mx::array& given) {
  mx::array a = given.flags().row_contiguous ? given : mx::contiguous(given);
  a.eval();
  arrays_.push_back(a);
  return arrays_.back();
}

const float* Weights::floats(const std::optional<mx::array>& given) {
  return given ? keep(mx::astype(*given, mx::float32)).data<float>() : nullptr;
}

Linear Weights::linear(Named given, int64_t rows, int64_t columns) {
  const WeightMatrix weight = given.kind(kinds)->read(given, *this);
  if ((rows && weight.N != rows) || weight.K != columns)
    given.refuse("wanted a matrix " +
                 (rows ? text_of({int(rows), int(columns)}) : "of " + std::to_string(columns) + " columns") + ", got " +
                 text_of({int(weight.N), int(weight.K)}));
  return {weight, floats(given.array_or_none("bias", {int(weight.N)}))};
}

}  // namespace mlxeff
