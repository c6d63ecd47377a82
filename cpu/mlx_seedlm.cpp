// The SeedLM kernels in the Python module mlxeff._native: products and decoding as MLX primitives, the encoder on NumPy arrays.
#include "mlx_seedlm.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "mlxeff_cpu.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace {

int dtype_of(mx::Dtype dtype) {
  if (dtype == mx::float32) return MLXEFF_F32;
  if (dtype == mx::float16) return MLXEFF_F16;
  if (dtype == mx::bfloat16) return MLXEFF_BF16;
  throw std::invalid_argument("seedlm: wanted float32, float16 or bfloat16");
}

void check(int code) {
  if (code != MLXEFF_OK) throw std::runtime_error(std::string("seedlm kernel: ") + mlxeff_error_string(code));
}

// A matrix without its arrays, which are inputs of the primitives: one (blocks) or three (seeds, coefficients, exponents).
struct Layout {
  int64_t rows, cols;
  int columns, states, exponent_bias;

  void check_arrays(const std::vector<mx::array>& arrays) const {
    int64_t blocks = (cols + columns - 1) / columns;
    if (states == 4) blocks += blocks % 2;
    const mx::Shape full = {int(rows), int(blocks)}, half = {int(rows), int(blocks / 2)};
    const bool packed = states == 3 && arrays.size() == 1 && arrays[0].dtype() == mx::uint32 && arrays[0].shape() == full;
    const bool planar = states == 4 && arrays.size() == 3 && arrays[0].dtype() == mx::uint16 && arrays[1].dtype() == mx::uint16 &&
                        arrays[2].dtype() == mx::uint8 && arrays[0].shape() == full && arrays[1].shape() == full && arrays[2].shape() == half;
    if (!packed && !planar) throw std::invalid_argument("seedlm: the arrays do not fit the matrix");
  }
  mlxeff_seedlm_weight weight(const std::vector<mx::array>& inputs, size_t first) const {
    const bool planar = states == 4;
    return {inputs[first].data<void>(), planar ? inputs[first + 1].data<uint16_t>() : nullptr, planar ? inputs[first + 2].data<uint8_t>() : nullptr,
            rows, cols, columns, states, exponent_bias};
  }
};

std::vector<mx::array> contiguous(const std::vector<mx::array>& arrays, mx::Stream stream) {
  std::vector<mx::array> out;
  for (const mx::array& a : arrays) out.push_back(mx::contiguous(a, false, stream));
  return out;
}

// x (..., cols), arrays -> x W^T (..., rows) in x's dtype.
class SeedMatmul : public mx::Primitive {
 public:
  SeedMatmul(mx::Stream stream, Layout layout, int mode) : mx::Primitive(stream), layout_(layout), mode_(mode) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    mx::array& y = outputs[0];
    y.set_data(mx::allocator::malloc(y.nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch(
        [weight = layout_.weight(inputs, 1), x = inputs[0].data<void>(), y = y.data<void>(), dtype = dtype_of(y.dtype()),
         M = int64_t(inputs[0].size()) / layout_.cols, mode = mode_]() {
          check(mlxeff_seedlm_matmul(&weight, x, weight.K, dtype, y, weight.N, dtype, M, mode));
        });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override { throw std::runtime_error("seedlm: this primitive has no GPU form"); }
  const char* name() const override { return "MlxeffSeedMatmul"; }

 private:
  Layout layout_;
  int mode_;
};

// ids (n), arrays -> rows (n, cols); with no ids all of the matrix.
class SeedRows : public mx::Primitive {
 public:
  SeedRows(mx::Stream stream, Layout layout, bool chosen) : mx::Primitive(stream), layout_(layout), chosen_(chosen) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    mx::array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const int32_t* const ids = chosen_ ? inputs[0].data<int32_t>() : nullptr;
    mx::cpu::get_command_encoder(stream()).dispatch([weight = layout_.weight(inputs, chosen_ ? 1 : 0), ids, count = int64_t(out.shape(0)),
                                                     out = out.data<void>(), dtype = dtype_of(out.dtype())]() {
      check(ids ? mlxeff_seedlm_rows(&weight, ids, count, out, weight.K, dtype) : mlxeff_seedlm_decode(&weight, out, weight.K, dtype));
    });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override { throw std::runtime_error("seedlm: this primitive has no GPU form"); }
  const char* name() const override { return "MlxeffSeedRows"; }

 private:
  Layout layout_;
  bool chosen_;
};

mx::array matmul(const mx::array& x, const std::vector<mx::array>& arrays, int64_t rows, int64_t cols, int columns, int states, int exponent_bias,
                 int mode) {
  const Layout layout = {rows, cols, columns, states, exponent_bias};
  layout.check_arrays(arrays);
  dtype_of(x.dtype());
  if (x.ndim() < 1 || x.shape(-1) != cols) throw std::invalid_argument("seedlm: x does not fit the matrix");
  const mx::Stream stream = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs = contiguous(arrays, stream);
  inputs.insert(inputs.begin(), mx::contiguous(x, false, stream));
  mx::Shape shape = x.shape();
  shape.back() = int(rows);
  return mx::array(std::move(shape), x.dtype(), std::make_shared<SeedMatmul>(stream, layout, mode), std::move(inputs));
}

mx::array decode(const std::vector<mx::array>& arrays, const std::optional<mx::array>& ids, int64_t rows, int64_t cols, int columns, int states,
                 int exponent_bias, mx::Dtype dtype) {
  const Layout layout = {rows, cols, columns, states, exponent_bias};
  layout.check_arrays(arrays);
  dtype_of(dtype);
  const mx::Stream stream = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs = contiguous(arrays, stream);
  mx::Shape shape = {ids ? int(ids->size()) : int(rows), int(cols)};
  if (ids) inputs.insert(inputs.begin(), mx::contiguous(mx::astype(mx::flatten(*ids, stream), mx::int32, stream), false, stream));
  const mx::array flat(std::move(shape), dtype, std::make_shared<SeedRows>(stream, layout, ids.has_value()), std::move(inputs));
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
                 std::optional<nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>> diagonal, int columns, int states,
                 int exponent_bias, bool refine) {
  const size_t rows = weights.shape(0), cols = weights.shape(1);
  if (columns < 1 || (diagonal && diagonal->shape(0) != size_t(columns))) throw std::invalid_argument("seedlm: wanted a weight for each column of a block");
  size_t blocks = (cols + size_t(columns) - 1) / size_t(columns);
  if (states == 4 && !diagonal) blocks += blocks % 2;
  auto seeds = numpy<uint16_t>({rows, blocks});
  auto coefficients = numpy<int8_t>({rows, blocks, size_t(states)});
  auto codes = numpy<uint8_t>({rows, blocks});
  auto decoded = numpy<float>({rows, cols});
  const mlxeff_seedlm_encode_args args = {
      weights.data(), int64_t(cols), int64_t(rows), int64_t(cols), diagonal ? diagonal->data() : nullptr, columns, states, exponent_bias, refine,
      seeds.data(), coefficients.data(), codes.data(), decoded.data(), nullptr};
  int code;
  {
    nb::gil_scoped_release release;
    code = mlxeff_seedlm_encode(&args);
  }
  check(code);
  return nb::make_tuple(seeds, coefficients, codes, decoded);
}

}  // namespace

void bind_seedlm(nb::module_& m) {
  m.def("seedlm_matmul", &matmul, nb::arg("x"), nb::arg("arrays"), nb::arg("rows"), nb::arg("cols"), nb::arg("columns"), nb::arg("states"),
        nb::arg("exponent_bias"), nb::arg("mode"), "x (..., cols) -> x W^T (..., rows); arrays: (blocks) or (seeds, coefficients, exponents).");
  m.def("seedlm_decode", &decode, nb::arg("arrays"), nb::arg("ids").none(), nb::arg("rows"), nb::arg("cols"), nb::arg("columns"), nb::arg("states"),
        nb::arg("exponent_bias"), nb::arg("dtype"), "The rows `ids` (...) as (..., cols), or all of the matrix (rows, cols).");
  m.def("seedlm_encode", &encode, nb::arg("weights"), nb::arg("diagonal").none(), nb::arg("columns"), nb::arg("states"), nb::arg("exponent_bias"),
        nb::arg("refine"), "NumPy weights (rows, cols) -> (seeds, coefficients, codes, decoded); see mlxeff_seedlm_encode.");
}
