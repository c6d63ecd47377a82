// The SeedLM functions of the Python module mlxeff._native: matrix products and decoding as MLX primitives, and the
// encoder, which works on NumPy arrays.
#include "python/mlx_seedlm.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "base/common.h"

namespace mlxeff {

void SeedLayout::check_arrays(const std::vector<mx::array>& arrays) const {
  const auto is = [&](size_t i, mx::Dtype dtype, int64_t width) {
    return arrays[i].dtype() == dtype && arrays[i].shape() == mx::Shape{int(rows), int(width)};
  };
  const bool known = (states == 3 && columns == 8) || (states == 4 && (columns == 8 || columns == 12));
  if (!known || cols < 1) throw std::invalid_argument("seedlm: the blocks are of no known format");
  int64_t blocks = ceil_div(cols, columns);
  if (states == 4) blocks += blocks % 2;
  const bool packed = states == 3 && arrays.size() == 1 && is(0, mx::uint32, blocks);
  const bool planar = states == 4 && arrays.size() == 3 && is(0, mx::uint16, blocks) && is(1, mx::uint16, blocks) &&
                      is(2, mx::uint8, blocks / 2);
  if (!packed && !planar) throw std::invalid_argument("seedlm: the arrays do not fit the matrix");
}

mlxeff_seedlm_weight SeedLayout::weight(const std::vector<mx::array>& inputs, size_t first) const {
  const bool planar = states == 4;
  return {inputs[first].data<void>(),
          planar ? inputs[first + 1].data<uint16_t>() : nullptr,
          planar ? inputs[first + 2].data<uint8_t>() : nullptr,
          rows,
          cols,
          cols,
          columns,
          states,
          exponent_bias};
}

namespace {

std::vector<mx::array> contiguous(const std::vector<mx::array>& arrays, mx::Stream stream) {
  std::vector<mx::array> out;
  for (const mx::array& a : arrays) out.push_back(mx::contiguous(a, false, stream));
  return out;
}

// dx (M, K) = dy (M, N) @ W (N, K).
void seed_dx(const mlxeff_seedlm_weight& w, const MatrixView& dy, const MatrixView& dx) {
  int64_t blocks = ceil_div(w.K, w.columns);
  if (w.states == 4) blocks += blocks % 2;
  blocked_dx(w.N, w.K, dy, dx, [&](int64_t row, int64_t rows, float* out) {
    mlxeff_seedlm_weight part = w;
    part.N = rows;
    part.seeds = static_cast<const char*>(w.seeds) + row * blocks * (w.states == 3 ? 4 : 2);
    if (w.states == 4) {
      part.coefficients += row * blocks;
      part.exponents += row * blocks / 2;
    }
    return mlxeff_seedlm_decode(&part, out, w.K, MLXEFF_F32);
  });
}

// Computes x W^T (..., rows), in the dtype of x, from x (..., cols) and the arrays of W; or its gradient dx (..., cols)
// from dy (..., rows) and the arrays of W.
class SeedMatmul : public NativePrimitive {
 public:
  SeedMatmul(mx::Stream stream, SeedLayout layout, int mode, bool gradient)
      : NativePrimitive(stream, "native seedlm_matmul"), layout_(layout), mode_(mode), gradient_(gradient) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    if (outputs[0].size() == 0) return;
    const MatrixView x = matrix(inputs[0]), y = matrix_of(outputs[0]);
    const mlxeff_seedlm_weight weight = layout_.weight(inputs, 1);
    if (gradient_) dispatch([=] { seed_dx(weight, x, y); });
    else
      dispatch([=, mode = mode_] {
        check(mlxeff_seedlm_matmul(&weight, x.data, x.ld, x.dtype, y.data, y.ld, y.dtype, x.rows, mode, 0), "seedlm: ");
      });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    if (gradient_) refuse_to("be differentiated twice");
    if (argnums.size() != 1 || argnums[0] != 0) refuse_to("be differentiated with respect to seed-encoded weights");
    std::vector<mx::array> inputs = primals;
    inputs[0] = cotangents[0];
    return {mx::array(primals[0].shape(), primals[0].dtype(),
                      std::make_shared<SeedMatmul>(stream(), layout_, mode_, true), std::move(inputs))};
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const SeedMatmul&>(other);
    return layout_ == o.layout_ && mode_ == o.mode_ && gradient_ == o.gradient_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.back() = int(gradient_ ? layout_.cols : layout_.rows);
    return {shape};
  }

 private:
  SeedLayout layout_;
  int mode_;
  bool gradient_;
};

// Decodes the rows `ids` (n) of a matrix to an array (n, cols), or the whole matrix if there are no ids.
class SeedRows : public NativePrimitive {
 public:
  SeedRows(mx::Stream stream, SeedLayout layout, bool chosen)
      : NativePrimitive(stream, "native seedlm_decode"), layout_(layout), chosen_(chosen) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    const MatrixView out = matrix_of(outputs[0]);
    const int32_t* const ids = chosen_ ? inputs[0].data<int32_t>() : nullptr;
    dispatch([weight = layout_.weight(inputs, chosen_ ? 1 : 0), ids, out] {
      check(ids ? mlxeff_seedlm_rows(&weight, ids, out.rows, out.data, out.ld, out.dtype)
                : mlxeff_seedlm_decode(&weight, out.data, out.ld, out.dtype),
            "seedlm: ", "wanted ids of rows of the matrix");
    });
  }

 private:
  SeedLayout layout_;
  bool chosen_;
};

mx::array matmul(const mx::array& x, const std::vector<mx::array>& arrays, int64_t rows, int64_t cols, int columns,
                 int states, int exponent_bias, int mode) {
  const SeedLayout layout = {rows, cols, columns, states, exponent_bias};
  layout.check_arrays(arrays);
  dtype_of(x);
  if (x.ndim() < 1 || x.shape(-1) != cols) throw std::invalid_argument("seedlm: x does not fit the matrix");
  const mx::Stream stream = cpu_stream();
  std::vector<mx::array> inputs = contiguous(arrays, stream);
  inputs.insert(inputs.begin(), x);
  mx::Shape shape = x.shape();
  shape.back() = int(rows);
  return mx::array(std::move(shape), x.dtype(), std::make_shared<SeedMatmul>(stream, layout, mode, false),
                   std::move(inputs));
}

mx::array decode(const std::vector<mx::array>& arrays, const std::optional<mx::array>& ids, int64_t rows, int64_t cols,
                 int columns, int states, int exponent_bias, mx::Dtype dtype) {
  const SeedLayout layout = {rows, cols, columns, states, exponent_bias};
  layout.check_arrays(arrays);
  if (!mx::issubdtype(dtype, mx::floating) || dtype == mx::float64)
    throw std::invalid_argument("seedlm: wanted float32, float16 or bfloat16");
  const mx::Stream stream = cpu_stream();
  std::vector<mx::array> inputs = contiguous(arrays, stream);
  mx::Shape shape = {ids ? int(ids->size()) : int(rows), int(cols)};
  if (ids)
    inputs.insert(inputs.begin(),
                  mx::contiguous(mx::astype(mx::flatten(*ids, stream), mx::int32, stream), false, stream));
  const mx::array flat(std::move(shape), dtype, std::make_shared<SeedRows>(stream, layout, ids.has_value()),
                       std::move(inputs));
  if (!ids) return flat;
  mx::Shape wanted = ids->shape();
  wanted.push_back(int(cols));
  return mx::reshape(flat, wanted, stream);
}

template <class T>
using Numpy = nb::ndarray<T, nb::numpy, nb::c_contig, nb::device::cpu>;

template <class T>
Numpy<T> numpy(std::initializer_list<size_t> shape) {
  size_t size = 1;
  for (size_t n : shape) size *= n;
  T* const data = new T[size];
  return Numpy<T>(data, shape, nb::capsule(data, [](void* p) noexcept { delete[] static_cast<T*>(p); }));
}

nb::tuple encode(nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> weights,
                 std::optional<nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>> diagonal,
                 int columns, int states, int exponent_bias, bool refine) {
  const size_t rows = weights.shape(0), cols = weights.shape(1);
  if (columns < 1 || (diagonal && diagonal->shape(0) != size_t(columns)))
    throw std::invalid_argument("seedlm: wanted a weight for each column of a block");
  size_t blocks = (cols + size_t(columns) - 1) / size_t(columns);
  if (states == 4 && !diagonal) blocks += blocks % 2;
  auto seeds = numpy<uint16_t>({rows, blocks});
  auto coefficients = numpy<int8_t>({rows, blocks, size_t(states)});
  auto codes = numpy<uint8_t>({rows, blocks});
  auto decoded = numpy<float>({rows, cols});
  const mlxeff_seedlm_encode_args args = {weights.data(),
                                          int64_t(cols),
                                          int64_t(rows),
                                          int64_t(cols),
                                          diagonal ? diagonal->data() : nullptr,
                                          columns,
                                          states,
                                          exponent_bias,
                                          refine,
                                          seeds.data(),
                                          coefficients.data(),
                                          codes.data(),
                                          decoded.data(),
                                          nullptr};
  int code;
  {
    nb::gil_scoped_release release;
    code = mlxeff_seedlm_encode(&args);
  }
  check(code, "seedlm: ");
  return nb::make_tuple(seeds, coefficients, codes, decoded);
}

}  // namespace

void bind_seedlm(nb::module_& m) {
  m.def("seedlm_matmul", &matmul, nb::arg("x"), nb::arg("arrays"), nb::arg("rows"), nb::arg("cols"), nb::arg("columns"),
        nb::arg("states"), nb::arg("exponent_bias"), nb::arg("mode"),
        "x (..., cols) -> x W^T (..., rows); arrays: (blocks) or (seeds, coefficients, exponents).");
  m.def("seedlm_decode", &decode, nb::arg("arrays"), nb::arg("ids").none(), nb::arg("rows"), nb::arg("cols"),
        nb::arg("columns"), nb::arg("states"), nb::arg("exponent_bias"), nb::arg("dtype"),
        "The rows `ids` (...) as (..., cols), or all of the matrix (rows, cols).");
  m.def("seedlm_encode", &encode, nb::arg("weights"), nb::arg("diagonal").none(), nb::arg("columns"), nb::arg("states"),
        nb::arg("exponent_bias"), nb::arg("refine"),
        "NumPy weights (rows, cols) -> (seeds, coefficients, codes, decoded); see mlxeff_seedlm_encode.");
}

}  // namespace mlxeff
